"""A step's gradient does not depend on how its rows lie, and the self-test notices when it does."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from torch.nn import functional

from qlora import (
    adapter,
    cli,
    data,
    hardware,
    invariance,
    loader,
    packing,
    selftest,
    sft,
    tokenizer,
)
from qlora.errors import DataError, SelfTestFailed

ROWS = [
    {
        "prompt": f"What is {n} plus {n + 1}? " + "Say why. " * (n % 5),
        "completion": f"{n} and {n + 1} make {2 * n + 1}. " + "It is so. " * (n % 7),
    }
    for n in range(24)
]
PACKED = ("packed", "packed, four a pass", "packed, activation checkpointing", "evaluation, packed")


@pytest.fixture(autouse=True)
def on_the_cpu(cpu, monkeypatch):
    monkeypatch.setattr(hardware, "card", lambda: cpu)


@pytest.fixture
def recipe_for(make_recipe, tmp_path):
    """The recipe on rows of uneven length; keyword arguments are dotted overrides."""

    def make(rows=ROWS, **changes):
        file = tmp_path / "uneven.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_recipe(**{"data__train": str(file), "data__held_out_fraction": 0.0} | changes)

    return make


@pytest.fixture
def qlora(monkeypatch, capsys, recipe_for, tmp_path):
    """``qlora selftest`` on the uneven rows, in this process: exit code, stdout, stderr."""

    def call(*words):
        file = tmp_path / "mine.yaml"
        file.write_text(recipe_for().dump())
        monkeypatch.setattr(sys, "argv", ["qlora", "selftest", str(file), *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return call


def examine(recipe) -> invariance.Report:
    return selftest.examine(recipe, Console(quiet=True))


def by_name(report) -> dict[str, invariance.Finding]:
    return {finding.case.name: finding for finding in report.findings}


def packed_batches(monkeypatch, change):
    """Let ``change`` alter each packed micro-batch that training sees; the proof sees none of it."""
    original = packing.Collator.__call__

    def altered(self, step):
        batch = original(self, step)
        if self.layout.packed:
            for one in batch["micro_batches"]:
                change(one)
        return batch

    monkeypatch.setattr(packing.Collator, "__call__", altered)


def positions_go_on(batch):
    shape = batch["input_ids"].shape
    batch["position_ids"] = torch.arange(shape[1]).expand(shape).clone()


def all_may_be_seen(batch):
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])


LEAKS = pytest.mark.parametrize("leak", [positions_go_on, all_may_be_seen])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "mistral", "gemma2"])
def test_every_layout_gives_the_same_loss_and_gradients(kind, recipe_for, tmp_path):
    report = examine(recipe_for(model__name=str(save_tiny(tmp_path / kind, kind))))
    found = by_name(report)
    assert list(found) == [case.name for case in invariance.CASES] and len(found) == 9
    assert not [finding for finding in report.findings if finding.unused]
    assert report.failed == [] and report.dtype == "float32" and report.verdict.startswith("held")
    report.require_invariance()
    passes = [finding.passes for finding in report.findings]
    assert passes[:4] == [8, 2, 1, 8]
    assert found["packed"].passes < 8 and found["packed, four a pass"].passes == 1
    for finding in report.findings:
        assert (finding.gradient_difference is None) == finding.case.evaluation
    assert (
        found["all rows in one pass"].gradient_difference > 0
    )  # another sum, not the same numbers


def test_the_reference_is_the_loss_of_a_loop_written_by_hand(recipe_for, cpu):
    recipe = recipe_for()
    report = examine(recipe)
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe)
    rows = sorted(data.prepare(recipe, tok, config.vocab_size).train["input_ids"], key=len)
    assert (report.shortest, report.longest) == (len(rows[0]), len(rows[-1]))
    model = adapter.attach(loader.load_base(recipe, cpu, config, bars=False).model, recipe)
    selftest.randomise_b(model, recipe.train.seed)
    adapter_in_bf16(model)
    labelled = {tuple(row["input_ids"]): row for row in data.prepare(recipe, tok, 2048).train}
    chosen = [rows[round(place * (len(rows) - 1) / 7)] for place in range(8)]
    total = supervised = 0
    for ids in chosen:
        labels = torch.tensor(labelled[tuple(ids)]["labels"])[1:]
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total += float(functional.cross_entropy(logits, labels, reduction="sum").detach())
        supervised += int((labels != -100).sum())
    assert (report.rows, report.tokens) == (8, sum(map(len, chosen)))
    assert report.supervised == supervised
    assert report.findings[0].loss == pytest.approx(total / supervised, rel=1e-5)


def adapter_in_bf16(model):
    """TRL's constructor rounds the adapter once; its dtype is restored, its values are not."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()


