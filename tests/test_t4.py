"""The T4 path on a CPU: fp16 on a card of capability 7.5, by the code that a card would run.

A CPU has no card to show, so the card is a stated one, and accelerate 1.15 makes no gradient scaler and no
autocast for fp16 on a CPU: both are put in here. The Trainer's own flow (scale, unscale, clip, step,
update) does the rest.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from qlora import (
    adapter,
    cards,
    data,
    hardware,
    loader,
    nf4,
    packing,
    rundir,
    selftest,
    sft,
    tokenizer,
    trainer,
)
from qlora.attention import WITHOUT_GQA
from qlora.cards import Card
from qlora.errors import HardwareError, Interrupted, TrainingDiverged
from qlora.guard import StepGuard
from qlora.invariance import CASES
from qlora.rundir import Run
from qlora.screen import Screen

pytestmark = pytest.mark.usefixtures("one_thread")
T4 = Card("T4 on a CPU", "cpu", 2**34, 2**34, (7, 5))
FITTING, TOO_LARGE = 2.0**10, 2.0**40  # nothing here overflows; everything does


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A Llama of four query heads over two key heads."""
    folder = tmp_path_factory.mktemp("grouped")
    return save_tiny(folder, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def make_fp16(make_recipe, grouped):
    return functools.partial(
        make_recipe, model__name=str(grouped), quant__compute_dtype="float16",
        train__activation_checkpointing=True,
    )  # fmt: skip


class Watch(TrainerCallback):
    """What a step leaves, and how the scaler moves."""

    def __init__(self):
        self.gradients, self.dtypes, self.scales, self.skipped, self.rates = [], set(), [], [], []
        self.adapters = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
        trained = [p for p in model.parameters() if p.grad is not None]
        if not trained:  # the step is left out
            return
        self.dtypes |= {p.grad.dtype for p in trained}
        self.gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        self.adapters.append(torch.cat([p.detach().flatten() for p in trained]))

    def on_optimizer_step(self, args, state, control, model, optimizer, **_):
        self.skipped.append(optimizer.step_was_skipped)
        self.scales.append(None if optimizer.scaler is None else optimizer.scaler.get_scale())
        self.rates.append(optimizer.param_groups[0]["lr"])
        trained = [p for p in model.parameters() if p.requires_grad]
        self.adapters.append(torch.cat([p.detach().flatten() for p in trained]))


def scaled(built, scale=FITTING):
    """Gives accelerate what it makes for fp16 on a card; one overflow brings it down to FITTING."""
    backoff = 0.5 if scale == FITTING else FITTING / scale
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=backoff)
    assert built.accelerator.state.mixed_precision == "fp16"
    built.accelerator.scaler, built.accelerator.native_amp = scaler, True
    return built


def build(recipe, card, folder, *more):
    """The trainer, as the story builds it, and what was chosen on the way."""
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe)
    prepared = data.prepare(recipe, tok, config.vocab_size)
    base = loader.load_base(recipe, card, config, bars=False)
    model = adapter.attach(base.model, recipe)
    layout, note = packing.choose(
        recipe, model, prepared.train[:3]["input_ids"], base.facts["attention"]
    )
    watcher = StepGuard(
        recipe, prepared.addresses, lambda row: 0, Screen(Console(quiet=True)),
        judged=lambda loss, taken: None, record=lambda line: None,
    )  # fmt: skip
    built = sft.build(
        recipe, Run(folder), card, model, tok, prepared, layout,
        observers=[watcher], callbacks=[watcher, *more],
    )  # fmt: skip
    watcher.scale, watcher.blame = built.scale, built.blame
    return built, base.facts, layout, note


@pytest.fixture(params=["materialized", "fused"])
def loss(request, monkeypatch):
    """Both losses: a card's is TRL's fused one, unless rows of the embedding train."""
    materialize = request.param == "materialized"
    real, used = sft.loss_of, []

    def loss_of(*args, **settings):
        used.append(request.param)
        return real(*args, **(settings | {"materialize": materialize}))

    monkeypatch.setattr(sft, "loss_of", loss_of)
    yield request.param
    assert used


# --- no bf16, no shared heads


class Bf16Detector(TorchDispatchMode):
    """Counts every operation, and those that read, write or ask for bf16."""

    def __init__(self):
        super().__init__()
        self.seen, self.found = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves((args, kwargs, out)):
            dtype = leaf.dtype if isinstance(leaf, torch.Tensor) else leaf
            if dtype is torch.bfloat16:
                self.found[func.overloadpacket.__name__] += 1
                break
        return out


FORWARD = {"_scaled_dot_product_flash_attention_for_cpu", "mm"}
BACKWARD = {"_scaled_dot_product_flash_attention_for_cpu_backward"}
SCALER = {"_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"}
OPTIMIZER = {"auto": {"_fused_adamw_", "_foreach_addcdiv_", "addcdiv_"}, "adamw_8bit": {
    "optimizer_update_8bit_blockwise", "optimizer_update_32bit"}}  # fmt: skip


