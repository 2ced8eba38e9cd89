"""The benchmarks and suites of ``scripts/``: polite on the command line, right in their arithmetic."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qlora.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
COMMANDS = (
    "bench_plain_trl", "bench_train", "bench_startup", "bench_data", "bench_quickstart", "bench_load",
    "bench_plan", "bench_step", "bench_head", "bench_convergence", "gpu_suite",
    "torture_inputs", "torture_steps", "bench_checkpoint", "torture_checkpoints", "bench_serve",
    "bench_merge",
)  # fmt: skip
BAD_ARGUMENTS = {
    "bench_plain_trl": [
        ["--steps=0"], ["--steps=many"], ["--base=no/such/folder"], ["--data=nothing.jsonl"],
        ["--learning-rate=-1"],
    ],
    "bench_train": [["--steps=1"], ["--pairs=0"], ["--threads=-2"], ["--base=no/such/folder"]],
    "bench_startup": [["--rounds=0"], ["--rounds=x"], ["extra"]],
    "bench_data": [["--rows=0"], ["--tokens=20"], ["--pairs=x"], ["--num-proc=-1"]],
    "bench_quickstart": [["--threads=0"], ["--max-gib=big"], ["lora.r"]],
    "bench_load": [["--pairs=0"], ["--base=no/such/folder"], ["--load=ours"], ["--load=theirs"]],
    "bench_plan": [["--only", "t5"], ["--again"]],
    "bench_step": [
        ["--trace", "--quickstart"], ["--model=70b"], ["--tokens=8"], ["--rounds=0"], ["--card-gb=-1"],
        ["--quickstart", "--steps=1"],
    ],
    "bench_head": [["--steps=0"], ["--seeds=x"], ["extra"]],
    "bench_convergence": [["--seeds=0", "1"], ["--seeds", "42"], ["--runs"]],
    "gpu_suite": [["--only", "bf61"], ["--unknown"]],
    "torture_inputs": [["--out"], ["extra"]],
    "torture_steps": [["--out"], ["extra"], ["--only"]],
    "bench_checkpoint": [["--rounds=0"], ["--only=loads"], ["--dir=no/such/folder"], ["extra"]],
    "bench_merge": [["--pairs=0"], ["--base=no/such/folder"], ["--do=copy"], ["--do=both"], ["--run=x"]],
    "bench_serve": [["--seconds=0"], ["--pairs=x"], ["--questions=-1"], ["extra"]],
    "torture_checkpoints": [["--trials=0"], ["--only", "kicks"], ["--only"], ["--out"]],
}  # fmt: skip
BAD = [(name, bad) for name, lists in BAD_ARGUMENTS.items() for bad in lists]


def _script(name: str) -> ModuleType:
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def _run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


measure = _script("measure")


def test_every_benchmark_is_known_here() -> None:
    found = {path.stem for path in SCRIPTS.glob("bench_*.py")} | {"gpu_suite"}
    found |= {path.stem for path in SCRIPTS.glob("torture_*.py")}
    assert found == set(COMMANDS) == set(BAD_ARGUMENTS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_and_ends_well(name: str) -> None:
    done = _run(name, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout and not done.stderr


@pytest.mark.parametrize(("name", "bad"), BAD, ids=lambda value: str(value))
def test_bad_arguments_end_in_a_sentence_and_exit_code_two(name: str, bad: list[str]) -> None:
    done = _run(name, *bad)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr.splitlines()[-1]


def test_rows_that_are_not_conversations_are_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("not json\n", '{"prompt": "a"}\n', ""):
        path.write_text(text)
        done = _run("bench_plain_trl", f"--data={path}")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "messages" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["measure", *COMMANDS])
def test_the_examples_in_a_script_are_true(name: str) -> None:
    failed, tried = doctest.testmod(_script(name))
    assert failed == 0
    assert tried or name in ("bench_plain_trl", "bench_startup")


def test_the_plain_script_trains_with_the_quickstarts_values() -> None:
    plain, bench = _script("bench_plain_trl"), _script("bench_train")
    recipe = load_recipe("quickstart", ["train.max_steps=60"])
    defaults = vars(plain.parser().parse_args([]))
    assert vars(plain.parser().parse_args(bench.plain_flags(recipe, None))) == defaults
    assert recipe.data.train == ("embedded:tickets/train.jsonl",)
    assert recipe.model.name == "embedded:base"
    assert not recipe.train.activation_checkpointing
    assert recipe.lora.target_modules == ("all-linear",) and not recipe.lora.use_rslora


def test_the_plain_script_owes_nothing_to_qlora() -> None:
    text = (SCRIPTS / "bench_plain_trl.py").read_text(encoding="utf-8")
    assert "import qlora" not in text and "from qlora" not in text


def test_the_comparison_turns_off_what_the_plain_script_does_not_do(tmp_path: Path) -> None:
    bench = _script("bench_train")
    recipe = load_recipe("quickstart", bench.overrides(7, None))
    assert (recipe.train.max_steps, recipe.train.save_steps, recipe.train.logging_steps) == (
        7,
        7,
        1,
    )
    assert recipe.data.held_out is None and recipe.data.held_out_fraction == 0
    assert recipe.eval.generate == 0 and not recipe.quant.cache
    assert f"model.name={tmp_path.resolve()}" in bench.overrides(7, tmp_path)


def test_each_side_goes_first_equally_often_in_an_even_number_of_pairs() -> None:
    orders = list(measure.turns(6))
    assert [order[0] for order in orders].count(True) == 3
    assert all(set(order) == {True, False} for order in orders)


def test_a_median_is_of_the_ratios_and_not_a_ratio_of_medians() -> None:
    # A machine that is ten times slower in the second pair changes nothing.
    values = measure.ratios([1.0, 20.0, 2.0], [2.0, 40.0, 2.0])
    assert values == [0.5, 0.5, 1.0]
    assert measure.summary(values)["median"] == 0.5


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        measure.ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="zip"):
        _script("bench_train").largest_difference([1.0], [])


def test_a_table_lines_its_columns_up() -> None:
    shown = measure.table(("command", "ratio"), [("a", "0.100"), ("a longer one", "1")])
    lines = shown.splitlines()
    assert {line.index(word) for line, word in zip(lines, ("ratio", "--", "0.1", "1"), strict=True)
            if word != "--"} == {14}  # fmt: skip
    assert all(line == line.rstrip() for line in lines)


def test_a_comparison_becomes_three_ratios_and_two_differences() -> None:
    found: dict[str, Any] = {
        "qlora_by_plain": {"steps": [0.5, 0.7], "training": [0.6, 0.6], "process": [1.0, 1.2]},
        "early_loss_difference": 1e-7,
        "largest_loss_difference": 2e-6,
    }
    rows = _script("bench_train").rows(found)
    assert [row[1] for row in rows] == ["0.600", "0.600", "1.100", "1.0e-07", "2.0e-06"]


def test_a_command_that_fails_is_told_with_the_end_of_what_it_said() -> None:
    failing = [sys.executable, "-c", "print('before'); raise SystemExit('the reason')"]
    with pytest.raises(measure.CommandFailed, match="the reason"):
        measure.timed(failing)


def test_a_timed_command_sees_its_environment_and_its_output_is_kept() -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    done = measure.timed([sys.executable, "-c", code], {"OMP_NUM_THREADS": "3"})
    assert done.output.strip() == "3"
    assert 0 < done.seconds < 30


def test_a_report_is_strict_json_with_commit_date_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "found.json"
    measure.report({**measure.circumstances("abc"), "ratio": 0.5}, path)
    found = json.loads(path.read_text())
    assert found["commit"] == "abc" and found["ratio"] == 0.5
    assert set(found["packages"]) == set(measure.PACKAGES)
    with pytest.raises(ValueError, match="not JSON compliant"):
        measure.report({"ratio": float("nan")}, path)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", ""])
def test_a_count_is_a_whole_number_of_at_least_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
        measure.positive(text)


def test_the_quickstarts_limits_are_judged_one_by_one() -> None:
    quickstart = _script("bench_quickstart")
    kept = quickstart.verdicts({"seconds": 100.0, "peak_bytes": 2**31})
    assert [ok for *_, ok in kept] == [True, True]
    passed = quickstart.verdicts({"seconds": 151.0, "peak_bytes": 3 * 2**30})
    assert [ok for *_, ok in passed] == [False, False]
    assert (quickstart.MAX_SECONDS, quickstart.MAX_GIB) == (150.0, 2.5)


@pytest.mark.skipif(os.name != "posix", reason="resource is a POSIX module")
def test_the_peak_of_a_child_is_counted_in_bytes() -> None:
    measure.timed([sys.executable, "-c", "x = b'x' * 2**28"])
    assert 2**28 < _script("bench_quickstart").peak_child_bytes() < 2**36


def test_the_suite_says_what_has_not_been_run_and_refuses_without_a_card() -> None:
    import torch

    suite = _script("gpu_suite")
    assert "has not been run on CUDA yet" in str(suite.__doc__)
    if not torch.cuda.is_available():
        done = _run("gpu_suite", "--only", "census")
        assert done.returncode == 1
        assert done.stderr.strip().startswith("There is no CUDA card here")


def test_the_suite_lists_each_check_with_what_it_shows() -> None:
    done = _run("gpu_suite", "--list")
    assert done.returncode == 0
    for check in _script("gpu_suite").CHECKS:
        assert f"{check.name} " in done.stdout and check.about in done.stdout
