"""A run that was stopped and resumed is, bit for bit, the one that was not.

What is stopped is a copy of the run directory as it was in the middle of a step: what a process that was
killed in that moment leaves. The undisturbed run goes on beside it and is what the resumed one is held to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROWS, save_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from qlora import adapter, keeping, prefetch, rundir, sft, statefile, store, trainer
from qlora.errors import CheckpointError, Interrupted
from qlora.rundir import Run
from qlora.settings import Recipe

pytestmark = [
    pytest.mark.usefixtures("one_thread", "light", "no_waiting_for_the_disk"),
    # bitsandbytes 0.50 pages nothing on a CPU and says so, once a process.
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

STEPS = 11  # the last one in the middle of an epoch
EPOCH = 6  # steps in an epoch, the last of them of three rows
# Of measuring time and memory, which no two runs have in common.
MEASURED = {
    "time", "tokens_per_second", "data_wait", "memory_bytes", "peak_memory_bytes", "peak_step",
    "peak_tokens", "memory", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
    "eval_model_preparation_time",
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of this module: 23 rows that train and 3 that do not."""
    folder = tmp_path_factory.mktemp("bench")
    write_rows(folder / "rows.jsonl", ROWS[:23])
    write_rows(folder / "held.jsonl", ROWS[23:26])
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write(bench: Path, make_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A recipe of eleven steps, six an epoch, a checkpoint every three."""

    def written(**changes: Any) -> Recipe:
        return make_recipe(
            **{
                "data__train": str(bench / "rows.jsonl"), "data__held_out": str(bench / "held.jsonl"),
                "data__max_length": 64, "train__max_steps": STEPS, "train__save_steps": 3,
                "train__logging_steps": 4, "train__save_total_limit": 1,
            }
            | changes
        )  # fmt: skip

    return written


@dataclass
class Step:
    """One optimizer step as the trainer saw it begin."""

    rows: list[list[int]]  # numbers, by micro-batch
    random: bytes
    dtypes: set[torch.dtype]
    weights: float  # a sum over all that train


@dataclass
class Watch:
    """What happened in a run, and copies of its directory at some moments of it."""

    folder: Path
    moments: dict[tuple[int, int], str] = field(default_factory=dict)  # (step, pass): name
    steps: dict[int, Step] = field(default_factory=dict)
    passes: int = 0  # of the present step
    threads: set[bool] = field(default_factory=set)  # whether batches are prepared ahead

    def copy(self, name: str) -> Run:
        """The run as it was at a moment, under a name that a run may have."""
        return Run(self.folder / name / "20260101-120000")


@contextmanager
def watched(
    monkeypatch: pytest.MonkeyPatch, folder: Path, moments: dict[tuple[int, int], str] | None = None
) -> Iterator[Watch]:
    """Follow the run in this block, and copy its directory before the given passes of given steps."""
    watch = Watch(folder, moments or {})
    step, loss = sft.RowTrainer.training_step, sft.RowTrainer.compute_loss

    def stepped(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        watch.passes = 0
        watch.threads.add(self.prefetcher._thread is not None)
        watch.steps[self.state.global_step + 1] = Step(
            [list(map(int, rows)) for rows in inputs["rows"]],
            torch.get_rng_state().numpy().tobytes(),
            {p.dtype for p in trained},
            float(sum(p.detach().double().sum() for p in trained)),
        )
        return step(self, model, inputs, *args, **kwargs)

    def computed(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            name = watch.moments.get((self.state.global_step + 1, watch.passes))
            if name is not None:
                shutil.copytree(Path(self.args.output_dir).parent, watch.copy(name).dir)
            watch.passes += 1
        return loss(self, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "training_step", stepped)
        patch.setattr(sft.RowTrainer, "compute_loss", computed)
        yield watch


def train(recipe: Recipe, **settings: Any) -> Run:
    return trainer.train(recipe, console=Console(quiet=True), **settings)


def lines(run: Run) -> list[dict[str, Any]]:
    """The metrics without what was measured of time and memory, and of one process alone."""
    found = [line for line in run.metrics() if "train_runtime" not in line]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in found]


def kept(run: Run) -> dict[str, Any]:
    """The tree of the newest checkpoint, without what was measured of time and memory."""
    checkpoint = store.newest(run.checkpoints)
    assert checkpoint is not None
    tree = statefile.read(checkpoint)
    progress = tree["observers"]["progress"]
    del progress["seconds"], progress["peak"]
    for tally in ("total", "logged"):
        del progress[tally]["train_seconds"], progress[tally]["wait_seconds"]
    return tree


def equal(a: Any, b: Any) -> bool:
    """Of the same types, dtypes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(_bits(a), _bits(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float):
        return repr(a) == repr(b)
    return bool(a == b)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Of one value, torch calls any stride contiguous, and then cannot view its bytes.
    fresh = tensor.clone(memory_format=torch.contiguous_format)
    return fresh.flatten().view(torch.uint8)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def require_equal(resumed: Run, straight: Run) -> None:
    """Every bit of two runs' ends: adapter, optimizer, schedule, random state, metrics, result."""
    assert equal(weights(resumed), weights(straight))
    ours, theirs = kept(resumed), kept(straight)
    for part in theirs:
        assert equal(ours[part], theirs[part]), part
    ends = [store.newest(run.checkpoints) for run in (resumed, straight)]
    assert ends[0].name == ends[1].name
    for name in ("trainer_state.json", "adapter_model.safetensors", "state.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert lines(resumed) == lines(straight)
    for key in ("steps", "train_loss", "tokens", "before", "after", "trainable_parameters"):
        assert resumed.result[key] == straight.result[key], key


def require_same_steps(resumed: Watch, straight: Watch, after: int, last: int = STEPS) -> None:
    """The resumed run took the steps after its checkpoint, on the rows and numbers of the other."""
    assert list(resumed.steps) == list(range(after + 1, last + 1))
    for number, step in resumed.steps.items():
        assert step == straight.steps[number], number
        assert step.dtypes == {torch.float32}
    assert resumed.threads == {True}


# --- the matrix

ADAM8 = {"train__optim": "adamw_8bit", "lora__r": 64}
PAGED8 = {"train__optim": "paged_adamw_8bit", "lora__r": 64}
LION8 = {"train__optim": "lion_8bit", "lora__r": 64, "train__learning_rate": 1e-3}
ADAM32 = {"train__optim": "paged_adamw_32bit"}
ADAFACTOR = {"train__optim": "adafactor"}
PLAIN = {"quant__quant_type": "none"}
FOUR = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 4}
PADDED = {"data__packing": False}
DROPOUT = {"lora__lora_dropout": 0.1}
# Every pair of base, optimizer, accumulation, packing and dropout is in one of these.
MATRIX = {
    "nf4, adamw, 4 passes, packed, dropout": FOUR | DROPOUT,
    "16 bit, adamw, 1 pass, padded": PLAIN | PADDED,
    "nf4, adamw 8 bit, 1 pass, padded, dropout": ADAM8 | PADDED | DROPOUT,
    "16 bit, adamw 8 bit, 4 passes, packed": PLAIN | ADAM8 | FOUR,
    "nf4, paged adamw 8 bit, 4 passes, padded": PAGED8 | FOUR | PADDED,
    "16 bit, paged adamw 8 bit, 1 pass, packed, dropout": PLAIN | PAGED8 | DROPOUT,
    "nf4, lion 8 bit, 1 pass, packed": LION8,
    "16 bit, lion 8 bit, 4 passes, padded, dropout": PLAIN | LION8 | FOUR | PADDED | DROPOUT,
    "nf4, adamw 32 bit of bitsandbytes, 1 pass, packed": ADAM32,
    "16 bit, adafactor, 4 passes, padded, dropout": PLAIN | ADAFACTOR | FOUR | PADDED | DROPOUT,
    "nf4, adafactor, 1 pass, packed": ADAFACTOR,
    # Settings that a resume has tripped over elsewhere.
    "cosine with warmup, evaluations between, every step logged": {
        "train__lr_scheduler_type": "cosine", "train__warmup_steps": 4, "train__eval_steps": 2,
        "train__logging_steps": 1, "lora__lora_dropout": 0.1, "eval__generate": 2,
    },
    "settings chosen for the card": FOUR | DROPOUT | {"train__fit": "auto"},
    "activations computed again": FOUR | DROPOUT | {"train__activation_checkpointing": True},
    "without fused layers": DROPOUT | {"train__kernels": "off"},
}  # fmt: skip
# Where it is killed, and the checkpoint that it goes on from.
MOMENTS = {"in mid-step": ((5, 1), 3), "at an epoch's end": ((7, 0), 6), "in epoch 2": ((11, 0), 9)}


def test_every_pair_of_the_matrix_is_covered() -> None:
    parts = [PLAIN, FOUR, PADDED, DROPOUT]
    kinds = [ADAM8, PAGED8, LION8, ADAM32 | ADAFACTOR, {}]

    def row(case: dict[str, Any]) -> tuple[Any, ...]:
        def has(part: dict[str, Any]) -> bool:
            return part.items() <= case.items()

        optim = case.get("train__optim", "adamw_torch")
        return ("32" if optim in ("paged_adamw_32bit", "adafactor") else optim, *map(has, parts))

    rows = [row(case) for case in list(MATRIX.values())[:11]]
    assert len({one[0] for one in rows}) == len(kinds)
    for first in range(5):
        for second in range(first + 1, 5):
            values = [sorted({one[at] for one in rows}, key=str) for at in (first, second)]
            pairs = {(one[first], one[second]) for one in rows}
            assert pairs == {(a, b) for a in values[0] for b in values[1]}, (first, second)


@pytest.mark.parametrize("case", list(MATRIX))
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    case: str, write: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(**MATRIX[case])
    one_pass = not FOUR.items() <= MATRIX[case].items() or recipe.train.fit == "auto"
    moments = {(step, 0 if one_pass else at): name for name, ((step, at), _) in MOMENTS.items()}
    with watched(monkeypatch, tmp_path / "copies", moments) as straight:
        whole = train(recipe)
    assert len(straight.steps) == STEPS and len(straight.steps[EPOCH].rows[0]) <= 3
    for name, (_, checkpoint) in MOMENTS.items():
        stopped = straight.copy(name)
        assert store.step_of(store.newest(stopped.checkpoints)) == checkpoint
        with watched(monkeypatch, tmp_path / "copies") as resumed:
            run = train(recipe, resume=stopped.dir)
        assert run.dir == stopped.dir
        require_equal(run, whole)
        require_same_steps(resumed, straight, checkpoint)


# --- other ways to stop, and other things to resume


def stop_before(step: int, error: BaseException) -> Callable[..., Any]:
    """A compute_loss that raises when it is first asked in a step."""
    original = sft.RowTrainer.compute_loss

    def raising(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step + 1 == step:
            raise error
        return original(self, model, *args, **kwargs)

    return raising


def test_a_run_may_be_stopped_and_resumed_many_times(
    write: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(**FOUR, **DROPOUT, train__logging_steps=5, train__save_steps=2)
    with watched(monkeypatch, tmp_path) as straight:
        whole = train(recipe)
    taken = []
    run = None
    for step, error in (
        (4, ValueError("a bug")),
        (6, KeyboardInterrupt()),
        (9, RuntimeError("a bug")),
    ):
        with watched(monkeypatch, tmp_path) as resumed, monkeypatch.context() as patch:
            patch.setattr(sft.RowTrainer, "compute_loss", stop_before(step, error))
            with pytest.raises((type(error), Interrupted)):
                train(recipe, resume=run and run.dir)
        run = rundir.open_run(recipe.run.dir)
        taken += list(resumed.steps)
        assert not run.is_complete
    with watched(monkeypatch, tmp_path) as resumed:
        run = train(recipe, resume=run.dir)
    assert taken == [1, 2, 3, 4, 3, 4, 5, 6, 5, 6, 7, 8, 9]
    require_equal(run, whole)
    require_same_steps(resumed, straight, 8)
    assert {line["step"] for line in run.metrics() if "loss" in line} == {1, 5, 10}


@pytest.mark.parametrize("steps", [EPOCH, STEPS, 2 * EPOCH])
@pytest.mark.parametrize("generate", [0, 2])
def test_of_a_run_that_took_its_last_step_only_the_rest_is_done(
    steps: int,
    generate: int,
    write: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when that step is in the middle of an epoch: the Trainer would take the rest of it."""
    recipe = write(**DROPOUT, train__max_steps=steps, eval__generate=generate)
    save = trainer._save
    copied = Run(tmp_path / "copy" / "20260101-120000")
    with monkeypatch.context() as patch, watched(monkeypatch, tmp_path) as straight:
        patch.setattr(
            trainer, "_save", lambda ready: shutil.copytree(ready.run.dir, copied.dir) and save(ready)
        )  # fmt: skip
        whole = train(recipe)
    assert store.newest(copied.checkpoints).name == f"checkpoint-{steps}"
    assert len(straight.steps) == steps and not copied.adapter.exists()
    with watched(monkeypatch, tmp_path) as resumed:
        run = train(recipe, resume=copied.dir)
    assert resumed.steps == {}
    require_equal(run, whole)


def test_a_run_of_whole_epochs_is_resumed_in_its_last_one_and_at_its_end(
    write: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(train__max_steps=None, train__num_train_epochs=2.0, train__save_steps=None)
    moments = {(7, 0): "one epoch", (12, 0): "the last step"}
    with watched(monkeypatch, tmp_path / "copies", moments) as straight:
        whole = train(recipe)
    assert len(straight.steps) == 12
    for name, checkpoint in (("one epoch", 6), ("the last step", 9)):
        with watched(monkeypatch, tmp_path) as resumed:
            run = train(recipe, resume=straight.copy(name).dir)
        require_equal(run, whole)
        require_same_steps(resumed, straight, checkpoint, 12)


def test_trained_rows_of_an_embedding_are_resumed_too(
    write: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder = save_tiny(tmp_path / "untaught")
    tensors = load_file(folder / "model.safetensors")
    tok = AutoTokenizer.from_pretrained(folder)
    for name in ("<|im_start|>", "<|im_end|>"):
        tensors["model.embed_tokens.weight"][tok.convert_tokens_to_ids(name)] *= 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = write(model__name=str(folder), lora__train_new_tokens=True, **DROPOUT)
    with watched(monkeypatch, tmp_path / "copies", {(5, 0): "x"}) as straight:
        whole = train(recipe)
    assert [name for name in weights(whole) if "token" in name]
    with watched(monkeypatch, tmp_path) as resumed:
        run = train(recipe, resume=straight.copy("x").dir)
    require_equal(run, whole)
    require_same_steps(resumed, straight, 3)


def test_a_state_in_8_bits_is_one_and_comes_back_as_one(write: Callable[..., Recipe]) -> None:
    """What the matrix rests on: that its 8-bit optimizers hold 8 bits, and not for small matrices only."""
    run = train(write(**ADAM8, train__max_steps=1))
    state = statefile.read(store.newest(run.checkpoints))["optimizer"]["state"]
    found = {
        tensor.dtype
        for one in state.values()
        for held in (one, *(v for v in one.values() if isinstance(v, dict)))
        for tensor in held.values()
        if isinstance(tensor, torch.Tensor)
    }
    assert torch.uint8 in found and torch.float32 in found


def test_loading_a_checkpoint_leaves_the_adapter_in_fp32_and_the_base_as_it_is(
    write: Callable[..., Recipe], cpu: Any
) -> None:
    from qlora import loader

    recipe = write(train__max_steps=1)
    run = train(recipe)
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    model = adapter.attach(base, recipe)
    digest = adapter.base_digest(model)
    before = {name: p.dtype for name, p in model.named_parameters()}
    checkpoint = store.newest(run.checkpoints)
    adapter.restore(model, checkpoint)
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    assert adapter.base_digest(model) == digest
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(loaded) == len(saved) and all(p.dtype == torch.float32 for p in loaded.values())


def test_what_was_measured_before_is_recalled_and_not_measured_again(
    write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from qlora import verdict

    recipe = write(eval__generate=2)
    with watched(monkeypatch, tmp_path / "copies", {(5, 0): "a", (6, 0): "b"}) as straight:
        whole = train(recipe)
    measured = []
    measure = verdict.measure
    monkeypatch.setattr(
        verdict, "measure", lambda *args: measured.append(args[-1]) or measure(*args)
    )
    run = train(recipe, resume=straight.copy("a").dir)
    assert measured == ["after"] and run.result["before"] == whole.result["before"]
    measured.clear()
    (straight.copy("b").dir / "before.json").write_text('{"of": ')  # torn
    run = train(recipe, resume=straight.copy("b").dir)
    assert measured == ["before", "after"] and run.result["before"] == whole.result["before"]


def test_a_resume_that_puts_only_part_of_the_state_back_takes_no_step(
    write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = write()
    with watched(monkeypatch, tmp_path / "copies", {(5, 0): "x"}) as straight:
        train(recipe)
    monkeypatch.setattr(sft.RowTrainer, "_load_rng_state", lambda self, checkpoint: None)
    with pytest.raises(AssertionError, match=r"resumed without \['random'\]"):
        train(recipe, resume=straight.copy("x").dir)


def test_batches_are_prepared_ahead_after_a_resume_as_before(
    write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = write()
    begun = []
    begin = prefetch._Pending.begin

    def counted(self: Any, thread: Any) -> None:
        begun.append(self._is_needed)
        begin(self, thread)

    monkeypatch.setattr(prefetch._Pending, "begin", counted)
    with watched(monkeypatch, tmp_path / "copies", {(5, 0): "x"}) as straight:
        train(recipe)
    ahead = sum(begun)
    begun.clear()
    train(recipe, resume=straight.copy("x").dir)
    assert ahead > sum(begun) >= STEPS - 3 - 2  # all but the first of each epoch


# --- run.save_every


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_checkpoint_is_never_older_than_save_every_says(
    write: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(keeping, "time", clock)
    saved = []
    step, save = sft.RowTrainer.training_step, store.write

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += 25.0
        return step(self, *args, **kwargs)

    def noted(folder: Path, number: int, fill: Any) -> Path:
        saved.append(number)
        clock.now += 7.0  # a save is not counted: it would be made sooner and sooner
        return save(folder, number, fill)

    monkeypatch.setattr(sft.RowTrainer, "training_step", slow)
    monkeypatch.setattr(store, "write", noted)
    for every, steps, expected in (
        ("60s", 100, [3, 6, 9, 11]),
        ("1m40s", 100, [4, 8, 11]),
        ("60s", 2, [2, 4, 6, 8, 10, 11]),  # each of save_steps starts the clock anew
        ("75s", 5, [3, 5, 8, 10, 11]),
        ("1h", 100, [11]),
        (None, 100, [11]),
    ):
        saved.clear()
        train(write(run__save_every=every, train__save_steps=steps))
        assert saved == expected, every


# --- what is on disk

_DTYPES = statefile.DTYPES
_NUMPY = ("bool", "int8", "uint16", "int32", "uint64", "float16", "float32", "float64", ">i4")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(_DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not size:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
    return flat.T if len(shape) == 2 and draw(st.booleans()) else flat  # not contiguous


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(_NUMPY)))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    return np.frombuffer(bytearray(raw), dtype).reshape(shape)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), tensors(), arrays()
)
keys = st.one_of(st.integers(), st.text())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=st.dictionaries(keys, trees, max_size=4), shared=tensors())
def test_any_tree_of_state_comes_back_as_it_was(
    tree: dict[Any, Any], shared: torch.Tensor, tmp_path: Path
) -> None:
    tree = {"first": shared, "tree": tree, "second": [shared, shared[:1] if shared.dim() else 0]}
    statefile.write(tmp_path, tree)
    assert equal(statefile.read(tmp_path), tree)


def test_what_several_hold_is_kept_once_and_what_looks_alike_is_not_taken_for_the_same(
    tmp_path: Path,
) -> None:
    code, square = torch.arange(256.0), torch.arange(9).reshape(3, 3)
    tree = {
        "a": code, "b": code, "half": code[:128], "other": code.clone(),
        "square": square, "turned": square.T,
        "arrays": [np.full(64, n, np.int64) for n in range(8)],  # each in the memory of the last
    }  # fmt: skip
    statefile.write(tmp_path, tree)
    assert equal(statefile.read(tmp_path), tree)
    assert len(load_file(tmp_path / statefile.TENSORS)) == 3 + 2 + 8


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({1, 2}, "state.a[1].7 is a set"),
        (Path("x"), "state.a[1].7 is a PosixPath"),
        (b"x", "state.a[1].7 is a bytes"),
        (1j, "state.a[1].7 is a complex"),
        (np.bool_(True), "state.a[1].7 is a bool"),
        (np.array(["x"]), "state.a[1].7 is an array of <U1"),
        (np.array([object()]), "state.a[1].7 is an array of object"),
        (np.array([1j]), "state.a[1].7 is an array of complex128"),
        (torch.zeros(2, dtype=torch.complex64), "state.a[1].7 is a tensor of torch.complex64"),
        (torch.zeros(2, device="meta"), "state.a[1].7 is a tensor of torch.float32, torch.strided, on"),
        (torch.zeros(2, 2).to_sparse(), "state.a[1].7 is a tensor of torch.float32, torch.sparse_coo"),
        ({"b": {(1, 2): 0}}, "state.a[1].7.b has a key of type tuple"),
        ({True: 0}, "state.a[1].7 has a key of type bool"),
        (lambda: 0, "state.a[1].7 is a function"),
    ],
)  # fmt: skip
def test_what_is_no_number_text_or_tensor_is_refused_with_its_place(
    value: Any, place: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        statefile.write(tmp_path, {"a": [0, {7: value}]})
    assert str(refused.value).startswith(place)
    assert "Choose another train.optim" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_state_is_refused_however_it_is_damaged(tmp_path: Path) -> None:
    tree = {"a": torch.ones(3), "b": [1, float("nan"), (2, "x")], "c": np.arange(3)}
    statefile.write(tmp_path, tree)
    for name in (statefile.TREE, statefile.TENSORS):
        path = tmp_path / name
        whole = path.read_bytes()
        for cut in (*range(0, len(whole) - 1, 7), len(whole) - 2):
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError, match=r"cannot be read|expected"):
                statefile.read(tmp_path)
        path.unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            statefile.read(tmp_path)
        path.write_bytes(whole)
    said = json.loads((tmp_path / statefile.TREE).read_text())
    for wrong in (
        [], ["dict"], ["dict", 5], ["dict", [[["list", []], 0]]], ["tensor", "999999"],
        ["tensor", ["list", []]], ["array", "000000"], ["array", "000001", "O", [1]],
        ["array", "000001", "<i8", [99]], ["set", [1]], ["float", "x"], ["tuple", [1]], 7,
        ["list", [["nothing"]]],
    ):  # fmt: skip
        rundir.write_json(tmp_path / statefile.TREE, said | {"tree": wrong})
        with pytest.raises(CheckpointError, match=r"cannot be read|expected a dictionary"):
            statefile.read(tmp_path)
    for version in (0, 2, None, "1"):
        rundir.write_json(tmp_path / statefile.TREE, said | {"format": version})
        with pytest.raises(CheckpointError, match=rf"its format is {version!r}; .* reads 1"):
            statefile.read(tmp_path)


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(statefile, "save_file", full)
    with pytest.raises(OSError, match="No space left") as told:
        statefile.write(tmp_path, {"a": torch.ones(1)})
    assert told.value.errno == 28


@pytest.mark.parametrize("stop", [9, 11], ids=["at the end of an epoch", "in the second epoch"])
def test_rows_that_are_drawn_by_length_come_again_as_they_were(make_recipe, monkeypatch, stop):
    """Their sampler draws from the generator that dropout uses."""
    recipe = make_recipe(
        train__sft_config={"train_sampling_strategy": "group_by_length"}, train__max_steps=20,
        train__save_steps=stop, lora__lora_dropout=0.1, data__held_out_fraction=0.0,
        train__per_device_train_batch_size=5,
    )  # fmt: skip
    rows: list[list[int]] = []
    original = sft.RowTrainer.training_step

    def noted(self, model, inputs, *args, **kwargs):
        rows.append([i for some in inputs["rows"] for i in some])
        return original(self, model, inputs, *args, **kwargs)

    def interrupted(self, model, *args, **kwargs):
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        return noted(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "training_step", noted)
    straight = trainer.train(recipe, console=Console(quiet=True))
    whole, rows[:] = list(rows), []
    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "training_step", interrupted)
        with pytest.raises(Interrupted):
            trainer.train(recipe, console=Console(quiet=True))
    resumed = trainer.train(recipe, resume="newest", console=Console(quiet=True))
    assert rows == whole
    weights = [(r.adapter / "adapter_model.safetensors").read_bytes() for r in (straight, resumed)]
    assert weights[0] == weights[1]
