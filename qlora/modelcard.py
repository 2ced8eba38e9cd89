"""The card of a model that is given away, written from the record of its run.

It says what was trained on what, how, and what came out; of the data counts alone. No path, user name
or row of this machine is in it, nor anything that looks like a secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qlora import __version__, document, redact, rundir
from qlora.errors import CheckpointError
from qlora.recipe import EMBEDDED, is_local
from qlora.trained import Trained

# Of the recipe, what decides a result and names no place.
_SHOWN = {
    "quant": ("quant_type", "double_quant", "compute_dtype"),
    "lora": ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "train_new_tokens"),
    "data": ("loss_on", "max_length", "over_length", "packing"),
    "train": (
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "seed",
    ),
}  # fmt: skip
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def text(
    found: Trained,
    result: Mapping[str, Any],
    verdict: Mapping[str, Any] | None = None,
    *,
    base: str | None = None,
) -> str:
    """A README.md with front matter for the hub: of a merged model, or of an adapter without a verdict.

    Args:
        found: The run.
        result: What its ``result.json`` says.
        verdict: What :meth:`qlora.merging.Merged.to_json` says of the merged model.
        base: The base's hub id, where the run had it as a local folder.
    """
    hub_id = base or public_base(found)
    tags = ["qlora", *(["lora"] if verdict is None else [])]
    front: dict[str, Any] = {} if hub_id is None else {"base_model": hub_id}
    if hub_id is not None:
        front["base_model_relation"] = "adapter" if verdict is None else "finetune"
    front |= {"library_name": "peft" if verdict is None else "transformers"}
    front |= {"pipeline_tag": "text-generation", "tags": tags}
    what = "A LoRA adapter for" if verdict is None else "A fine-tune of"
    parts = [
        f"---\n{document.dump(front).strip()}\n---",
        f"# {found.recipe.run.name or found.config.config.model_type}",
        f"{what} {_base_words(found, hub_id)}, trained as QLoRA (4-bit base, LoRA adapter) with qlora "
        f"{__version__}."
        if found.recipe.quant.quant_type == "nf4"
        else f"{what} {_base_words(found, hub_id)}, trained as LoRA with qlora {__version__}.",
        *_scores(result),
        *_proof(verdict),
        *_data(found),
        *_settings(found),
        *_versions(found),
        _use(found, hub_id, merged=verdict is not None),
    ]
    return redact.clean("\n\n".join(parts)) + "\n"


def public_base(found: Trained) -> str | None:
    """The hub id of the base, or None where only this machine knows it by its name."""
    name = found.recipe.model.name
    return None if is_local(name) or name.count("/") != 1 else name


def _base_words(found: Trained, hub_id: str | None) -> str:
    if hub_id is not None:
        revision = found.config.commit or found.recipe.model.revision
        return f"[{hub_id}](https://huggingface.co/{hub_id}) at revision `{revision}`"
    if found.recipe.model.name.startswith(EMBEDDED):
        return "the small model that ships with qlora"
    config = found.config.config.get_text_config()
    return (
        f"a {config.model_type} model of {config.num_hidden_layers} layers and width "
        f"{config.hidden_size} that lay in a local folder"
    )


def _scores(result: Mapping[str, Any]) -> Iterable[str]:
    before, after = result.get("before") or {}, result.get("after") or {}
    names = {
        "held_out_loss": "held-out loss",
        "exact_match": "exact match",
        "stop_rate": "stop rate",
    }
    rows = []
    for key, name in names.items():
        was, now = before.get(key), after.get(key)
        if now is not None:
            shape = "{:.4f}" if key == "held_out_loss" else "{:.1%}"
            rows.append((name, "-" if was is None else shape.format(was), shape.format(now)))
    if rows:
        asked = after.get("answered")
        yield "## What training did"
        yield _table(("on held-out rows", "base", "tuned"), rows)
        if asked:
            yield f"Exact match and stop rate are of {asked} answers generated greedily."


def _proof(verdict: Mapping[str, Any] | None) -> Iterable[str]:
    if verdict is None:
        return
    one = verdict["verdict"]
    onto = "the unpacked 4-bit base" if verdict["onto"] == "nf4" else "the 16-bit checkpoint"
    yield "## What was merged, and how near it is"
    yield (
        f"The adapter is folded into {onto}; the weights are {verdict['dtype']}. Read back from disk "
        f"and held against the model that was trained, on {one['positions']} positions of "
        f"{verdict['probes']}: KL divergence {one['kl']:.2g} nats a token, the likeliest token the same "
        f"on {one['top1']:.1%}, logits within {one['max_logit']:.2g}. Training moved the base by "
        f"{verdict['learned']['kl']:.2g} nats."
    )


def _data(found: Trained) -> Iterable[str]:
    ledger = _read(found, "data.json")
    try:
        train, held_out = ledger["train"], ledger["held_out"]
        formats = ", ".join(sorted({source["format"] for source in ledger["sources"]}))
        how = "through the chat template" if ledger["rendering"] == "chat" else "as plain text"
        said = (
            f"{train['rows']:,} rows ({formats}) with {train['tokens']:,} tokens, of which "
            f"{train['supervised_tokens']:,} trained; {held_out['rows']:,} rows were held out. They were "
            f"rendered {how}."
        )
    except (LookupError, TypeError, ValueError):
        return
    yield "## Data"
    yield said


def _settings(found: Trained) -> Iterable[str]:
    rows = [
        (f"`{section}.{name}`", f"`{_value(value)}`")
        for section, names in _SHOWN.items()
        for name, value in getattr(found.recipe, section).model_dump(mode="json").items()
        if name in names and value is not None
    ]
    yield "## Settings"
    yield _table(("setting", "value"), rows)


def _versions(found: Trained) -> Iterable[str]:
    environment = _read(found, "environment.json")
    packages = environment.get("packages")
    if not isinstance(packages, dict):
        return
    card = environment.get("card") or {}
    listed = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
    yield "## Made with"
    yield f"{listed}; on {card.get('name', 'an unknown card')}."


def _use(found: Trained, hub_id: str | None, *, merged: bool) -> str:
    chat = "apply its chat template" if found.renderer.chat else "give it plain text"
    if merged:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")'
        )
    else:
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{hub_id or "THE_BASE"}")\n'
            'model = PeftModel.from_pretrained(base, "PATH_OR_ID")'
        )
    return f"## Use\n\nAs in training, {chat}.\n\n```python\n{code}\n```"


def _read(found: Trained, name: str) -> dict[str, Any]:
    if found.run is None:
        return {}
    try:
        return rundir.read_json(found.run.dir / name)
    except CheckpointError:
        return {}


def _value(value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return shown.replace("|", "/").replace("`", "'")


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
