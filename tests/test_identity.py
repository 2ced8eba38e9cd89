"""A resumed run is the run it was: what decides what is learned is refused, the rest is told."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_resume import write_rows

from qlora import identity, recording, resuming, rundir, sft, statefile, store, trainer
from qlora.errors import CheckpointError, RecipeError
from qlora.recipe import recipe_from
from qlora.rundir import Run
from qlora.settings import Recipe

pytestmark = pytest.mark.usefixtures("one_thread", "light", "no_waiting_for_the_disk")


@dataclass
class Bench:
    """A run of two steps that was killed in the second one, and what it was made of."""

    folder: Path
    values: dict[str, dict[str, Any]]
    stopped: Run

    def recipe(self, **changes: Any) -> Recipe:
        values = {section: dict(keys) for section, keys in self.values.items()}
        for address, value in changes.items():
            section, _, key = address.replace(".", "__").partition("__")
            values[section][key] = value
        return recipe_from(values)

    def again(self, place: Path) -> Run:
        """A copy of the stopped run, for one resume."""
        run = Run(place / "tiny" / "20260101-120000")
        shutil.copytree(self.stopped.dir, run.dir)
        return run


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, one_thread: None, light: None
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(tiny)},
        "quant": {},
        "data": {
            "train": str(write_rows(folder / "rows.jsonl", ROWS[16:])), "max_length": 128,
            "held_out_fraction": 0.1, "max_lost_fraction": 0.9,
        },
        "lora": {"r": 4},
        "train": {
            "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 1, "warmup_steps": 0,
            "activation_checkpointing": True, "eval_steps": 2,
        },
        "run": {"dir": str(folder / "runs"), "name": "tiny"},
        "eval": {},
    }  # fmt: skip
    bench = Bench(folder, values, Run(folder / "stopped" / "tiny" / "20260101-120000"))
    with pytest.MonkeyPatch.context() as patch, copied_in_step(patch, 1, bench.stopped):
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        train(bench.recipe())
    yield bench


def train(recipe: Recipe, **settings: Any) -> tuple[Run, str]:
    """A run to its end, and what it said."""
    said = io.StringIO()
    run = trainer.train(recipe, console=Console(file=said, width=1000), **settings)
    return run, said.getvalue()


def refusal(recipe: Recipe, run: Run, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as refused:
        train(recipe, resume=run.dir, **settings)
    return str(refused.value)


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def copied_in_step(monkeypatch: pytest.MonkeyPatch, done: int, copy: Run) -> Iterator[None]:
    """In this block a run is copied as it is when so many steps are done and the next one begins."""
    step = sft.RowTrainer.training_step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == done and not copy.dir.exists():
            shutil.copytree(Path(self.args.output_dir).parent, copy.dir)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "training_step", stepped)
        yield


def newest_identity(run: Run) -> dict[str, Any]:
    return rundir.read_json(store.newest(run.checkpoints) / "identity.json")


# --- every field of the recipe

# Each field, another value of it, and what refuses a resume with it: the field itself, what follows from it
# (rows, template, ...), or nothing: then it is told, and the run goes on. {..} is filled in by the test.
FIELDS: list[tuple[str, Any, tuple[str, ...]]] = [
    # The base is known by its bytes, wherever it lies and whatever it is called.
    ("model.name", "{other base}", ("base",)),
    ("model.name", "{moved base}", ()),
    ("model.revision", "v2", ()),
    ("model.attn_implementation", "eager", ()),  # the same sums in another order
    ("quant.quant_type", "none", ("quant.quant_type",)),
    ("quant.double_quant", False, ("quant.double_quant",)),
    ("quant.compute_dtype", "bfloat16", ("compute_dtype",)),
    ("quant.compute_dtype", "float32", ()),  # what auto is here
    ("quant.cache", False, ()),
    ("quant.head", "8bit", ("quant.head",)),
    ("lora.r", 8, ("lora.r",)),
    ("lora.lora_alpha", 16.0, ("lora.lora_alpha",)),
    ("lora.lora_dropout", 0.1, ("lora.lora_dropout",)),
    ("lora.target_modules", ["q_proj"], ("lora.target_modules",)),
    ("lora.use_rslora", True, ("lora.use_rslora",)),
    ("lora.train_new_tokens", True, ("lora.train_new_tokens",)),
    # Of the data it matters which rows train, as tokens and labels, in which order.
    ("data.train", "{edited rows}", ("rows",)),
    ("data.train", "{moved rows}", ()),
    ("data.split", "validation", ()),
    ("data.revision", "v2", ()),
    ("data.held_out", "{held out}", ("rows",)),  # then no row is taken out of data.train
    ("data.held_out_fraction", 0.3, ("rows",)),
    ("data.format", "prompt_completion", ()),  # what auto found
    ("data.columns", {"prompt": "completion", "completion": "prompt"}, ("rows",)),
    ("data.columns", {"prompt": "prompt"}, ()),
    ("data.on_bad_row", "skip", ()),
    ("data.rendering", "plain", ("rows",)),
    ("data.rendering", "chat", ()),  # what auto was here
    ("data.chat_template", "{template}", ("rows", "template")),
    ("data.loss_on", "all", ("rows",)),
    ("data.max_length", 64, ()),  # no row is so long
    ("data.max_length", 32, ("rows",)),  # some are of 33 tokens
    ("data.over_length", "truncate", ()),
    ("data.max_lost_fraction", 0.01, ()),
    ("data.packing", False, ()),
    ("data.cache", False, ()),
    ("train.num_train_epochs", 2.0, ("train.num_train_epochs",)),
    ("train.max_steps", 3, ("train.max_steps",)),
    # Rows of a step; how they are passed through the model is another matter.
    ("train.per_device_train_batch_size", 2, ("rows_per_step",)),
    ("train.gradient_accumulation_steps", 2, ("rows_per_step",)),
    ("train.learning_rate", 1e-3, ("train.learning_rate",)),
    ("train.lr_scheduler_type", "cosine", ("train.lr_scheduler_type",)),
    ("train.warmup_steps", 1.0, ("train.warmup_steps",)),
    ("train.weight_decay", 0.1, ("train.weight_decay",)),
    ("train.max_grad_norm", 1.0, ("train.max_grad_norm",)),
    ("train.optim", "adafactor", ("optimizer",)),
    ("train.optim", "adamw_torch", ()),  # what auto is here
    ("train.activation_checkpointing", False, ()),
    ("train.kernels", "off", ()),
    ("train.levels", [0, 2, 0, 0, 0], ()),
    ("train.activation_offload", True, ()),
    ("train.mlp_tile", 64, ()),
    ("train.embedding_offload", True, ()),
    ("train.fit", "auto", ()),
    ("train.rehearse", True, ()),
    ("train.seed", 43, ("train.seed",)),
    ("train.logging_steps", 2, ()),
    ("train.eval_steps", 1, ()),
    ("train.save_steps", 2, ()),
    ("train.save_total_limit", 1, ()),
    ("train.spike_factor", None, ("train.spike_factor",)),  # it decides which steps are taken
    ("train.after_bad_steps", "roll_back", ()),  # what to do when a run has failed
    ("train.oom_retries", 0, ()),
    ("train.sft_config", {"adam_beta2": 0.9}, ("train.sft_config",)),
    ("run.dir", "{another folder}", ()),
    ("run.name", "other", ()),
    ("run.save_every", "90s", ()),
    ("run.mirror", "{another folder}", ()),
    ("run.report_to", "tensorboard", ()),
    ("run.project", "other", ()),
    ("eval.generate", 1, ()),
    ("eval.exact_match", ["answer"], ()),
    ("eval.max_new_tokens", 4, ()),
    ("eval.batch_size", 2, ()),
    ("eval.samples", 1, ()),
]


@pytest.fixture(scope="module")
def things(bench: Bench, tiny: Path) -> dict[str, str]:
    """Files and folders that the table above speaks of."""
    folder = bench.folder
    other = shutil.copytree(tiny, folder / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, :] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    edited = [*ROWS[16:39], {"prompt": "What is 5 plus 4?", "completion": "5 and 4 make 10."}]
    template = folder / "template.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    made = {
        "other base": other,
        "moved base": shutil.copytree(tiny, folder / "moved"),
        "edited rows": write_rows(folder / "edited.jsonl", edited),
        "moved rows": shutil.copy(folder / "rows.jsonl", folder / "elsewhere.jsonl"),
        "held out": write_rows(folder / "held.jsonl", ROWS[:3]),
        "template": template,
        "another folder": folder / "elsewhere",
    }
    return {name: str(path) for name, path in made.items()}


def test_every_field_of_the_recipe_is_in_the_table() -> None:
    fields = {
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key in field.annotation.model_fields
    }
    assert len(fields) == 68
    assert {field for field, _, _ in FIELDS} == fields


@pytest.mark.filterwarnings("ignore:Your .* overlapping tokens:UserWarning")
@pytest.mark.parametrize(
    ("field", "value", "refused"), FIELDS, ids=[f"{f}={shown(v)[:20]}" for f, v, _ in FIELDS]
)
def test_a_changed_field_is_refused_or_told(
    field: str,
    value: Any,
    refused: tuple[str, ...],
    bench: Bench,
    things: dict[str, str],
    tmp_path: Path,
) -> None:
    if isinstance(value, str) and value.startswith("{"):
        value = things[value.strip("{}")]
    recipe = bench.recipe(**{field: value})
    was, now = (identity.fields_of(one)[field] for one in (bench.recipe(), recipe))
    assert was != now
    change = f"{field}: {shown(was)} -> {shown(now)}"
    run = bench.again(tmp_path)
    if refused:
        before = {path: path.read_bytes() for path in run.checkpoints.rglob("*") if path.is_file()}
        said = refusal(recipe, run)
        assert [line.split(":")[0].strip() for line in said.splitlines()[1:-2]] == [*refused]
        assert said.splitlines()[0].startswith(f"{run.dir}: ")
        if refused == (field,):
            assert said.splitlines()[1] == f"  {change}"
        assert said.splitlines()[-2] == (
            f"Go on as it was: qlora train {run.recipe_file} --resume {run.dir}"
        )
        flags = " ".join(f"--allow-change {name}" for name in refused)
        if field in identity.FIXED:
            assert said.splitlines()[-1].startswith(
                "With another shape of adapter no run can go on"
            )
        else:
            assert said.splitlines()[-1] == f"Or with the change, if you mean it: {flags}"
        assert {path: path.read_bytes() for path in before} == before and not run.is_complete
        return
    resumed, said = train(recipe, resume=run.dir)
    assert resumed.dir == run.dir and run.is_complete and run.result["steps"] == 2
    told = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("changed")]
    assert told[0].strip() == change and len(told) == 1
    assert newest_identity(run)["allowed"] == []
    assert newest_identity(run)["recipe"][field] == now


# --- what the recipe alone does not say


def test_an_edited_data_file_is_refused_and_an_equal_one_is_not(
    bench: Bench, tmp_path: Path
) -> None:
    """At its own place: only the rows tell."""
    file = bench.folder / "rows.jsonl"
    whole = file.read_text()
    try:
        file.write_text(whole.replace("5 and 1 make 6", "5 and 1 make 7"))
        said = refusal(bench.recipe(), bench.again(tmp_path / "a"))
        assert "  rows: " in said and "--allow-change rows" in said
        file.write_text("\n".join(reversed(whole.splitlines())) + "\n")  # another order
        assert "  rows: " in refusal(bench.recipe(), bench.again(tmp_path / "b"))
        file.write_text(whole)
        os.utime(file, (1, 1))
        _, said = train(bench.recipe(), resume=bench.again(tmp_path / "c").dir)
        assert "changed" not in said
    finally:
        file.write_text(whole)


def test_another_tokenizer_is_refused_though_no_row_differs(
    bench: Bench, tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "base")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"].append(
        {
            "id": 2047, "content": "<|unused|>", "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
    )  # fmt: skip
    file.write_text(json.dumps(values))
    said = refusal(bench.recipe(model__name=str(folder)), bench.again(tmp_path))
    assert [line.split(":")[0] for line in said.splitlines()[1:-2]] == ["  tokenizer"]


@pytest.mark.parametrize(("batch", "passes"), [(2, 2), (1, 4)])
def test_as_many_rows_a_step_in_other_passes_go_on(
    batch: int, passes: int, bench: Bench, tmp_path: Path
) -> None:
    recipe = bench.recipe(
        train__per_device_train_batch_size=batch, train__gradient_accumulation_steps=passes
    )
    run, said = train(recipe, resume=bench.again(tmp_path).dir)
    assert f"train.per_device_train_batch_size: 4 -> {batch}" in said
    assert f"train.gradient_accumulation_steps: 1 -> {passes}" in said
    assert run.is_complete and newest_identity(run)["rows_per_step"] == 4


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_a_paged_optimizer_is_the_same_one(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers names them apart, and only the place of the state differs."""
    stopped = Run(tmp_path / "copy" / "20260101-120000")
    with copied_in_step(monkeypatch, 1, stopped):
        whole, _ = train(bench.recipe(train__optim="paged_adamw_8bit", lora__r=64))
    recipe = bench.recipe(train__optim="adamw_8bit", lora__r=64)
    run, said = train(recipe, resume=stopped.dir)
    assert "train.optim: paged_adamw_8bit -> adamw_8bit" in said and "optimizer:" not in said
    files = [one.adapter / "adapter_model.safetensors" for one in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


SURROUNDINGS = {
    "card": ("another card", "card: {was} -> another card"),
    "threads": (7, "threads: {was} -> 7"),
    "python": ("3.99", "python: {was} -> 3.99"),
}


@pytest.mark.parametrize("name", [*SURROUNDINGS, "packages"])
def test_other_surroundings_are_told_and_no_more(
    name: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = recording.identity_of

    def elsewhere(*args: Any) -> dict[str, Any]:
        found = of(*args)
        if name == "packages":
            return found | {"packages": found["packages"] | {"torch": "99.0"}}
        return found | {name: SURROUNDINGS[name][0]}

    was = newest_identity(bench.stopped)
    monkeypatch.setattr(recording, "identity_of", elsewhere)
    run, said = train(bench.recipe(), resume=bench.again(tmp_path).dir)
    told = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("changed")]
    if name == "packages":
        assert told == [f"torch: {was['packages']['torch']} -> 99.0"]
    else:
        assert told == [SURROUNDINGS[name][1].format(was=was[name])]
    assert run.is_complete and newest_identity(run)["allowed"] == []


def test_a_checkpoint_says_all_that_its_run_was(bench: Bench) -> None:
    found = newest_identity(bench.stopped)
    assert set(found) == {"recipe", "chosen", "allowed", *identity.DERIVED, *identity.SURROUNDINGS}
    assert found["recipe"] == identity.fields_of(bench.recipe()) and len(found["recipe"]) == 68
    for name in ("rows", "tokenizer", "template", "base"):
        assert len(found[name]) == 64
    assert found["rows_per_step"] == 4 and found["optimizer"] == "adamw_torch"
    assert found["compute_dtype"] == "float32" and {"qlora", "torch"} <= set(found["packages"])


# --- changes that are allowed


@dataclass
class Seen:
    """The optimizer and the rows of a step as it began."""

    groups: list[dict[str, Any]]
    state: int  # tensors that the optimizer holds
    rows: int


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    found: list[Seen] = []
    step = sft.RowTrainer.training_step

    def stepped(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        found.append(Seen(groups, len(self.optimizer.state), sum(map(len, inputs["rows"]))))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "training_step", stepped)
    return found


# Other matrices, or another base, are no change of this run: their weights do not fit, see below.
OTHERS = (
    "lora.r", "lora.target_modules", "quant.quant_type", "quant.double_quant", "quant.head",
)  # fmt: skip
ALLOWED = [field for field, _, refused in FIELDS if refused == (field,) and field not in OTHERS]


@pytest.mark.parametrize("field", ALLOWED)
def test_a_change_that_is_allowed_goes_on_and_stays_on_record(
    field: str, bench: Bench, tmp_path: Path, seen: list[Seen]
) -> None:
    value = next(value for name, value, _ in FIELDS if name == field)
    recipe = bench.recipe(**{field: value})
    was, now = (identity.fields_of(one)[field] for one in (bench.recipe(), recipe))
    run, said = train(recipe, resume=bench.again(tmp_path).dir, allow_change=[field])
    assert f"{field}: {shown(was)} -> {shown(now)}, as allowed" in said
    assert run.is_complete
    assert newest_identity(run)["allowed"] == [{"step": 1, "field": field, "was": was, "now": now}]
    assert seen[0].state > 0  # the optimizer goes on from its state


def test_another_learning_rate_counts_at_once(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(train__learning_rate=3e-3)
    run, _ = train(recipe, resume=bench.again(tmp_path).dir, allow_change=["train.learning_rate"])
    rates = {line["step"]: line["learning_rate"] for line in run.metrics() if "loss" in line}
    assert rates == {1: 1e-2, 2: 3e-3}


def test_another_decay_and_other_betas_are_in_the_optimizers_groups(
    bench: Bench, tmp_path: Path, seen: list[Seen]
) -> None:
    recipe = bench.recipe(train__weight_decay=0.25, train__sft_config={"adam_beta2": 0.5})
    train(
        recipe, resume=bench.again(tmp_path).dir,
        allow_change=["train.weight_decay", "train.sft_config"],
    )  # fmt: skip
    assert 0.25 in {group["weight_decay"] for group in seen[0].groups}
    assert {group["betas"][1] for group in seen[0].groups} == {0.5}


def test_another_schedule_goes_on_from_the_step_where_the_run_is(
    bench: Bench, tmp_path: Path
) -> None:
    recipe = bench.recipe(train__lr_scheduler_type="linear", train__max_steps=5)
    run, _ = train(
        recipe, resume=bench.again(tmp_path).dir,
        allow_change=["train.lr_scheduler_type", "train.max_steps"],
    )  # fmt: skip
    rates = [line["learning_rate"] for line in run.metrics() if "loss" in line]
    assert rates == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3, 2e-3])
    assert run.result["steps"] == 5


