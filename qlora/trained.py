"""What was trained, opened again: a run's adapter with its base, or a model that was merged.

Chat, evaluation, merging and serving all begin here, so that each of them asks with the tokens of
training, on the base that was trained on, or says which of the two is another one now.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from qlora import adapter, hardware, loader, records, rundir, store, tokenizer
from qlora.cards import Card
from qlora.errors import CheckpointError, QLoRAError
from qlora.loader import BaseConfig
from qlora.places import expanded
from qlora.preparation import vocabulary_digest
from qlora.recipe import is_hub_id, is_local, local_path, recorded
from qlora.records import Record, Turn
from qlora.rendering import Renderer
from qlora.rundir import Run
from qlora.settings import Data, Eval, Model, Quant, Recipe

MERGED = (
    "merge.json"  # in the folder of a merged model, written last: what it is and how near it came
)
LONGEST = 4096  # tokens of a row, for a model that says nothing of its rows
UNKNOWN = "-"  # in the place of data files that a model does not name
QuantType = Literal["nf4", "none"]


@dataclass(frozen=True)
class Trained:
    """A run, or a model's folder, as far as it can be known before weights are read."""

    name: str  # as people call it: quickstart/20260101-120000
    run: Run | None  # None: a model without an adapter
    recipe: Recipe
    card: Card
    config: BaseConfig
    renderer: Renderer  # asks with the tokens of training
    form: str  # the format of the rows: "alpaca" puts its words around a plain question
    source: Path | None  # the adapter's folder: finished, or of the newest whole checkpoint

    @property
    def tok(self) -> Any:
        return self.renderer.tok

    @property
    def slot(self) -> str:
        """The name as peft can use it for an adapter: torch allows no dot in it."""
        return self.name.replace(".", "%2E")

    def record(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Record:
        """The conversation so far as a row whose last turn is still to be said by the assistant."""
        question = turns[-1].content
        plain = records.alpaca_prompt(question) if self.form == "alpaca" else question
        return Record((*turns, Turn("assistant", "")), plain_prompt=plain, tools=tuple(tools))

    def prompt_ids(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """The tokens that ask for the next answer: those of training, up to where it begins.

        Raises:
            DataError: The chat template refuses these turns.
        """
        return self.renderer.prompt_ids(self.record(turns, tools))


def find(where: str | Path, *, quant: QuantType | None = None, finished: bool = False) -> Trained:
    """What lies at a path: a run (or the newest below it), one of its checkpoints, or a model.

    Args:
        where: A run directory, a folder above runs, an adapter or checkpoint within a run, the folder of a
            merged or any other model, or a hub id.
        quant: Of a model without an adapter: loaded as it is (None, "none") or packed as NF4. A run's base
            is always as its recipe says.
        finished: Refuse a run that has not ended.

    Raises:
        CheckpointError: Nothing there, nothing in it to load, or the run is of another tokenizer.
        ModelError: Its base, or the model, cannot be read.
    """
    path = expanded(where)
    if (path / "config.json").is_file() and not (path / "recipe.yaml").is_file():
        return _model(str(path), quant)
    if not path.exists() and is_hub_id(str(where)):
        return _model(str(where), quant)
    run, source = _run_and_source(path, finished)
    recipe = recorded(run.recipe_file)
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe, config.commit)
    ledger = rundir.read_json(run.dir / "data.json")
    try:
        rendering, form = ledger["rendering"], ledger["sources"][0]["format"]
    except (LookupError, TypeError):
        raise CheckpointError(
            f"{run.dir / 'data.json'}: does not say how the run's rows were rendered; it is damaged or of "
            "another version of qlora. Copy the run again, or train again."
        ) from None
    if ledger.get("vocabulary", "") not in ("", vocabulary_digest(tok)):
        raise CheckpointError(
            f"{run.dir}: the run was trained with another tokenizer than {recipe.model.name!r} has now: "
            f"its {len(tok):,} tokens are not those of the run.\n  {_other_base(run, recipe)}"
        )
    renderer = Renderer(tok, chat=rendering == "chat", loss_on=recipe.data.loss_on)
    place = run.dir.resolve()
    found = Trained(
        f"{place.parent.name}/{place.name}", run, recipe, hardware.card(), config, renderer, form,
        source,
    )  # fmt: skip
    _require_same_config(found, run)
    return found


def load_base(found: Trained, *, bars: bool = False) -> Any:
    """The base of a run without its adapter, or the model, in eval mode.

    Raises:
        CheckpointError: The base is not the one that the run was trained on.
        ModelError, HardwareError: As :func:`qlora.loader.load_base`.
    """
    model = loader.load_base(found.recipe, found.card, found.config, bars=bars).model
    if found.run is not None:
        _require_same_weights(found, found.run, model)
    return model


def load(found: Trained, *, bars: bool = False, name: str = "default") -> Any:
    """The model that answers: the base with the run's adapter on it, or the model as it is.

    Args:
        found: What to load.
        bars: Whether transformers may show its bar.
        name: What peft calls the adapter.

    Raises:
        CheckpointError: The adapter is damaged, or of another base; says what differs.
    """
    model = load_base(found, bars=bars)
    return model if found.source is None else put_on(model, found, name)


def put_on(model: Any, found: Trained, name: str) -> Any:
    """A run's adapter on its base; on a base that has adapters already, beside them.

    Raises:
        CheckpointError: As :func:`load`.
    """
    assert found.source is not None and found.run is not None
    try:
        return adapter.load(model, found.source, name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n  {_other_base(found.run, found.recipe)}") from None


def require_one_base(first: Trained, other: Trained) -> None:
    """Return in silence if two runs' adapters can live on one loaded base.

    Raises:
        CheckpointError: They cannot; names the first setting that differs.
    """

    def base(one: Trained) -> dict[str, Any]:
        settings = {
            "model.name": one.recipe.model.name,
            "model.revision": one.recipe.model.revision,
        }
        settings |= {
            f"quant.{k}": v for k, v in one.recipe.quant.model_dump().items() if k != "cache"
        }
        return settings | {"commit": one.config.commit}

    ours, theirs = base(first), base(other)
    for key, value in ours.items():
        if theirs[key] != value:
            raise CheckpointError(
                f"{first.name} and {other.name} were not trained on one base: {key} is {value!r} in the "
                f"first and {theirs[key]!r} in the second. Name runs of one base."
            )
    (then, digest), (again, other_digest) = (_recorded_base(one.run) for one in (first, other))
    if then is not None and then == again and digest != other_digest:
        raise CheckpointError(
            f"{first.name} and {other.name} were not trained on one base: {first.recipe.model.name!r} had "
            "other weights when the second was trained. Name runs of one base."
        )


def knows_data(found: Trained) -> bool:
    """Whether it is known what files the model was trained on; they may be gone by now."""
    return all(source.name != UNKNOWN for source in found.recipe.data.sources)


def require_same_weights(other: Trained, model: Any) -> None:
    """Return in silence if a loaded base is the one that another run was trained on, too.

    Raises:
        CheckpointError: It has other weights.
    """
    if other.run is not None:
        _require_same_weights(other, other.run, model)


def _model(where: str, quant: QuantType | None) -> Trained:
    """A model without an adapter; one that `qlora merge` wrote says itself how it was trained."""
    name = str(Path(where).resolve()) if Path(where).is_dir() else where
    told: dict[str, Any] = {}
    if (Path(where) / MERGED).is_file():
        told = rundir.read_json(Path(where) / MERGED)
    try:
        data = Data.model_validate(told["data"]) if told else Data(train=(UNKNOWN,), max_length=8)
        chat, form = (told["rendering"] == "chat", told["form"]) if told else (None, "")
        more = {"eval": Eval.model_validate(told["eval"])} if "eval" in told else {}
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{Path(where) / MERGED}: is damaged or of another version of qlora. Merge again."
        ) from None
    beside = Path(where).parent / "recipe.yaml"
    if told and beside.is_file():  # it lies in its run, which knows where its data was
        data = recorded(beside).data
    recipe = Recipe(
        model=Model(name=name), quant=Quant(quant_type=quant or "none"), data=data, **more
    )
    config = loader.read_config(recipe)
    if not told:  # as long as it can
        known = getattr(config.config.get_text_config(), "max_position_embeddings", None)
        data = data.model_copy(update={"max_length": min(known or LONGEST, LONGEST)})
        recipe = recipe.model_copy(update={"data": data})
    if config.is_prequantized:
        recipe = recipe.model_copy(update={"quant": Quant(quant_type="nf4")})
    tok, _ = tokenizer.load(recipe, config.commit)
    chat = bool(tok.chat_template) if chat is None else chat
    renderer = Renderer(tok, chat=chat, loss_on=recipe.data.loss_on)
    shown = Path(where).name if Path(where).is_dir() else where
    return Trained(shown, None, recipe, hardware.card(), config, renderer, form, None)


def _run_and_source(path: Path, finished: bool) -> tuple[Run, Path]:
    """The run at a path and which of its adapters is meant."""
    if (path / "adapter_config.json").is_file():
        path = path.resolve()
        run = Run(path.parent if path.parent.name != "checkpoints" else path.parent.parent)
        if not run.recipe_file.is_file():
            raise CheckpointError(
                f"{path}: an adapter that lies in no run of qlora, so how it was trained is not known. "
                "Name its run."
            )
        if path.parent.name == "checkpoints" and (defect := rundir.defect(path)):
            raise CheckpointError(f"{path}: {defect}. Name another checkpoint, or the run.")
        if finished and path != run.adapter.resolve():
            raise CheckpointError(f"{path}: a checkpoint; name a run that has finished.")
    else:
        run = rundir.open_run(path, of_one_name=finished)
        if run.is_complete:
            return run, run.adapter
        newest = store.newest(run.checkpoints)
        if newest is None:
            raise CheckpointError(
                f"{run.dir}: the run has no finished adapter and no whole checkpoint."
            )
        path = newest
    if finished and not run.is_complete:
        raise CheckpointError(
            f"{run.dir}: the run has not finished: there is no result.json. Finish it with "
            f"`qlora train {os.path.relpath(run.recipe_file)} --resume {os.path.relpath(run.dir)}`."
        )
    return run, path


def _require_same_config(found: Trained, run: Run) -> None:
    """Refuse a base whose configuration is not that of the run's, naming what differs."""
    was = _environment(run).get("base", {})
    shape = loader.shape_facts(found.config)
    now = shape | {"commit": found.config.commit}
    for key, value in now.items():
        if was.get(key) is not None and was[key] != value:
            raise CheckpointError(
                f"{run.dir}: the run's base has {key} {was[key]!r}, and {found.recipe.model.name!r} has "
                f"{value!r} now.\n  {_other_base(run, found.recipe)}"
            )


def _require_same_weights(found: Trained, run: Run, model: Any) -> None:
    """Refuse a base of the same shape with other weights, where equal ones would be equal bit by bit."""
    then, digest = _recorded_base(run)
    dtype = str(model.dtype).removeprefix("torch.")
    if then != (found.card.kind, dtype, version("bitsandbytes")):
        return
    if adapter.base_digest(model) != digest:
        raise CheckpointError(
            f"{run.dir}: {found.recipe.model.name!r} has the shape of the run's base, but other "
            f"weights.\n  {_other_base(run, found.recipe)}"
        )


def _recorded_base(run: Run | None) -> tuple[tuple[str, str, str] | None, str]:
    """What decides the digest of a run's base beside its weights, and that digest; None where untold."""
    if run is None:
        return None, ""
    environment = _environment(run)
    try:
        digest = rundir.read_json(run.dir / "before.json")["of"]["base"]
        then = (
            environment["card"]["kind"], environment["base"]["compute_dtype"],
            environment["packages"]["bitsandbytes"],
        )  # fmt: skip
    except (QLoRAError, LookupError, TypeError):  # a run of an older version
        return None, ""
    return then, digest


def _environment(run: Run) -> dict[str, Any]:
    try:
        return rundir.read_json(run.dir / "environment.json")
    except CheckpointError:
        return {}


def _other_base(run: Run, recipe: Recipe) -> str:
    where = local_path(recipe.model.name) if is_local(recipe.model.name) else recipe.model.name
    return (
        f"model.name in {run.recipe_file} is {str(where)!r}. If another model lies there by now, "
        "name the one that the run was trained on; else train again."
    )
