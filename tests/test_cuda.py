"""What only a card can show, and a rehearsal of the suite that shows it.

``scripts/gpu_suite.py`` holds the checks; here each is a test, so that ``pytest -m gpu`` on a machine with
a card runs them all. Without a card those are skipped, and the checks that mean something on a CPU too
run there on small models: they keep the suite from rotting between two cards.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _suite() -> ModuleType:
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("gpu_suite")


suite = _suite()
CHECKS: dict[str, Any] = {check.name: check for check in suite.CHECKS}
REHEARSED = (
    "census", "evaluation-between", "base-unchanged", "adapter-fp32", "relief", "nf4-load",
    "plan-by-measured", "plan-verdicts", "kernels", "operators", "attention", "step:8b", "longest:8b",
    "14b-in-12gb",
)  # fmt: skip
needs_card = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card: torch.cuda.is_available() is False"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Real shapes on a card, small ones elsewhere; the made models are shared by the tests."""
    folder = tmp_path_factory.mktemp("suite")
    yield suite.Site(folder, folder / "models", small=not torch.cuda.is_available())


@pytest.mark.gpu
@needs_card
@pytest.mark.parametrize("name", CHECKS)
def test_the_card_keeps_what_is_promised(name: str, site: Any) -> None:
    suite.free_memory()
    try:
        assert CHECKS[name].run(site)
    except suite.CannotCheck as reason:
        pytest.skip(str(reason))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the checks run in full on this card")
@pytest.mark.parametrize("name", REHEARSED)
def test_a_check_that_needs_no_card_passes_on_the_cpu(name: str, site: Any) -> None:
    assert CHECKS[name].run(site)


def test_a_model_of_a_real_shape_has_every_weight_of_that_shape(site: Any) -> None:
    if not site.small:
        pytest.skip("a rehearsal; on a card nf4-load shows more")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = suite.random_model(site, suite.LLAMA_8B)
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {name for name, _ in model.named_parameters()} == set(stored)
    assert all(torch.equal(value, stored[name]) for name, value in model.named_parameters())
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert suite.random_model(site, suite.LLAMA_8B) == folder  # found again, not made again


def test_full_rows_are_as_long_as_the_recipe_allows(site: Any) -> None:
    from transformers import AutoTokenizer

    path = suite.full_rows(site, tokens=200, rows=3)
    lines = path.read_text(encoding="utf-8").splitlines()
    tok = AutoTokenizer.from_pretrained(ROOT / "qlora" / "embedded" / "base")
    lengths = {len(tok(suite.json.loads(line)["text"])["input_ids"]) + 1 for line in lines}
    assert len(lines) == 3 and len(lengths) == 1
    assert 190 < lengths.pop() <= 200


def test_the_real_shapes_are_the_published_ones() -> None:
    config = suite.llama_config(suite.LLAMA_8B)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 32, 128256)
    assert not config.tie_word_embeddings


def test_every_recipe_held_to_a_card_is_a_shipped_one_with_that_cards_name() -> None:
    from qlora import cards, cookbook

    shipped = {entry.name for entry in cookbook.entries()}
    assert set(suite.HELD_TO_CARD) <= shipped
    sizes = {cards.named_card(name.rpartition("-")[2]).total_bytes for name in suite.HELD_TO_CARD}
    assert len(sizes) == 4  # 8, 12 and 24 GB and a T4


def test_the_watched_optimizer_tells_its_class_its_pages_and_its_state(site: Any) -> None:
    if not site.small:
        pytest.skip("on a card paged-optimizer shows it")
    asked = ["train.max_steps=2", "train.save_steps=2"]
    recipe = suite.quickstart(site, "watched", *suite.SHORT, *asked)
    with suite.watched_optimizer() as optimizers:
        run = suite.train(recipe)
    (found,) = optimizers
    assert found["class"] == "torch.optim.adamw.AdamW"
    assert not found["paged"] and found["bits"] == 32
    assert found["state_dtypes"] == ["torch.float32"]
    assert len(suite.losses(run)) == 2
    assert all(math.isfinite(loss) for loss in suite.losses(run))


def test_running_out_of_memory_is_seen_through_the_error_it_caused() -> None:
    out = torch.OutOfMemoryError("CUDA out of memory")
    wrapped = RuntimeError("cannot go on")
    wrapped.__cause__ = out
    assert suite.ran_out(out) and suite.ran_out(wrapped)
    assert not suite.ran_out(RuntimeError("something else"))


def test_a_failed_and_a_broken_check_do_not_cost_the_others(site: Any) -> None:
    def fails(_: Any) -> dict[str, Any]:
        suite.require(False, "the adapter is bf16")
        raise AssertionError("not reached")

    def breaks(_: Any) -> dict[str, Any]:
        raise KeyError("linears")

    def is_too_small(_: Any) -> dict[str, Any]:
        raise suite.CannotCheck("this card has 7.8 GiB")

    failed = suite.perform(suite.Check("fails", fails, False), site)
    skipped = suite.perform(suite.Check("skips", is_too_small, False), site)
    broken = suite.perform(suite.Check("breaks", breaks, False), site)
    assert (failed["status"], failed["why"]) == ("FAILED", "the adapter is bf16")
    assert (broken["status"], broken["why"]) == ("BROKEN", "KeyError: 'linears'")
    assert (skipped["status"], skipped["why"]) == ("skipped", "this card has 7.8 GiB")
    assert suite.row(failed)[3] == "the adapter is bf16"


def test_checks_are_chosen_by_name_and_an_unknown_name_is_refused() -> None:
    assert [check.name for check in suite.chosen(["fp16", "census"])] == ["census", "fp16"]
    assert len(suite.chosen(None)) == len(CHECKS) == 28
    with pytest.raises(ValueError, match="no check is called bf61"):
        suite.chosen(["bf61"])
