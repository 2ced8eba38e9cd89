"""A run handed to another program: llama.cpp, Ollama, vLLM or the hub; merged first where that is "
"needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from qlora import merging, modelcard, trained
from qlora.errors import ExportError
from qlora.export import gguf, ollama, publishing, vllm
from qlora.export.gguf import Written
from qlora.places import expanded, shown
from qlora.screen import Screen
from qlora.trained import Trained

Target = Literal["gguf", "ollama", "hub", "vllm"]
QUANT = "q8_0"


@dataclass(frozen=True)
class Exported:
    """Where it is: files, a folder, or an address on the hub; and what is known of each GGUF file."""

    to: Target
    where: str
    written: tuple[Written, ...] = ()


def export(
    where: str | Path,
    to: Target,
    *,
    out: str | Path | None = None,
    quants: Sequence[str] = (QUANT,),
    llama_cpp: str | None = None,
    repo: str | None = None,
    public: bool = False,
    merged: bool = False,
    base: str | None = None,
    agree: Callable[[Sequence[str]], bool] = lambda lines: False,
    console: Console | None = None,
) -> Exported:
    """Write a run in the form of another program, or send it to the hub.

    Args:
        where: A finished run, or the folder of a merged model.
        to: For whom.
        out: A folder, or for one GGUF its file; default: ``gguf``, ``ollama`` or ``vllm`` in the run, or
            beside the merged model.
        quants: Types of GGUF files, as :data:`qlora.export.gguf.QUANTS` names them.
        llama_cpp: A checkout of llama.cpp whose converter is used.
        repo: On the hub, ``owner/name``.
        public: Whether everybody may see it.
        merged: Send the merged model rather than the adapter.
        base: The base's hub id, where the run had it as a local folder.
        agree: Asked before anything is sent, with the list of files.
        console: Where it is told; standard output by default.

    Raises:
        ExportError: What was asked for cannot be made, or what was made is not the model.
        CheckpointError: Nothing there that is whole.
    """
    screen = Screen(console or Console())
    path = expanded(where)
    is_model = (path / "config.json").is_file() and not (path / "recipe.yaml").is_file()
    if to == "hub":
        return _send(where, path if is_model else None, repo, public, merged, base, agree, screen)
    if to == "vllm":
        return _for_vllm(where, is_model, out, base, screen)
    found_run = None if is_model else trained.find(where, finished=True)
    target = _place(path, found_run, to, out)
    name = (found_run.recipe.run.name or "model") if found_run else path.resolve().name
    files = _files(target, name, to, quants)
    for quant, file in files.items():
        gguf.require(quant, file)
    if found_run:  # refused before anything is merged
        made = ollama.template(found_run) if to == "ollama" else None
    folder = path if found_run is None else _merged(found_run, screen)
    found = trained.find(folder)
    if to == "ollama":
        made = ollama.template(found)
        if (files[quants[0]].parent / "Modelfile").exists():
            raise ExportError(
                f"{shown(files[quants[0]].parent)}: holds a Modelfile already. Name another folder with "
                "--out."
            )
    written = tuple(
        gguf.write(found, folder, file, quant, screen, llama_cpp=llama_cpp)
        for quant, file in files.items()
    )
    if to == "gguf":
        return Exported(to, ", ".join(str(one.file) for one in written), written)
    assert made is not None
    file = written[0].file
    modelfile = ollama.write(found, file.parent, file.name, made)
    screen.say(
        "ollama",
        f"{shown(modelfile)}: its prompts have the tokens of training in {made.proven} of {made.proven} "
        "conversations; Ollama itself was not run",
    )
    for limit in made.limits:
        screen.say("note", limit)
    return Exported(to, str(file.parent), written)


def _merged(found: Trained, screen: Screen) -> Path:
    """The merged model of a run; made now if it is not there."""
    assert found.run is not None
    folder = found.run.dir / "merged"
    if not (folder / trained.MERGED).is_file():
        merging.merge(found.run.dir, folder, console=screen.console)
    else:
        screen.say("merged", f"{shown(folder)}, as `qlora merge` left it")
    return folder


def _place(path: Path, found: Trained | None, to: Target, out: str | Path | None) -> Path:
    if out is not None:
        return expanded(out)
    if found is not None:
        assert found.run is not None
        return found.run.dir / to
    model = path.resolve()
    return model.with_name(f"{model.name}-{to}")


def _files(target: Path, name: str, to: Target, quants: Sequence[str]) -> dict[str, Path]:
    """A GGUF file for each type.

    Raises:
        ExportError: One file for several, or several for one Modelfile.
    """
    if target.suffix == ".gguf":
        if len(quants) != 1 or to == "ollama":
            what = (
                "one folder for Ollama" if to == "ollama" else f"one file for {', '.join(quants)}"
            )
            raise ExportError(f"--out is {str(target)!r}, a file: {what}. Name a folder.")
        return {quants[0]: target}
    if to == "ollama" and len(quants) != 1:
        raise ExportError(
            f"--quant names {', '.join(quants)}, and a Modelfile is of one file. Name one of them."
        )
    return {quant: target / f"{name}-{quant}.gguf" for quant in quants}


def _send(
    where: str | Path, folder: Path | None, repo: str | None, public: bool, merged: bool, base: str | None,
    agree: Callable[[Sequence[str]], bool], screen: Screen,
) -> Exported:  # fmt: skip
    if repo is None:
        raise ExportError("--to hub needs the name of a repository: --repo owner/name.")
    if folder is None:
        found = trained.find(where, finished=True)
        if not merged:
            if base is None and modelcard.public_base(found) is None:
                screen.say(
                    "note",
                    "nobody else knows the base by the name that it had here; --base owner/name "
                    "says what it is on the hub",
                )
            with publishing.adapter_parcel(found, repo, public=public, base=base) as parcel:
                return Exported("hub", publishing.send(parcel, screen, agree))
        folder = _merged(found, screen)
    with publishing.model_parcel(trained.find(folder), folder, repo, public=public) as parcel:
        return Exported("hub", publishing.send(parcel, screen, agree))


def _for_vllm(
    where: str | Path, is_model: bool, out: str | Path | None, base: str | None, screen: Screen
) -> Exported:
    if is_model:
        raise ExportError(
            f"{where}: a model without an adapter, which vLLM serves as it is: vllm serve {where}"
        )
    found = trained.find(where, finished=True)
    folder = _place(expanded(where), found, "vllm", out)
    command = vllm.write(found, folder, base=base)
    screen.say("vllm", f"{shown(folder)}: {' '.join(command)}")
    screen.say("note", "nothing of it was run; README.md there says what to know")
    return Exported("vllm", str(folder))
