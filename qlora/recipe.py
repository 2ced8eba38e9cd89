"""Read a recipe: a file or a shipped name, with overrides, checked as a whole.

What may be set stands in :mod:`qlora.settings`. After :func:`load_recipe` nothing asks "is this set?":
a recipe is complete, immutable, and its file paths are absolute.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from qlora import cookbook, document, redact, sources
from qlora.errors import DataError, RecipeError
from qlora.places import expanded, is_dir, is_file, is_there, shown
from qlora.settings import Recipe, Source

EMBEDDED = "embedded:"  # scheme of what ships inside the package
HUB = "hub:"  # scheme of a data set on the Hugging Face hub


_NAME = "constrained-str"  # pydantic's word for the first of the two things a source may be
_LAYERS = ("bool", "constrained-int")  # and for what train.activation_checkpointing may be

# Words people bring from other tools, per name here.
SYNONYMS = {
    "rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "rslora": "use_rslora", "targets": "target_modules", "lr": "learning_rate",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps", "scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps", "optimizer": "optim", "clip": "max_grad_norm",
    "gradient_checkpointing": "activation_checkpointing", "max_seq_length": "max_length",
    "sequence_len": "max_length", "cutoff_len": "max_length", "path": "name", "base": "name",
    "base_model": "name", "model_name_or_path": "name", "dataset": "train", "val": "held_out",
    "validation": "held_out", "output_dir": "dir", "report": "report_to", "dtype": "compute_dtype",
    "completion_only_loss": "loss_on", "assistant_only_loss": "loss_on", "train_on_inputs": "loss_on",
    "max_drop_fraction": "max_lost_fraction", "sample_packing": "packing",
}  # fmt: skip


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or one of the shipped recipes by name, with overrides applied.

    Args:
        source: A path to a YAML file, or a name that ``qlora recipes list`` prints.
        overrides: ``section.key=value`` strings; the value is read as YAML. File names in the
            recipe are relative to its folder, those in an override to the current folder.

    Raises:
        RecipeError: Unreadable, an unknown key (with the nearest known one), a value of the wrong
            type or out of bounds, or a file that is not there. All problems are listed at once.
    """
    return _load(cookbook.find(source), overrides, with_data=True)


