"""A step's gradient does not depend on how its rows lie, and the self-test notices when it does."""

from __future__ import annotations

import json
import math
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
    memory,
    packing,
    selftest,
    sft,
    tokenizer,
)
from qlora.cards import Card
from qlora.errors import DataError, DoesNotFit, SelfTestFailed
from qlora.kernels import ops
from qlora.shape import Shape

ROWS = [
    {
        "prompt": f"What is {n} plus {n + 1}? " + "Say why. " * (n % 5),
        "completion": f"{n} and {n + 1} make {2 * n + 1}. " + "It is so. " * (n % 7),
    }
    for n in range(24)
]
FUSED = ("fused layers", "fused layers, packed", "fused layers, packed, all again")
PACKED = (
    "packed", "packed, four a pass", "packed, activation checkpointing", "evaluation, packed", *FUSED[1:],
)  # fmt: skip


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
    assert list(found) == [case.name for case in invariance.CASES] and len(found) == 12
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
    assert "held: 11 ways to lay out 8 rows were tried against one row a pass" in out


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


def test_what_the_kernels_do_not_know_or_may_not_do_is_left_out_and_said(recipe_for, tmp_path):
    found = by_name(examine(recipe_for(train__kernels="off")))
    assert {found[name].unused for name in FUSED} == {"train.kernels is off"}
    stranger = str(save_tiny(tmp_path / "granite", "granite"))
    found = by_name(examine(recipe_for(model__name=stranger)))
    assert all("is of no family that the kernels were tested" in found[n].unused for n in FUSED)


def test_a_fused_layer_that_is_wrong_is_noticed(recipe_for, monkeypatch):
    right = ops.rms_norm_backward
    monkeypatch.setattr(ops, "rms_norm_backward", lambda *a, **k: right(*a, **k) * 1.01)
    failed = {finding.case.name for finding in examine(recipe_for()).failed}
    assert failed == set(FUSED)


def test_three_rows_are_enough_and_it_is_said(recipe_for):
    report = examine(recipe_for(ROWS[:3]))
    assert report.rows == 3 and report.failed == []
    assert report.notes == ("the data has 3 rows to train on, not 8",)


def test_a_case_that_does_not_fit_is_not_tried_and_the_recipe_itself_must(
    recipe_for, cpu, monkeypatch
):
    longest = examine(recipe_for()).longest
    recipe = recipe_for(
        data__max_length=longest,
        train__per_device_train_batch_size=1,
        train__gradient_accumulation_steps=2,
        train__activation_checkpointing=True,
        train__kernels="off",
    )
    shape = Shape.from_config(loader.read_config(recipe).values)
    needed = memory.plan(recipe, shape, cpu).total_bytes
    monkeypatch.setattr(hardware, "card", lambda: Card("CPU", "cpu", needed, needed))
    report = examine(recipe)
    found = by_name(report)
    assert re.match(r"it would need .* GiB \(predicted\)", found["all rows in one pass"].unused)
    assert found["activation checkpointing"].unused == "it is on in every case"
    assert any("without it, it would not fit" in note for note in report.notes)
    assert not found["packed"].unused and report.failed == []
    monkeypatch.setattr(hardware, "card", lambda: Card("CPU", "cpu", needed, needed - 1))
    with pytest.raises(DoesNotFit, match="This recipe needs"):
        examine(recipe)


def test_running_out_of_memory_leaves_a_case_out_unless_it_is_the_reference(
    recipe_for, monkeypatch
):
    original = sft.RowTrainer.training_step

    def full_up_to(passes):
        def step(self, model, inputs, *args):
            if len(inputs["micro_batches"]) <= passes:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(self, model, inputs, *args)

        return step

    monkeypatch.setattr(sft.RowTrainer, "training_step", full_up_to(1))
    report = examine(recipe_for())
    assert by_name(report)["all rows in one pass"].unused == "the card ran out of memory"
    assert report.failed == []
    monkeypatch.setattr(sft.RowTrainer, "training_step", full_up_to(8))
    with pytest.raises(DoesNotFit, match="ran out of memory"):
        examine(recipe_for())