def test_bfloat16_is_held_to_what_bfloat16_can_give(recipe_for):
    report = examine(recipe_for(quant__compute_dtype="bfloat16"))
    assert report.failed == [] and report.tolerance == invariance.TOLERANCES["bfloat16"]
    moved = by_name(report)["packed"].gradient_difference
    assert invariance.TOLERANCES["float32"].gradient < moved < report.tolerance.gradient


@LEAKS
def test_packed_rows_that_see_each_other_are_noticed(leak, recipe_for, monkeypatch):
    packed_batches(monkeypatch, leak)
    for dtype in ("float32", "bfloat16"):
        report = examine(recipe_for(quant__compute_dtype=dtype))
        failed = {finding.case.name for finding in report.failed}
        assert set(PACKED[:3]) <= failed <= set(PACKED)
        with pytest.raises(
            SelfTestFailed,
            match=r"(?s)packed: the gradient differs by 0\.\d+ \(at most .*packing=false",
        ):
            report.require_invariance()


def test_a_loss_divided_by_each_passs_own_tokens_is_noticed(recipe_for, monkeypatch):
    def of_each_pass(self, model, inputs, _=None):
        batches = inputs["micro_batches"]
        losses = [
            super(sft.RowTrainer, self).training_step(
                model, batch, len(batches) * (batch["labels"][:, 1:] != -100).sum()
            )
            for batch in batches
        ]
        return torch.stack(losses).sum()

    monkeypatch.setattr(sft.RowTrainer, "training_step", of_each_pass)
    report = examine(recipe_for())
    failed = {finding.case.name for finding in report.failed}
    assert {"four rows a pass", "all rows in one pass", "packed", "evaluation"} <= failed
    assert "activation checkpointing" not in failed
    with pytest.raises(
        SelfTestFailed, match=r"four rows a pass: .*\n.*per_device_train_batch_size=1"
    ):
        by_itself = [f for f in report.findings if f.case.name == "four rows a pass"]
        invariance.dataclasses.replace(report, findings=tuple(by_itself)).require_invariance()


def test_packing_that_training_would_not_use_is_not_a_failure(recipe_for, monkeypatch):
    def reasons(recipe):
        found = by_name(examine(recipe))
        assert not found["four rows a pass"].unused
        (reason,) = {found[name].unused for name in PACKED}
        return reason

    assert reasons(recipe_for(data__packing=False)) == "data.packing is false"
    alike = [row for row in ROWS if len(row["completion"]) > 70]
    assert "no two of these rows fit into data.max_length (128" in reasons(recipe_for(alike))
    monkeypatch.setattr(packing, "prove", lambda *_, **__: packing.Proof(0.5, 0.5, 1e-4))
    assert re.match(r"packing is off: not proven on this model: .* 0\.5 ", reasons(recipe_for()))


def test_the_command_prints_a_table_and_a_verdict(qlora):
    code, out, err = qlora()
    assert code == 0 and err.count("Traceback") == 0
    for case in invariance.CASES:
        assert case.name in out
    assert "held: 8 ways to lay out 8 rows were tried against one row a pass" in out


def test_as_json_nothing_else_is_printed(qlora):
    code, out, _ = qlora("--json")
    told = json.loads(out)
    assert code == 0 and told["held"] is True and told["rows"] == 8
    assert [case["name"] for case in told["cases"]] == [case.name for case in invariance.CASES]
    assert all(case["problems"] == [] for case in told["cases"])


@LEAKS
def test_a_failure_ends_with_the_table_the_case_and_exit_code_2(leak, qlora, monkeypatch):
    packed_batches(monkeypatch, leak)
    code, out, err = qlora()
    assert code == 2 and "FAILED" in out and "one row a pass" in out
    assert "qlora: LlamaForCausalLM with sdpa attention in float32" in err
    assert "packed: the gradient differs by" in err and "data.packing=false" in err


def test_fewer_than_two_rows_cannot_be_compared(recipe_for):
    with pytest.raises(DataError, match=r"at least 2 rows; the recipe.s data has 1 to train on"):
        examine(recipe_for(ROWS[:1]))
