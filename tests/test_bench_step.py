"""What a training step of an 8B does, counted on fake tensors, held to the figures it is meant to keep.

Steps of two and of four layers are followed; the work of all 32 lies on the line through both
(``scripts/bench_plan.py`` shows that it does). No card is needed and no time is measured.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 32


def _script(name: str) -> ModuleType:
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module(name)


bench, step = _script("bench_step"), _script("gpu_step")
shapes, longest = _script("gpu_weights"), _script("gpu_longest")
LEVELS = [f"level {n}" for n in bench.LEVELS]


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def traced() -> Any:
    """(a step of all layers, bytes that a layer keeps of a token) of a way and a length, traced once."""
    known: dict[tuple[str, int], Any] = {}

    def trace(way: str, length: int = 2048) -> Any:
        if (way, length) not in known:
            two, four = (bench.traced(way, length, n) for n in (2, 4))
            kept = bench.kept_a_layer(two, four, length)
            known[way, length] = bench.on_line(two, four, LAYERS), kept
        return known[way, length]

    return trace


def test_a_step_that_makes_nothing_again_takes_this_much_arithmetic(traced: Any) -> None:
    work, _ = traced("level 1")
    assert work.gflops <= 32.5  # 47.8 where every layer is computed again
    assert work.launches <= 3511


@pytest.mark.parametrize("way", LEVELS)
def test_the_arithmetic_is_that_of_the_closed_form(way: str, traced: Any) -> None:
    work, _ = traced(way)
    assert work.gflops == pytest.approx(bench.closed_form(way, 2048, LAYERS), rel=0.002)


@pytest.mark.parametrize("way", LEVELS)
def test_neither_the_layers_nor_the_loss_make_the_host_wait(way: str, traced: Any) -> None:
    assert traced(way)[0].host_reads == 0


def test_a_layer_that_keeps_all_it_needs_keeps_half_of_what_autograd_does(traced: Any) -> None:
    assert traced("level 1")[1] <= 95_000
    assert traced(bench.KEPT)[1] == pytest.approx(185_000, rel=0.01)


@pytest.mark.parametrize(("length", "most"), [(2048, 6.45), (8192, 8.8)])
def test_a_step_that_keeps_the_least_peaks_at(length: int, most: float, traced: Any) -> None:
    assert traced("level 5", length)[0].gib <= most


def test_a_higher_level_keeps_less_and_computes_more(traced: Any) -> None:
    works, kept = zip(*(traced(way) for way in LEVELS), strict=True)
    assert list(kept) == sorted(kept, reverse=True)
    assert [w.gflops for w in works] == sorted(w.gflops for w in works)
    assert [w.gib for w in works] == sorted((w.gib for w in works), reverse=True)


def test_the_tables_limits_are_those_that_are_tested_here() -> None:
    limits = {(way, length, name): most for _, way, length, name, most in bench.LIMITS}
    assert limits == {
        ("level 1", 2048, "gflops"): 32.5,
        ("level 1", 2048, "launches"): 3700,
        ("level 1", 2048, "kept"): 95_000,
        ("level 5", 2048, "gib"): 6.45,
        ("level 5", 8192, "gib"): 8.8,
    }


def test_a_missed_figure_is_told_and_a_kept_one_too() -> None:
    row = {"way": "level 1", "tokens": 2048, "gflops": 33.0, "launches": 3000, "kept": 94_000,
           "gib": 11.0, "host_reads": 1, "by_closed_form": 1.001, "unpacked": 1e9}  # fmt: skip
    held = bench.figures([row])
    verdicts = {figure["what"]: figure["kept"] for figure in held}
    assert verdicts == {
        "GFLOP a token, level 1": False,
        "launches, level 1": True,
        "bytes kept a token and layer, level 1": True,
        "host reads of fused layers and loss": False,
        "GFLOP off the closed form": True,
    }
    text = bench.told_trace([row], held)
    assert text.count("MISSED") == 2 and text.count("kept") == 4  # one of them names a figure


def test_rows_are_like_real_ones_and_fill_each_step_to_the_token() -> None:
    rows = shapes.rows_of(2048, 5, 500)
    steps = [rows[i : i + shapes.ROWS] for i in range(0, len(rows), shapes.ROWS)]
    assert [sum(map(len, one)) for one in steps] == [2048] * 5
    assert max(map(len, rows)) <= shapes.LONGEST_ROW
    assert 1 / 2.4 < shapes.useful(rows) < 1 / 1.5  # as padded batches of real data
    assert rows == shapes.rows_of(2048, 5, 500) != shapes.rows_of(2048, 5, 500, seed=1)
    assert sum(map(len, shapes.rows_of(32_768, 1, 500))) == 32_768


def test_a_base_of_packed_weights_computes_what_they_stand_for() -> None:
    from types import SimpleNamespace

    from qlora.bnb import bnb

    config = shapes.config_of(shapes.TINY)
    weights = shapes.Weights(config, torch.device("cpu"), torch.float32)
    base = weights.base(step.recipe_of(SimpleNamespace(tokens=64)), "sdpa").eval()
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    values = dict(weights.dense)
    for name, (packed, state) in weights.packed.items():
        values[name] = bnb.functional.dequantize_4bit(packed, state)
    plain.load_state_dict(values)
    ids = torch.randint(0, 2048, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_saved_weights_are_read_back_as_they_were_before_they_were_quantized(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    tied = _script("gpu_plan").config_of(shapes.MODELS["1b"], small=True)
    weights = shapes.Weights(tied, torch.device("cpu"), torch.float32)
    weights.save(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, weights.made(name)), name


def test_a_side_that_computes_something_else_is_named() -> None:
    first = step.Turn(1.0, 0, 0, [7.0, 6.9], [0.20, 0.21])
    same = step.Turn(2.0, 0, 0, [7.00001, 6.9], [0.20, 0.21])
    other = step.Turn(2.0, 0, 0, [7.0, 6.95], [0.20, 0.25])
    tried = {"ours, level 1": first, "plain TRL": same, "tuned TRL, kept": other}
    assert step.disagreements(tried, "float32") == [
        "tuned TRL, kept: losses differ by 0.05",
        "tuned TRL, kept: norms of gradients differ by 0.19",
    ]
    # Another adapter was drawn there: only the first loss, of a zero B, is the same.
    drawn = step.Turn(1.0, 0, 0, [7.0, 6.5], [0.5, 0.5])
    assert step.disagreements({"ours, level 1": first, step.UNSLOTH: drawn}, "float32") == []


def test_a_side_that_breaks_is_wrong_and_one_that_is_left_out_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks(*_: Any) -> Any:
        raise KeyError("levels")

    def is_out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = {step.PLANNED: breaks, step.PLAIN: is_out_of_memory}
    monkeypatch.setattr(step, "sides", lambda work: made)
    found = step.compare(shapes.TINY, 64, rounds=1)
    assert found["wrong"] == [f"{step.PLANNED}: KeyError: 'levels'"]
    assert found["sides"][step.PLAIN] == {"why": "does not fit"}
    assert "does not fit" in step.table_of(found)


def test_an_interpreter_without_unsloth_is_told_apart() -> None:
    assert not step.has_unsloth(None)
    assert not step.has_unsloth(sys.executable)
    assert not step.has_unsloth("no/such/python")


def test_verdicts_stand_beside_what_is_wanted_even_if_missed() -> None:
    sides = {
        step.PLAIN: {"ours_by_theirs": 2.4},
        step.TUNED[0]: {"why": "the other one is faster"},
        step.TUNED[1]: {"ours_by_theirs": 1.2},
        step.UNSLOTH: {"why": "not installed"},
    }
    assert step.verdicts({"sides": sides}) == [
        ("plain TRL", "2.00", "2.40", "kept"),
        ("tuned TRL, kept", "1.35", "1.20", "MISSED"),
        ("Unsloth", "1.10", "not installed", "-"),
    ]


@pytest.mark.parametrize("limit", [64, 130, 1000, 4100, 9000])
@pytest.mark.parametrize("start", [64, 1000, 8192])
def test_the_longest_length_is_found_from_below_and_from_above(limit: int, start: int) -> None:
    tried: list[int] = []

    def runs(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = longest.longest_that_runs(runs, start)
    assert found % 64 == 0 and found <= limit
    assert limit - found < max(128, 0.03 * limit)
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("script", ["gpu_step", "gpu_weights", "gpu_longest"])
def test_the_examples_in_it_are_true(script: str) -> None:
    import doctest

    failed, tried = doctest.testmod(_script(script))
    assert failed == 0 and tried