def _load(path: Path, overrides: Sequence[str], *, with_data: bool) -> Recipe:
    if path.suffix.lower() in sources.ENDINGS:
        raise RecipeError(
            f"{shown(path)}: a data file, not a recipe. `qlora init {shown(path)} --model MODEL` writes "
            "a recipe for it."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from None
    origin = shown(path)
    read = document.parse(text, origin)
    values: dict[str, Any] = {k: {} if v is None else v for k, v in read.value.items()}
    if isinstance(values.get("data"), dict):
        _anchor(values, path.parent)
    if isinstance(values.get("model"), dict):
        _anchor(values, path.parent)
    _apply(values, overrides)
    recipe = _validate(values, origin, read.lines, overrides)
    if not recipe.run.name:
        recipe = recipe.model_copy(
            update={"run": recipe.run.model_copy(update={"name": _name_of(path)})}
        )
    _require_files(recipe, origin, with_data=with_data)
    return recipe


def recorded(file: Path) -> Recipe:
    """The recipe that a run wrote, whose data may have moved since: only its base and template are needed.

    Raises:
        RecipeError: As :func:`load_recipe`.
    """
    return _load(file, (), with_data=False)


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested dictionaries, as a notebook may write them; ``run.name`` is needed.

    Raises:
        RecipeError: As :func:`load_recipe`.
    """
    copied = {k: _plain(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    _anchor(copied, Path.cwd())
    recipe = _validate(copied, "recipe", {}, ())
    if not recipe.run.name:
        raise RecipeError("recipe: run.name is not set. Give the run a name, such as 'mine'.")
    _require_files(recipe, "recipe", with_data=True)
    return recipe


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section as YAML would give it: paths are text."""
    return {k: str(v) if isinstance(v, os.PathLike) else v for k, v in section.items()}


def _name_of(path: Path) -> str:
    """The file's name as a run's: what is no letter, digit, dot or dash becomes a dash."""
    return re.sub(r"[^\w.-]+", "-", path.stem).strip(".-") or "recipe"


def is_local(name: str) -> bool:
    """Whether a model or data name means a place on this machine rather than on the hub.

    >>> is_local("./base"), is_local("embedded:base"), is_local("Qwen/Qwen3-8B")
    (True, True, False)
    """
    return name.startswith((EMBEDDED, "./", "../", "/", "~")) or is_there(expanded(name))


def is_hub_id(name: str) -> bool:
    """Whether a name can only mean a model on the hub, or one that ships with the package.

    >>> is_hub_id("Qwen/Qwen3-8B"), is_hub_id("runs/mine"), is_hub_id("embedded:base")
    (True, False, True)
    """
    if name.startswith(EMBEDDED):
        return True
    return name.count("/") == 1 and not is_local(name) and not name.startswith("runs/")


def local_path(name: str) -> Path:
    """Where ``embedded:`` and ordinary names lie on this machine."""
    if name.startswith(EMBEDDED):
        return Path(__file__).parent / "embedded" / name.removeprefix(EMBEDDED)
    return expanded(name)


def _anchor(values: dict[str, Any], folder: Path) -> None:
    """Make the file names of a recipe absolute, as seen from ``folder``."""
    data = values.get("data")
    if isinstance(data, dict):
        for key in ("train", "held_out", "chat_template"):
            if key in data:
                data[key] = _anchored(data[key], folder)
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        name = model["name"]
        if name and (name.startswith(("./", "../", "~")) or is_dir(folder / name)):
            model["name"] = _absolute(name, folder)


def _anchored(value: Any, folder: Path) -> Any:
    """A name, a source's mapping, or a list of them, with absolute file names."""
    if isinstance(value, str):
        return _absolute(value, folder)
    if isinstance(value, list | tuple):
        return [_anchored(item, folder) for item in value]
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return value | {"name": _absolute(value["name"], folder)}
    return value


def _absolute(name: str, folder: Path) -> str:
    if not name or name.startswith((EMBEDDED, HUB)):
        return name
    return os.path.normpath(folder.resolve() / expanded(name))


def _apply(values: dict[str, Any], overrides: Iterable[str]) -> None:
    for override in overrides:
        address, equals, text = override.partition("=")
        parts = address.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise RecipeError(
                f"{override!r} is not an override. Write section.key=value, such as lora.r=32."
            )
        changed: dict[str, Any] = {}
        inner: dict[str, Any] = changed
        target = values
        for part in parts[:-1]:
            if not isinstance(target.setdefault(part, {}), dict):
                raise RecipeError(f"{override!r}: {part!r} is a value, not a section.")
            target = target[part]
            inner = inner.setdefault(part, {})
        inner[parts[-1]] = document.scalar(text) if text else None
        _anchor(changed, Path.cwd())
        target[parts[-1]] = inner[parts[-1]]


def _validate(
    values: Mapping[str, Any],
    origin: str,
    lines: Mapping[tuple[str, ...], int],
    overrides: Sequence[str],
) -> Recipe:
    overridden = {tuple(o.partition("=")[0].strip().split(".")) for o in overrides}

    def place(address: document.Address) -> str:
        """Where it was written: the command line, or the file and its line."""
        ours = any(address[:n] in overridden for n in range(1, len(address) + 1))
        if ours or (
            address and address[:1] not in lines and any(o[:1] == address[:1] for o in overridden)
        ):
            return "command line"
        written = (lines[address[:n]] for n in range(len(address), 0, -1) if address[:n] in lines)
        line = next(written, 0)
        return f"{origin}:{line}" if line else origin

    _refuse_secrets(values, place)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        seen: dict[str, None] = {}
        problems = error.errors()
        inside = {problem["loc"][:n] for problem in problems for n in range(len(problem["loc"]))}
        for problem in problems:
            if problem["type"] == "too_short" and problem["loc"] in inside:
                continue  # pydantic counts only the items that are valid
            # An entry of data.train is a name or a mapping: pydantic complains of either.
            if problem["loc"][-1:] in ((_NAME,), ("Source",)) and isinstance(
                problem["input"], dict
            ) != ("Source" in problem["loc"]):
                continue
            last = problem["loc"][-1:]
            if set(last) & set(_LAYERS) and (last == ("bool",)) == (type(problem["input"]) is int):
                continue
            kinds = (_NAME, "Source", *_LAYERS)
            address = tuple(str(part) for part in problem["loc"] if part not in kinds)
            if problem["type"] == "value_error":
                address = _blamed(str(problem["ctx"]["error"]), lines, overridden) or address
            seen[f"{place(address)}: {_sentence(problem, address)}"] = None
        raise RecipeError("\n".join(seen)) from None
    return recipe


def _refuse_secrets(values: Mapping[str, Any], place: Callable[[document.Address], str]) -> None:
    """A recipe is copied into every run and shared; it must not carry keys.

    Looked for before anything else is, because other messages repeat what they found.
    """
    problems = [
        f"{place(address)}: {'.'.join(address)!r} looks like a secret. Recipes are copied into every "
        "run; take it out and put tokens in the environment (HF_TOKEN, WANDB_API_KEY)."
        for address in redact.find(values)
    ]
    if problems:
        raise RecipeError("\n".join(problems))


def _blamed(
    said: str, lines: Mapping[document.Address, int], overridden: Collection[document.Address]
) -> document.Address:
    """Which of the settings that a check names was written: on the command line, or else in the file."""
    named = [tuple(name.split(".")) for name in re.findall(r"\b[a-z]+(?:\.[a-z]\w*)+", said)]
    return next((n for n in named if n in overridden), next((n for n in named if n in lines), ()))


def _sentence(problem: Any, address: tuple[str, ...]) -> str:
    """One pydantic error as what was asked, what was found and what to do."""
    name, kind = ".".join(address), problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key {name!r}{_did_you_mean(address)}"
    if kind == "missing":
        what = _field_help(address)
        return f"{name!r} is missing.{' ' + what if what else ''}"
    found = problem["input"]
    shown = f"{found!r}" if not isinstance(found, str) else f"the text {found!r}"
    if kind == "value_error":
        return str(problem["ctx"]["error"]) + "."
    wants = {
        "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
        "string_type": "text", "dict_type": "a mapping", "tuple_type": "a list",
        "model_type": "a section of keys", "model_attributes_type": "a section of keys",
        "string_pattern_mismatch": "letters, digits, . _ and -, not beginning with a dot",
    }  # fmt: skip
    if problem["loc"][-1:] == ("bool",):
        wants["bool_type"] = "true, false or a number of layers"
    expected = wants.get(kind) or re.sub(r"^[A-Z]\w+ should (be )?", "", problem["msg"])
    expected = expected.replace(" after validation, not 0", "")
    must = "must" if expected.startswith("have ") else "must be"
    return f"{name!r} {must} {expected}; found {shown}."


def _did_you_mean(address: tuple[str, ...]) -> str:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    if len(address) == 1:
        near = _homes(address[0]) or difflib.get_close_matches(address[0], sections, n=1)
        if near:
            return f" - did you mean {near[0]!r}?"
        return f". Sections are {', '.join(sections)}."
    section = sections[address[0]]
    assert isinstance(section, type) and issubclass(section, BaseModel)
    if address[:2] == ("data", "train"):
        section = Source
    key = address[-1]
    synonym = SYNONYMS.get(key)
    if synonym in section.model_fields:
        return f" - did you mean {synonym!r}?"
    near = difflib.get_close_matches(key, section.model_fields, n=1)
    if near:
        return f" - did you mean {near[0]!r}?"
    homes = _homes(key) or _homes(synonym or "")
    if homes:
        return f" - did you mean {homes[0]!r}?"
    if address[0] == "train":
        return f". For other settings of TRL write train.sft_config.{key}."
    return f". Keys of {'.'.join(address[:-1])!r} are {', '.join(section.model_fields)}."


def _homes(key: str) -> list[str]:
    return [
        f"{name}.{known}"
        for name, field in Recipe.model_fields.items()
        for known in getattr(field.annotation, "model_fields", {})
        if known in (key, SYNONYMS.get(key))
    ]


def _field_help(address: tuple[str, ...]) -> str:
    annotation: Any = Recipe
    text = ""
    for part in address:
        field = getattr(annotation, "model_fields", {}).get(part)
        if field is None:
            return ""
        annotation, text = field.annotation, field.description or ""
    return text


def _require_files(recipe: Recipe, origin: str, *, with_data: bool) -> None:
    """Refuse a recipe whose local files are not there, before anything is started."""
    wanted: list[tuple[str, str | None]] = []
    if with_data:
        wanted += [("data.train", s.name) for s in recipe.data.sources]
        wanted.append(("data.held_out", recipe.data.held_out))
    wanted.append(("data.chat_template", recipe.data.chat_template))
    missing = []
    for key, name in wanted:
        if name is None or name.startswith(HUB) or is_file(local_path(name)):
            continue
        if is_dir(local_path(name)):
            advice = (
                "Name a Jinja file"
                if key == "data.chat_template"
                else f"Name the files in it, such as {shown(local_path(name) / '*.jsonl')}"
            )
            missing.append(f"{origin}: {key} names {name!r}, which is a folder. {advice}.")
        elif sources.is_pattern(name) and key != "data.chat_template":
            try:
                sources.expand(local_path(name))
            except DataError as error:
                missing.append(f"{origin}: {key}: {error}")
        else:
            missing.append(
                f"{origin}: {key} names {name!r}, which is not there.{_nearby(local_path(name))}"
            )
    name = recipe.model.name
    if is_local(name) and not is_there(local_path(name)):
        what = "there is embedded:base" if name.startswith(EMBEDDED) else "no such folder"
        missing.append(f"{origin}: model.name is {name!r}, which is not there: {what}.")
    if missing:
        raise RecipeError("\n".join(missing))


def _nearby(path: Path) -> str:
    if not is_dir(path.parent):
        return f" The folder {shown(path.parent)} does not exist either."
    try:
        beside = [p.name for p in path.parent.iterdir()]
    except OSError:  # a folder that is closed to us
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.75)
    return f" Did you mean {near[0]!r}?" if near else ""
