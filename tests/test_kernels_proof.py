"""The proof of fused layers on the machine at hand: what passes, what is found out, no trace."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fused_models import CPU, FAMILIES, LAYERS, family, fused, is_bare, make, packed_batch

from qlora.kernels import attention, ops, proof
from qlora.kernels.attached import detach, fuse, head_of
from qlora.kernels.family import NotFused
from qlora.kernels.projection import Projection
from qlora.kernels.proof import prove

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = packed_batch(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_proof_passes_for_every_family(kind: str, dtype: torch.dtype) -> None:
    model = family(kind, dtype)
    with fused(model) as attached:
        proof = prove(model, attached, head_of(model), ASKED)
    adapters = 4 if kind == "phi3" else 7
    kinds = 2 if kind in ("qwen2", "gemma2", "gemma3_text", "smollm3") else 1
    assert proof.compared >= kinds * 2 * (2 + 2 * adapters)
    eps = torch.finfo(dtype).eps
    assert eps / 100 < proof.error < 8 * eps and "of the libraries' own" in str(proof)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_a_proof_leaves_no_trace(
    training: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("gemma3_text", lora_dropout=0.3).train(training)
    frozen = model.get_input_embeddings().train(not training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates and set(rates) == {0.3}
    if fails:
        monkeypatch.setattr(ops, "gated_backward_", lambda *_: torch.zeros(1) @ torch.zeros(2))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with fused(model) as attached:
        hung = [module.forward for module in attached]
        if fails:
            with pytest.raises(NotFused):
                prove(model, attached, head_of(model), ASKED)
        else:
            prove(model, attached, head_of(model), ASKED)
        assert [module.forward for module in attached] == hung
        assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert frozen.training is not training
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == rates
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def scaled(factor: float) -> Callable[..., Any]:
    real = ops.rms_norm_backward
    return lambda *args, **options: real(*args, **options) * factor


def quietly_wrong(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: real(*args, **options).mul_(1.02)


BROKEN: dict[str, tuple[Any, str, Callable[[], Any], str]] = {
    "a norm's gradient": (ops, "rms_norm_backward", lambda: scaled(1.01), "relative error of 0.02"),
    "no number": (ops, "rms_norm_backward", lambda: scaled(float("nan")), "relative error of nan"),
    "infinite": (ops, "rms_norm_backward", lambda: scaled(float("inf")), "relative error of"),
    "alpha": (Projection, "scaling", lambda: 1.6, "relative error of"),
    "the gradient of x A": (
        Projection, "inner_gradient", lambda: quietly_wrong(Projection.inner_gradient),
        "relative error of 0.02",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_computes_something_else_is_found_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, attribute, wrong, words = BROKEN[name]
    model = family("llama")
    with fused(model) as attached:
        prove(model, attached, head_of(model), ASKED)
        monkeypatch.setattr(holder, attribute, wrong())
        with pytest.raises(NotFused, match=words):
            prove(model, attached, head_of(model), ASKED)


FAILURES = {
    "RuntimeError: no kernel image is available": RuntimeError("no kernel image is available\nmore"),
    "OutOfMemoryError: CUDA out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "ModuleNotFoundError: No module named 'triton'": ModuleNotFoundError("No module named 'triton'"),
    "AssertionError: a stride": AssertionError("a stride"),
    # what Triton raises where no C compiler works, and where its own does not
    "CalledProcessError: Command 'gcc' returned": subprocess.CalledProcessError(1, "gcc"),
    "FileNotFoundError: gcc": FileNotFoundError("gcc"),
    "Exception: compiler error": Exception("compiler error"),
}  # fmt: skip


def test_a_layer_without_an_adapter_does_not_stand_for_those_that_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama", target_modules=["q_proj"], layers_to_transform=[1])
    with fused(model) as attached:
        prove(model, attached, head_of(model), ASKED)
        monkeypatch.setattr(Projection, "inner_gradient", quietly_wrong(Projection.inner_gradient))
        with pytest.raises(NotFused, match=r"relative error of 0.02"):
            prove(model, attached, head_of(model), ASKED)


@pytest.mark.parametrize("words", FAILURES)
def test_a_kernel_that_fails_is_left_out_with_its_words(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise FAILURES[words]

    monkeypatch.setattr(ops, "gated", fails)
    model = family("llama")
    with fused(model) as attached, pytest.raises(NotFused, match="fail on this machine: " + words):
        prove(model, attached, head_of(model), ASKED)


def test_a_proof_is_not_passed_by_a_layer_whose_attention_mixes_packed_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = family("llama")
    monkeypatch.setattr(attention, "_bias", lambda scores, dtype: None)
    with fused(model) as attached, pytest.raises(NotFused, match="relative error of"):
        prove(model, attached, head_of(model), ASKED)


def test_what_fails_its_proof_is_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    made = fuse(model, CPU, [1] * LAYERS, None, 64, ASKED)
    assert made.attached and made.proof.compared and not is_bare(model)
    assert made.head is not None and made.head.width == model.config.vocab_size
    detach(made.attached)
    monkeypatch.setattr(ops, "rms_norm_backward", scaled(2))
    with pytest.raises(NotFused):
        fuse(model, CPU, [1] * LAYERS, None, 64, ASKED)
    assert is_bare(model)


# --- what else is fused


def wrong_loss(*arguments: Any, **named: Any) -> torch.Tensor:
    losses = ops.torch.ops.qlora.cross_entropy_(
        *arguments, named.get("softcap", 0.0), named.get("scale", 1.0)
    )
    arguments[0].mul_(1.01)
    return losses


def another_mask_each_time(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, p)


@pytest.mark.parametrize(
    ("name", "broken", "part"),
    [("cross_entropy_", wrong_loss, "loss"), ("dropout", another_mask_each_time, "dropout")],
)
def test_a_wrong_loss_and_a_dropout_without_memory_are_refused(
    name: str, broken: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", lora_dropout=0.1)
    monkeypatch.setattr(ops, name, broken)
    with pytest.raises(NotFused, match=rf"something else on this machine \({part}\)"):
        fuse(model, CPU, [1] * LAYERS, None, 64, ASKED)
    assert is_bare(model)


class Windowed:
    """A card's kernel in plain torch: bounds and windows as masks, the window off by some positions."""

    def __init__(self, off: int = 0) -> None:
        self.off = off

    def asked(self, q: torch.Tensor, scores: attention.Scores) -> attention.Scores:
        assert scores.bounds is not None and scores.window is not None
        at = torch.arange(q.shape[1])
        row = torch.bucketize(at, scores.bounds.offsets[1:].long(), right=True)
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < scores.window + self.off) & (row[:, None] == row)
        return attention.Scores(scores.scale, mask=seen[None, None])

    def forward(self, q: Any, k: Any, v: Any, scores: attention.Scores) -> Any:
        return attention.CpuFlash().forward(q, k, v, self.asked(q, scores))

    def backward(self, do: Any, q: Any, *rest: Any) -> Any:
        *others, scores = rest
        return attention.CpuFlash().backward(do, q, *others, self.asked(q, scores))


@pytest.mark.parametrize(("off", "holds"), [(0, True), (1, False), (-1, False)])
def test_a_cards_window_is_tried_on_rows_that_are_longer(off: int, holds: bool) -> None:
    model = make("llama")
    with fused(model, 1) as attached:
        parts = attached[0].forward.parts
        kernel = attention.OnCuda(Windowed(off), attention.Efficient())
        hidden = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
        torch.manual_seed(0)
        errors = list(proof._of_window(replace(parts, attention=kernel), hidden))
    assert len(errors) == 4
    assert (max(errors) <= proof.TOLERANCE[torch.bfloat16]) == holds