def test_fewer_steps_than_were_taken_end_the_run(
    bench: Bench, tmp_path: Path, seen: list[Seen]
) -> None:
    recipe = bench.recipe(train__max_steps=1)
    run, _ = train(recipe, resume=bench.again(tmp_path).dir, allow_change=["train.max_steps"])
    assert run.result["steps"] == 1 and not seen


def test_more_rows_a_step_are_taken_from_the_next_one_on(
    bench: Bench, tmp_path: Path, seen: list[Seen]
) -> None:
    recipe = bench.recipe(train__gradient_accumulation_steps=2)
    run, _ = train(recipe, resume=bench.again(tmp_path).dir, allow_change=["rows_per_step"])
    assert [one.rows for one in seen] == [8]
    (allowed,) = newest_identity(run)["allowed"]
    assert (allowed["field"], allowed["was"], allowed["now"]) == ("rows_per_step", 4, 8)


def test_another_optimizer_begins_without_a_state(
    bench: Bench, tmp_path: Path, seen: list[Seen]
) -> None:
    recipe = bench.recipe(train__optim="adafactor", train__max_steps=4)
    run, said = train(
        recipe, resume=bench.again(tmp_path).dir, allow_change=["optimizer", "train.max_steps"]
    )
    assert "optimizer: adamw_torch -> adafactor, as allowed" in said
    assert seen[0].state == 0 and seen[1].state > 0
    assert newest_identity(run)["optimizer"] == "adafactor"


