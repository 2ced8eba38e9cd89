"""The layout and the command with which vLLM serves a run's adapter on its base.

vLLM needs other versions of torch and transformers than training does, so that nothing of it is run
here, and that is said in what is written. It is the engine to move to when one process is not enough.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from qlora import modelcard, rundir
from qlora.errors import ExportError
from qlora.export import publishing
from qlora.places import shown
from qlora.recipe import is_local, local_path
from qlora.trained import Trained

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be (vLLM 0.33)
SEEN = "0.33"


def write(found: Trained, folder: Path, *, base: str | None = None) -> list[str]:
    """Fill a folder with ``adapters/<name>``, the chat template, ``serve.sh`` and a README; the command.

    Args:
        found: A finished run.
        folder: Where; nothing may be there.
        base: What vLLM shall load, where the run had it under another name.

    Raises:
        ExportError: The folder is there, or the adapter is of a kind that vLLM does not serve.
    """
    assert found.source is not None
    if folder.exists():
        raise ExportError(
            f"{shown(folder)}: exists already. Name another folder with --out, or remove it first."
        )
    values = json.loads((found.source / "adapter_config.json").read_text(encoding="utf-8"))
    _require_servable(found, values)
    name = found.recipe.run.name or "adapter"
    rank = max([values["r"], *(values.get("rank_pattern") or {}).values()])
    local = found.recipe.model.name
    model = (
        base or modelcard.public_base(found) or str(local_path(local) if is_local(local) else local)
    )
    command = [
        "vllm", "serve", model, "--enable-lora", "--lora-modules", f"{name}=adapters/{name}",
        "--max-lora-rank", str(next(limit for limit in RANKS if limit >= rank)),
        "--max-model-len", str(_length(found)),
    ]  # fmt: skip
    if found.config.commit and not base:
        command += ["--revision", found.config.commit]
    try:
        with rundir.writing_aside(folder) as aside:
            place = aside / "adapters" / name
            place.mkdir(parents=True)
            weights = found.source / "adapter_model.safetensors"
            (place / weights.name).write_bytes(weights.read_bytes())
            rundir.write_text(place / "adapter_config.json", publishing.adapter_config(found, base))
            if found.renderer.chat and isinstance(found.tok.chat_template, str):
                rundir.write_text(aside / "chat_template.jinja", found.tok.chat_template)
                command += ["--chat-template", "chat_template.jinja"]
            line = shlex.join(command)
            script = aside / "serve.sh"
            rundir.write_text(
                script,
                f'#!/bin/sh\n# Run in an environment of vLLM.\ncd "$(dirname "$0")"\nexec {line}\n',
            )
            script.chmod(0o755)
            rundir.write_text(aside / "README.md", _readme(found, name, line))
    except OSError as error:
        raise ExportError(
            f"{shown(folder)}: cannot be written: {error.strerror or error}. Nothing is left of it."
        ) from None
    return command


def _require_servable(found: Trained, values: dict[str, Any]) -> None:
    kinds = {
        "DoRA (use_dora)": values.get("use_dora"),
        "whole modules that trained (modules_to_save)": values.get("modules_to_save"),
        "rows of the embedding that trained (lora.train_new_tokens)": values.get(
            "trainable_token_indices"
        ),
        "a bias that trained": values.get("lora_bias") or values.get("bias") not in (None, "none"),
        f"a rank above {RANKS[-1]}": values["r"] > RANKS[-1],
    }
    has = [kind for kind, there in kinds.items() if there]
    if has:
        raise ExportError(
            f"{found.name}: vLLM serves plain LoRA adapters, and this one has {' and '.join(has)}. "
            "Merge it: `qlora merge` writes a model that vLLM serves without an adapter."
        )


def _length(found: Trained) -> int:
    config = found.config.config.get_text_config()
    return min(getattr(config, "max_position_embeddings", None) or 4096, 4096)


def _readme(found: Trained, name: str, line: str) -> str:
    packed = found.recipe.quant.quant_type == "nf4"
    near = (
        "The adapter was trained on the base in 4 bits (NF4), and vLLM loads it in 16: answers may "
        "differ a little from those of the run. `qlora merge` measures by how much, and writes a model "
        "that is exact. `--quantization bitsandbytes` would load it in 4 bits, where the adapter's "
        "kind allows it.\n\n"
        if packed
        else ""
    )
    return (
        f"# {name} for vLLM\n\n```sh\n{line}\n```\n\n"
        f"Then ask for the model `{name}` at http://127.0.0.1:8000/v1. More adapters of the same base "
        f"go beside this one into `adapters/` and behind `--lora-modules`.\n\n{near}"
        f"Nothing of this was run: vLLM ({SEEN} was read) cannot be installed beside what trained the "
        "adapter. It listens on every address unless `--host 127.0.0.1` is added, and asks for no key "
        "without `--api-key`.\n"
    )