@pytest.mark.parametrize("optim", OPTIMIZER)
def test_no_tensor_of_a_whole_step_is_bf16(make_fp16, tmp_path, loss, optim):
    recipe = make_fp16(train__optim=optim, train__max_steps=2, lora__r=64)
    built, *_ = build(recipe, T4, tmp_path)
    scaled(built)
    with Bf16Detector() as detector:
        built.evaluate()
        built.train()
    assert not detector.found
    assert detector.seen.keys() >= FORWARD | BACKWARD | SCALER  # it saw the step
    assert detector.seen.keys() & OPTIMIZER[optim]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.bfloat16(),
        lambda x: torch.zeros(2, dtype=torch.bfloat16),
        lambda x: torch._foreach_mul_([x, x.clone().to(torch.bfloat16)], 2.0),
        lambda x: x.to(torch.bfloat16).float(),
    ],
)
def test_the_detector_sees_bf16_read_written_and_in_lists(use):
    with Bf16Detector() as detector:
        torch.ones(2).exp()
    assert detector.seen and not detector.found
    with Bf16Detector() as detector:
        use(torch.ones(2))
    assert detector.found


def test_the_detector_sees_the_bf16_of_a_bf16_step_and_of_trls_constructor(
    make_fp16, cpu, tmp_path
):
    with Bf16Detector() as detector:
        built, *_ = build(
            make_fp16(quant__compute_dtype="bfloat16", train__max_steps=1), cpu, tmp_path
        )
        assert detector.found["_to_copy"] >= 28  # each A and B, put right by sft.build
        detector.found.clear()
        built.train()
    assert detector.found.keys() >= FORWARD | BACKWARD


def test_bf16_cannot_be_asked_of_it(make_fp16):
    assert not T4.supports_bf16
    with pytest.raises(HardwareError, match="which the T4 on a CPU does not compute in"):
        cards.compute_dtype(make_fp16(quant__compute_dtype="bfloat16"), T4)


@pytest.mark.parametrize("packed", [True, False])
def test_every_attention_of_a_step_has_heads_of_equal_number_and_shares_none(
    make_fp16, tmp_path, monkeypatch, packed
):
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append((query, key, value, options))
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    recipe = make_fp16(data__packing=packed, train__max_steps=1)
    built, facts, layout, note = build(recipe, T4, tmp_path)
    assert facts["attention"] == WITHOUT_GQA and facts["compute_dtype"] == "float16"
    assert layout.packed == packed and note.startswith(
        "on, proven on this model: logits move by 0" if packed else "off"
    )
    calls.clear()
    scaled(built).train()
    assert len(calls) >= 2 * 2  # two layers, each computed again for the backward pass
    for query, key, value, options in calls:
        assert query.shape[1] == key.shape[1] == value.shape[1] == 4
        assert not options.get("enable_gqa")
        assert {query.dtype, key.dtype, value.dtype} == {torch.float16}
        mask = options["attn_mask"]
        assert mask is not None and mask.dtype == torch.bool  # blocks of rows, or padding
        if packed:  # a later row sees nothing of the first: the last token begins no row
            assert not bool(mask[:, :, -1, 0].any())


# --- fp16 and its scaler


def test_adapter_gradients_and_optimizer_are_fp32_while_the_base_computes_in_fp16(
    make_fp16, tmp_path, loss
):
    watch = Watch()
    built, *_ = build(make_fp16(train__max_steps=2), T4, tmp_path, watch)
    scaled(built).train()
    assert watch.dtypes == {torch.float32} and watch.skipped == [False, False]
    census = adapter.census(built.model)
    assert census["trainable"] == {"float32": 28} and census["packed"] == {"uint8": 14}
    assert census["frozen"] == {"float16": 7}  # embedding, head and five norms
    assert {m.compute_dtype for _, m in nf4.linears(built.model)} == {torch.float16}
    states = [v for s in built.optimizer.state.values() for k, v in s.items() if k != "step"]
    assert len(states) == 2 * 28 and {state.dtype for state in states} == {torch.float32}