def test_an_optimizer_that_may_change_and_does_not_keeps_its_state(
    bench: Bench, tmp_path: Path, seen: list[Seen]
) -> None:
    whole, _ = train(bench.recipe(), resume=bench.again(tmp_path / "a").dir)
    seen.clear()
    run, _ = train(
        bench.recipe(), resume=bench.again(tmp_path / "b").dir, allow_change=["optimizer"]
    )
    assert seen[0].state > 0 and newest_identity(run)["allowed"] == []
    files = [one.adapter / "adapter_model.safetensors" for one in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_rows_may_be_learned_on_the_same_way(
    bench: Bench, things: dict[str, str], tmp_path: Path
) -> None:
    recipe = bench.recipe(data__train=things["edited rows"])
    run, said = train(recipe, resume=bench.again(tmp_path).dir, allow_change=["rows"])
    assert "rows: " in said and ", as allowed" in said and run.is_complete
    assert [one["field"] for one in newest_identity(run)["allowed"]] == ["rows"]


def test_another_base_may_be_trained_and_is_measured_anew(
    bench: Bench, things: dict[str, str], tmp_path: Path
) -> None:
    whole, _ = train(bench.recipe(), resume=bench.again(tmp_path / "a").dir)
    recipe = bench.recipe(model__name=things["other base"])
    run, _ = train(recipe, resume=bench.again(tmp_path / "b").dir, allow_change=["base"])
    assert run.result["before"] != whole.result["before"]  # no answer of the base before it


@pytest.mark.parametrize(("field", "value"), [("lora.r", 8), ("lora.target_modules", ["q_proj"])])
def test_what_no_permission_makes_fit_is_refused_whatever_is_allowed(
    field: str, value: Any, bench: Bench, tmp_path: Path
) -> None:
    run = bench.again(tmp_path)
    with pytest.raises(CheckpointError, match=r"no run can go on: start a new one"):
        train(bench.recipe(**{field: value}), resume=run.dir, allow_change=[field])
    train(bench.recipe(), resume=run.dir)  # nothing was lost


def test_the_record_of_a_runs_life_grows(bench: Bench, tmp_path: Path) -> None:
    run = bench.again(tmp_path)
    step = sft.RowTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise ValueError("killed")
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="killed"):
        patch.setattr(sft.RowTrainer, "training_step", dying)
        train(bench.recipe(train__max_steps=3), resume=run.dir, allow_change=["train.max_steps"])
    said = refusal(bench.recipe(), run)  # it is a run of three steps now
    assert "train.max_steps: 3 -> 2" in said
    train(
        bench.recipe(train__max_steps=3, train__learning_rate=1e-3), resume=run.dir,
        allow_change=["train.learning_rate"],
    )  # fmt: skip
    assert newest_identity(run)["allowed"] == [
        {"step": 1, "field": "train.max_steps", "was": 2, "now": 3},
        {"step": 2, "field": "train.learning_rate", "was": 1e-2, "now": 1e-3},
    ]


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("train.learning_rat", "train.learning_rate"), ("learning_rate", "train.learning_rate"),
        ("rowz", "rows"), ("optimiser", "optimizer"), ("lora.rank", "lora.r"), ("", ""),
        ("qqq", ""), ("packages", ""),
    ],
)  # fmt: skip
def test_a_field_that_does_not_exist_is_refused_with_the_nearest(field: str, near: str) -> None:
    with pytest.raises(RecipeError) as refused:
        identity.require_known(["rows", field])
    hint = f" Did you mean {near!r}?" if near else ""
    assert str(refused.value).startswith(f"--allow-change {field}: there is no such field.")
    assert hint in str(refused.value)


