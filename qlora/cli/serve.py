"""``qlora serve``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qlora.cli.app import app, look
from qlora.errors import Interrupted


@app.command()
def serve(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs of one base (runs/NAME for the newest), or one merged or other model.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; one that others reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="An environment variable that holds a key; default: QLORA_API_KEY."
        ),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Requests that wait besides.")] = 8,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds a request may take.")] = 120.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Prompt and answer together; default: the model's positions."),
    ] = None,
) -> None:
    """Answer OpenAI's API with tuned models: one base, and each request's adapter by its `model`.

    Requests are answered together, and each as if it were alone. Ctrl-C ends it with 130, SIGTERM with 0.
    """
    from qlora import address

    keys = address.keys_for(host, api_key_env or ())
    for run in runs:
        look(run)
    sock = address.listen(host, port)
    try:
        address.keys_for(sock.getsockname()[0], api_key_env or ())  # what the name came out as
        from qlora import server, trained
        from qlora.server import serving
        from qlora.server.meter import Meter

        meter = Meter()
        limits = serving.Limits(slots, queue, timeout, max_new_tokens, max_length)
        founds = [trained.find(run) for run in runs]
        served = serving.Serving(founds, limits, server.heard_by(meter))
    except KeyboardInterrupt:
        raise Interrupted("Stopped before the server was up.") from None
    finally:
        if sys.exc_info()[0] is not None:
            sock.close()
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/v1", "with a key" if keys else "without a key")
    for name in (*served.aliases, *served.voices):
        print(f"  model {name}")
    print("Ctrl-C ends it", flush=True)
    raise typer.Exit(server.run(served, meter, sock, keys))