def test_the_gradient_and_the_held_out_loss_are_those_of_fp32(make_fp16, cpu, tmp_path, loss):
    """The independent reference: the same rows without autocast, scaler and our attention."""
    gradients, losses = [], []
    for dtype, card in (("float32", cpu), ("float16", T4)):
        watch = Watch()
        recipe = make_fp16(quant__compute_dtype=dtype, train__max_steps=1)
        built, facts, *_ = build(recipe, card, tmp_path, watch)
        assert facts["attention"] == ("sdpa" if card is cpu else WITHOUT_GQA)
        if card is T4:
            scaled(built)
        losses.append(built.evaluate()["eval_loss"])
        built.train()
        gradients.append(watch.gradients[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert float(gradients[0].norm()) > 0 and float(cosine) > 0.999


def test_an_overflow_skips_the_step_lowers_the_scale_and_the_next_one_trains(
    make_fp16, tmp_path, loss
):
    watch = Watch()
    recipe = make_fp16(train__max_steps=3, train__lr_scheduler_type="linear")
    built, *_ = build(recipe, T4, tmp_path, watch)
    scaled(built, TOO_LARGE).train()
    assert watch.skipped == [True, False, False]
    assert watch.scales == [FITTING] * 3
    assert not bool(torch.isfinite(watch.gradients[0]).all())
    assert all(bool(torch.isfinite(one).all()) for one in watch.gradients[1:])
    before, after_skip, _, after_step, *_ = watch.adapters
    assert torch.equal(before, after_skip) and not torch.equal(after_skip, after_step)
    assert watch.rates[0] == watch.rates[1] > watch.rates[2]  # a skipped step costs no rate
    assert built.state.global_step == 3


@pytest.mark.parametrize("scale", [FITTING, TOO_LARGE])
def test_a_loss_that_is_no_number_stops_the_run_all_the_same(make_fp16, tmp_path, loss, scale):
    watch = Watch()
    built, *_ = build(make_fp16(), T4, tmp_path, watch)
    with torch.no_grad():  # logits beyond 65504, the largest number of fp16
        built.model.get_base_model().model.norm.weight.mul_(3e4)
        built.model.get_base_model().lm_head.weight.mul_(1e3)
    with pytest.raises(TrainingDiverged, match=r"step 3: the loss is not .*scaler") as error:
        scaled(built, scale).train()
    assert "first in the output of" in str(error.value)
    assert not watch.gradients and built.state.global_step == 2  # the optimizer was given nothing


# --- the whole story


@pytest.fixture
def on_a_t4(monkeypatch):
    """The story's machine is a T4; each trainer it builds gets a scaler, with the next of some scales."""

    def on_a_t4(*scales):
        left, real = list(scales), sft.build
        monkeypatch.setattr(hardware, "card", lambda: T4)
        monkeypatch.setattr(
            sft, "build", lambda *args, **settings: scaled(real(*args, **settings), left.pop(0))
        )

    return on_a_t4


def test_a_run_on_a_t4_trains_answers_and_proves_its_adapter(make_fp16, on_a_t4):
    """The first save comes after a skipped step: B is zero then, and nobody's fault."""
    on_a_t4(TOO_LARGE)
    recipe = make_fp16(
        train__max_steps=8, train__save_steps=1, train__eval_steps=4, eval__generate=2,
        data__held_out_fraction=0.2,
    )  # fmt: skip
    run = trainer.train(recipe, console=Console(quiet=True))
    environment = rundir.read_json(run.dir / "environment.json")
    assert environment["base"]["attention"] == WITHOUT_GQA
    assert environment["base"]["compute_dtype"] == "float16"
    assert run.result["alive"]["largest_b"] > 0 and run.result["base_unchanged"]
    after, before = run.result["after"], run.result["before"]
    assert after["held_out_loss"] < before["held_out_loss"]
    assert after["answered"] == 2
    first, *others = [line for line in run.metrics() if "loss" in line]
    assert first["grad_norm"] is None and all(line["grad_norm"] > 0 for line in others)


def test_a_resumed_run_goes_on_with_the_scale_it_had(make_fp16, on_a_t4, monkeypatch, tmp_path):
    """Bit for bit: a scale that began anew would skip a step that the whole run did not."""
    finals = []
    for name, interrupted in (("whole", False), ("broken", True)):
        recipe = make_fp16(run__dir=str(tmp_path / name), train__save_steps=2)
        on_a_t4(TOO_LARGE, TOO_LARGE)
        if interrupted:
            with monkeypatch.context() as patched:
                patched.setattr(StepGuard, "on_step_end", stop_after(3), raising=False)
                with pytest.raises(Interrupted):
                    trainer.train(recipe, console=Console(quiet=True))
            (started,) = (tmp_path / name / "tiny").iterdir()
            run = trainer.train(recipe, resume=started, console=Console(quiet=True))
        else:
            run = trainer.train(recipe, console=Console(quiet=True))
        finals.append((run.adapter / "adapter_model.safetensors").read_bytes())
        monkeypatch.undo()
    assert finals[0] == finals[1]


def test_the_gradient_is_the_same_in_every_layout_on_a_t4(make_fp16, on_a_t4):
    on_a_t4(*[FITTING] * len(CASES))
    report = selftest.examine(make_fp16(), Console(quiet=True))
    assert report.attention == WITHOUT_GQA and report.dtype == "float16"
    assert len(report.findings) == len(CASES) and not any(f.unused for f in report.findings)
    assert not report.failed


def stop_after(steps):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == steps:
            raise KeyboardInterrupt

    return on_step_end