def test_an_unknown_field_is_refused_before_anything_is_touched(
    bench: Bench, tmp_path: Path
) -> None:
    run = bench.again(tmp_path)
    (run.checkpoints / ".checkpoint-9.elsewhere.1.part").mkdir()
    with pytest.raises(RecipeError, match="no such field"):
        train(bench.recipe(), resume=run.dir, allow_change=["rowz"])
    assert (run.checkpoints / ".checkpoint-9.elsewhere.1.part").is_dir()


# --- settings chosen for the card


def test_what_auto_decides_is_decided_anew_when_the_recipe_asks_otherwise(
    bench: Bench, tmp_path: Path, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a step as they are written now, not as they were when the settings were chosen."""
    auto = {"train__fit": "auto", "train__max_steps": 3}
    stopped = Run(tmp_path / "copy" / "20260101-120000")
    with copied_in_step(monkeypatch, 1, stopped):
        train(bench.recipe(**auto))
    more = bench.recipe(**auto, train__gradient_accumulation_steps=2)
    assert "rows_per_step: 4 -> 8" in refusal(more, stopped)
    other = bench.recipe(**auto, train__optim="adafactor")
    assert "optimizer: adamw_torch -> adafactor" in refusal(other, stopped)
    seen.clear()
    train(more, resume=stopped.dir, allow_change=["rows_per_step"])
    assert seen[0].rows == 8


# --- checkpoints of other versions


def spoil(run: Run, name: str, change: Callable[[dict[str, Any]], Any] | None) -> None:
    """Change a JSON file of the newest checkpoint, or remove it, and seal the checkpoint again."""
    checkpoint = store.newest(run.checkpoints)
    if change is None:
        (checkpoint / name).unlink()
    else:
        values = rundir.read_json(checkpoint / name)
        change(values)
        rundir.write_json(checkpoint / name, values)
    rundir.seal(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("identity.json", None, "does not say of which run it is .* another version of qlora wrote it"),
        ("state.json", lambda v: v.update(format=2), "its format is 2; this version of qlora reads 1"),
        ("state.json", lambda v: v.pop("format"), "its format is None; this version of qlora reads 1"),
        ("state.json", None, "state.json: cannot be read"),
        ("identity.json", lambda v: v["recipe"].pop("train.seed"), "train.seed: null -> 42"),
        ("identity.json", lambda v: v["recipe"].update({"train.new": 1}), "train.new: 1 -> null"),
        ("identity.json", lambda v: v.pop("rows"), "rows: null -> "),
        ("identity.json", lambda v: v.pop("recipe"), "lora.r: null -> 4"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_version_is_refused_and_left_as_it_is(
    name: str, change: Any, said: str, bench: Bench, tmp_path: Path
) -> None:
    run = bench.again(tmp_path)
    spoil(run, name, change)
    metrics = (run.dir / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=rf"(?s){said}"):
        train(bench.recipe(), resume=run.dir)
    assert store.newest(run.checkpoints) is not None
    assert (run.dir / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("part", ["optimizer", "schedule", "observers", "random", "scaler"])
def test_a_state_that_lacks_a_part_is_refused(
    part: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.again(tmp_path)
    checkpoint = store.newest(run.checkpoints)
    tree = statefile.read(checkpoint)
    del tree[part]
    statefile.write(checkpoint, tree)
    rundir.seal(checkpoint)
    with pytest.raises(CheckpointError, match=rf"it holds no state of {part}: another version"):
        train(bench.recipe(), resume=run.dir)


# --- which run goes on


def place(bench: Bench, root: Path, start: str, name: str = "tiny") -> Run:
    run = Run(root / name / start)
    shutil.copytree(bench.stopped.dir, run.dir)
    return run


def test_resume_alone_takes_the_newest_run_of_the_recipe_that_can_go_on(
    bench: Bench, tmp_path: Path
) -> None:
    recipe = bench.recipe(run__dir=str(tmp_path))
    first = place(bench, tmp_path, "20260101-120000")
    second = place(bench, tmp_path, "20260102-120000")
    done = place(bench, tmp_path, "20260103-120000")
    rundir.write_json(done.dir / "result.json", {})
    bare = place(bench, tmp_path, "20260104-120000")
    shutil.rmtree(bare.checkpoints)
    torn = place(bench, tmp_path, "20260105-120000")
    (store.newest(torn.checkpoints) / "state.safetensors").write_bytes(b"torn")
    unreadable = place(bench, tmp_path, "20260106-120000")
    unreadable.recipe_file.write_text("model: {nme: x}\n")
    place(bench, tmp_path, "20260109-120000", "other")  # of another recipe
    run, _ = train(recipe, resume=resuming.NEWEST)
    assert run.dir.resolve() == second.dir.resolve()
    run, _ = train(recipe, resume=resuming.NEWEST)
    assert run.dir.resolve() == first.dir.resolve()
    with pytest.raises(CheckpointError) as none:
        train(recipe, resume=resuming.NEWEST)
    said = str(none.value)
    for path, why in (
        (done, "has finished"), (bare, "has no whole checkpoint"), (torn, "has no whole checkpoint"),
        (second, "has finished"), (unreadable, "cannot be read: "),
    ):  # fmt: skip
        assert f"{path.dir} {why}" in said, said
    assert "no run to resume" in said and said.endswith("found by `--resume RUN`.")


def test_two_recipes_that_started_in_one_second_are_two_runs(bench: Bench, tmp_path: Path) -> None:
    done = place(bench, tmp_path, "20260101-120000", "a")
    rundir.write_json(done.dir / "result.json", {})
    going = place(bench, tmp_path, "20260101-120000", "b")
    for _ in range(2):
        assert resuming.newest([tmp_path]).dir == going.dir.resolve()
        done, going = going, done
        (going.dir / "result.json").unlink()
        rundir.write_json(done.dir / "result.json", {})


def test_where_no_run_ever_was_there_is_none_to_resume(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"\(not there\): no run to resume, nor any other\.\nStart"
    ):
        train(bench.recipe(run__dir=str(tmp_path / "runs")), resume=resuming.NEWEST)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_another_process_trains_is_not_resumed(bench: Bench, tmp_path: Path) -> None:
    run = bench.again(tmp_path)
    (run.checkpoints / ".checkpoint-2.elsewhere.1.part").mkdir()
    with rundir.locked(run):
        said = refusal(bench.recipe(), run)
        assert said.startswith(f"{run.dir}: another process trains this run.")
        assert (run.checkpoints / ".checkpoint-2.elsewhere.1.part").is_dir()  # it may be its
    train(bench.recipe(), resume=run.dir)


def test_a_training_holds_its_run_until_it_ends(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.again(tmp_path)
    step = sft.RowTrainer.training_step
    refused = []

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        refused.append(refusal(bench.recipe(), run))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "training_step", stepped)
    train(bench.recipe(), resume=run.dir)
    assert len(refused) == 1 and "another process trains this run" in refused[0]
    assert run.is_complete