def test_dropout_of_the_adapter_and_of_the_base_is_off_and_it_is_said(recipe_for, tmp_path):
    base = save_tiny(tmp_path / "dropping", attention_dropout=0.5)
    report = examine(recipe_for(model__name=str(base), lora__lora_dropout=0.3))
    assert report.failed == []
    assert any("lora.lora_dropout, the base's attention_dropout" in note for note in report.notes)
    assert examine(recipe_for()).notes == ()


def test_the_scale_of_float16_is_taken_out_and_lowered_until_nothing_overflows(
    recipe_for, monkeypatch
):
    original, step, scales = sft.build, sft.RowTrainer.training_step, []

    def with_scaler(*args, **kwargs):
        trainer = original(*args, **kwargs)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        scales.append(trainer.accelerator.scaler)
        return trainer

    def overflowing(self, model, *args):
        loss = step(self, model, *args)
        if self.accelerator.scaler.get_scale() > 2.0**12:
            next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = math.inf
        return loss

    plain = examine(recipe_for())
    monkeypatch.setattr(sft, "build", with_scaler)
    monkeypatch.setattr(sft.RowTrainer, "training_step", overflowing)
    scaled = examine(recipe_for())
    assert scaled.failed == [] and scales[0].get_scale() == 2.0**12
    assert scaled.findings[0].loss == plain.findings[0].loss


def test_an_adapter_without_a_gradient_would_prove_nothing(recipe_for, monkeypatch):
    monkeypatch.setattr(selftest, "randomise_b", lambda *_: None)
    with pytest.raises(SelfTestFailed, match=r"14 adapter matrices get no gradient .*lora_A"):
        examine(recipe_for())


def test_what_is_no_number_is_never_within_the_tolerance():
    expected = {"a": torch.ones(2), "b": torch.ones(2)}
    found = {"a": torch.ones(2), "b": torch.full((2,), math.nan)}
    overall, worst, name = selftest.difference(found, expected)
    assert math.isnan(overall) and math.isnan(worst) and name == "b"
    finding = invariance.Finding(
        invariance.CASES[1], invariance.TOLERANCES["float32"],
        loss=math.nan, loss_difference=math.nan, gradient_difference=overall, worst_parameter=name,
    )  # fmt: skip
    assert len(finding.problems) == 2
    assert selftest.difference({"a": torch.ones(2)}, expected) == (math.inf, math.inf, "b")


def test_gradients_are_compared_by_norm_over_all_parameters_and_each_alone():
    expected = {"large": torch.tensor([3.0, 4.0]), "small": torch.tensor([0.1])}
    found = {"large": torch.tensor([3.0, 4.5]), "small": torch.tensor([0.2])}
    overall, worst, name = selftest.difference(found, expected)
    assert overall == pytest.approx(math.hypot(0.5, 0.1) / math.hypot(5.0, 0.1))
    assert (worst, name) == (pytest.approx(1.0), "small")


def test_the_lines_of_the_table_stand_under_each_other(qlora):
    _, out, _ = qlora("lora.r=2")
    lines = out.splitlines()
    top = next(index for index, line in enumerate(lines) if line.startswith("case "))
    table = lines[top : top + len(invariance.CASES) + 1]
    ends = {
        line.index(end) + len(end)
        for line, end in zip(table[:2], ["loss differs", "reference"], strict=True)
    }
    assert len(ends) == 1
    assert lines[-1].startswith("verdict   held: 11 ways to lay out 8 rows were tried")
    assert any(re.match(r"allowed   loss 2e-06, gradient 5e-06 in float32", line) for line in lines)


def test_rows_of_new_tokens_are_tried_where_the_recipe_trains_them(recipe_for, monkeypatch):
    monkeypatch.setattr(adapter, "untrained_tokens", lambda base, tokens: list(tokens)[:2])
    compared = []
    original = selftest.difference

    def difference(found, expected):
        compared.append([name for name in found if "trainable_tokens" in name])
        return original(found, expected)

    monkeypatch.setattr(selftest, "difference", difference)
    report = examine(recipe_for(lora__train_new_tokens=True))
    assert report.failed == [] and compared and all(len(names) == 2 for names in compared)
