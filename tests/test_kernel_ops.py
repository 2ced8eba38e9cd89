"""The elementwise operators on a CPU, against autograd of their formulas in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from qlora.bnb import bnb
from qlora.kernels import ops
from qlora.kernels.projection import Pair, Projection

N, WIDTH = 21, 96
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether each number is the exact one, rounded once to its dtype (or as good as that in fp32)."""
    eps = torch.finfo(found.dtype).eps
    slack = 8 if found.dtype == torch.float32 else 0.51
    scale = exact.abs().clamp(min=exact.abs().mean() * (1 if slack > 1 else 1e-2))
    return bool(((found.double() - exact).abs() <= slack * eps * scale).all())


# --- RMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm_and_its_gradient_are_those_of_the_formula(
    adds: bool, offset: float, dtype: torch.dtype
) -> None:
    x, dy = (random(N, WIDTH, dtype=dtype, seed=i) for i in range(2))
    weight = random(WIDTH, dtype=dtype)
    x[3] *= 100
    add = random(N, WIDTH, dtype=dtype, seed=9) if adds else None
    leaf = x.double().requires_grad_()
    norm = leaf.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    exact = leaf * norm * (weight.double() + offset)
    (gradient,) = torch.autograd.grad(exact, [leaf], dy.double())
    y, rstd = ops.rms_norm(x, weight, 1e-5, offset=offset, add=add)
    assert rstd.dtype == torch.float32 and close(rstd, norm.detach()[:, 0])
    added = 0 if add is None else add.double()
    assert y.dtype == dtype and close(y, exact.detach() + added)
    dx = ops.rms_norm_backward(dy, x, weight, rstd, offset=offset, add=add)
    assert dx.dtype == dtype and close(dx, gradient + added)


def test_a_row_of_zeros_is_normed_to_zeros() -> None:
    y, rstd = ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6)
    assert not bool(y.any()) and rstd.tolist() == pytest.approx([1e3, 1e3])


# --- rotary position embedding


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """transformers' own formula, for a rotation of the first R elements."""
    r = cos.shape[-1]
    repeats = len(x) // len(cos)
    c, s = (t.double().repeat(repeats, 1)[:, None] for t in (cos, sin))
    moved, rest = x[..., :r].double(), x[..., r:].double()
    half = torch.cat([-moved[..., r // 2 :], moved[..., : r // 2]], -1)
    return torch.cat([moved * c + half * s, rest], -1)


def angles(rows: int, width: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    angle = random(rows, width // 2).repeat(1, 2)
    return angle.cos() * factor, angle.sin() * factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_rotary_turns_in_place_and_only_what_it_should(
    strided: bool, repeats: int, rotated: int, dtype: torch.dtype
) -> None:
    rows, heads, keys, width = 5 * repeats, 4, 2, 16
    if strided:  # q, k and v side by side in one matrix, as Phi-3 makes them
        whole = random(rows, (heads + 2 * keys) * width, dtype=dtype)
        parts = whole.split((heads * width, keys * width, keys * width), 1)
        q, k, v = (x.unflatten(1, (-1, width)) for x in parts)
    else:
        q, k, v = (random(rows, n, width, dtype=dtype, seed=n) for n in (heads, keys, 1))
    cos, sin = angles(5, rotated, factor=1.3)
    exact, untouched = [turned(x, cos, sin) for x in (q, k)], v.clone()
    ops.rotary_(q, k, cos, sin)
    assert close(q, exact[0]) and close(k, exact[1]) and torch.equal(v, untouched)


def test_rotated_back_is_the_transposed_map() -> None:
    cos, sin = angles(6, 16, factor=1.3)
    q, k, dq, dk = (random(6, 2, 16, seed=i) for i in range(4))
    leaves = [x.double().requires_grad_() for x in (q, k)]
    out = [turned(x, cos, sin) for x in leaves]
    exact = torch.autograd.grad(out, leaves, [dq.double(), dk.double()])
    ops.rotary_(dq, dk, cos, sin, inverse=True)
    assert close(dq, exact[0]) and close(dk, exact[1])


# --- gated MLP


FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    ops.SILU: lambda x: x / (1 + torch.exp(-x)),
    ops.GELU_TANH: lambda x: (
        x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("halves", [False, True])
def test_gated_and_its_gradients_are_those_of_the_formula(
    halves: bool, kind: str, dtype: torch.dtype
) -> None:
    whole = random(N, 2 * WIDTH, dtype=dtype) * 3
    gate, up = whole.chunk(2, 1) if halves else (x.contiguous() for x in whole.chunk(2, 1))
    d = random(N, WIDTH, dtype=dtype, seed=5)
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    exact = FORMULAS[kind](leaves[0]) * leaves[1]
    gradients = torch.autograd.grad(exact, leaves, d.double())
    product = ops.gated(gate, up, kind)
    assert product.is_contiguous() and product.dtype == dtype
    allowed = max(torch.finfo(dtype).eps, 1e-6)
    assert float((product.double() - exact.detach()).norm() / exact.detach().norm()) <= allowed
    ops.gated_backward_(d, gate, up, kind)
    for found, right in zip((d, gate, up), (exact.detach(), *gradients), strict=True):
        assert float((found.double() - right).norm() / right.norm()) <= allowed
    if halves:
        assert torch.equal(whole, torch.cat([gate, up], 1))


@pytest.mark.parametrize("kind", FORMULAS)
def test_far_out_the_gate_is_open_or_shut(kind: str) -> None:
    gate, up = torch.tensor([[-200.0, 200.0]]), torch.tensor([[3.0, 3.0]])
    d = torch.ones(1, 2)
    ops.gated_backward_(d, gate, up, kind)
    assert d.tolist() == [[0, 600]] and gate.tolist() == [[0, 3]] and up.tolist() == [[0, 200]]


# --- NF4


def packed(out: int, width: int, *, nested: bool, dtype: torch.dtype = torch.float32) -> Any:
    linear = bnb.nn.Linear4bit(width, out, bias=False, quant_type="nf4", compress_statistics=nested)
    weight = random(out, width).to(dtype) * torch.linspace(0.1, 3, out, dtype=dtype)[:, None]
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return linear.to("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_is_unpacked_as_bitsandbytes_does(nested: bool, dtype: torch.dtype) -> None:
    weight = packed(256, 128, nested=nested, dtype=dtype).weight
    state = weight.quant_state
    assert state.nested == nested
    own = bnb.functional.dequantize_4bit(weight.data, state)
    found = ops.unpack(weight.data, state, dtype)
    assert own.dtype == found.dtype == dtype and found.shape == (256, 128)
    assert torch.equal(found, own)


@pytest.mark.parametrize("nested", [True, False])
def test_rows_are_unpacked_as_they_are_in_the_whole(nested: bool) -> None:
    weight = packed(512, 128, nested=nested).weight
    whole = ops.unpack(weight.data, weight.quant_state, torch.float32)
    for first, last in ((0, 128), (128, 256), (256, 512), (0, 512)):
        rows = slice(first, last)
        found = ops.unpack(weight.data, weight.quant_state, torch.float32, rows)
        assert torch.equal(found, whole[rows])


@pytest.mark.parametrize("out, cuts", [(512, 2), (256, 2), (192, 1), (129, 1)])
def test_a_weight_is_cut_at_whole_blocks_of_nested_scales_or_not_at_all(
    out: int, cuts: int
) -> None:
    projection = Projection(packed(out, 128, nested=True))
    found = projection._cuts(2)
    assert len(found) == cuts
    rows = [row for cut in found for row in range(out)[cut]]
    assert rows == list(range(out))
    dy = random(N, out)
    parts, _ = projection.input_gradient(dy, None, None, pieces=2)
    whole, _ = projection.input_gradient(dy, None, None)
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-4)


def test_a_gradient_is_added_to_what_was_there() -> None:
    projection = Projection(packed(512, 128, nested=True))
    dy, there = random(N, 512), random(N, 128)
    alone, _ = projection.input_gradient(dy, None, None)
    for pieces in (1, 2):
        into = there.clone()
        found, _ = projection.input_gradient(dy, None, None, into=into, pieces=pieces)
        assert found is into and torch.allclose(found, alone + there, rtol=1e-5, atol=1e-4)


# --- dropout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_a_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    rows, width = 200, 500
    ones = torch.ones(rows, width, dtype=dtype)
    found = ops.dropout(ones, p, torch.tensor([11])).double()
    kept = found != 0
    deviation = (p * (1 - p) / (rows * width)) ** 0.5
    assert abs(float((~kept).double().mean()) - p) < 5 * deviation
    assert torch.allclose(found[kept], torch.tensor(1 / (1 - p)).double(), rtol=1e-2)
    for dim in (0, 1):  # and neither rows nor columns are favoured
        others = (rows, width)[1 - dim]
        share = (~kept).double().mean(1 - dim)
        assert float((share - p).abs().max()) < 6 * (p * (1 - p) / others) ** 0.5


def test_a_mask_follows_from_its_seed_and_dropout_is_its_own_gradient() -> None:
    x, seed = random(N, WIDTH), torch.tensor([2**61 + 3])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = ops.dropout(x, 0.3, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, ops.dropout(x, 0.3, seed.clone()))
    mask = ops.dropout(torch.ones_like(x), 0.3, seed)
    assert torch.equal(found, x * mask)
    neighbour = ops.dropout(torch.ones_like(x), 0.3, seed + 1)
    agree = float(((mask != 0) == (neighbour != 0)).double().mean())
    assert (
        abs(agree - (0.3**2 + 0.7**2)) < 0.06
    )  # as two masks that have nothing to do with each other
    assert torch.equal(ops.dropout(x, 0.0, seed), x)


# --- cross entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_logits_become_their_gradients(scale: float, softcap: float, dtype: torch.dtype) -> None:
    logits = random(N, 50, dtype=dtype) * 4
    labels = torch.randint(50, (N,), generator=torch.Generator().manual_seed(0))
    leaf = logits.double().requires_grad_()
    capped = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    exact = functional.cross_entropy(capped, labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), [leaf])
    losses = ops.cross_entropy_(logits, labels, softcap=softcap, scale=scale)
    assert losses.dtype == torch.float32 and torch.allclose(
        losses.double(), exact.detach(), rtol=1e-5
    )
    error = (logits.double() - scale * gradient).norm() / (scale * gradient).norm()
    assert float(error) <= max(torch.finfo(dtype).eps, 1e-6)


def test_logits_may_be_large_or_forbidden() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-torch.inf, 1.0, 1.0]])
    labels = torch.tensor([1, 2])
    losses = ops.cross_entropy_(logits, labels)
    assert losses.tolist() == pytest.approx([6e4, 0.6931472])
    assert logits.tolist() == [[1, -1, 0], [0, 0.5, -0.5]]


# --- as torch sees them


def every_call() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, weight = random(N, 64), random(64)
    q, k = random(N, 2, 32), random(N, 1, 32)
    nested, flat = (packed(256, 128, nested=n).weight for n in (True, False))
    state, plain = nested.quant_state, flat.quant_state
    op = torch.ops.qlora
    return {
        "rms_norm": (op.rms_norm, (x, weight, 1e-6, 0.0, None)),
        "rms_norm, added": (op.rms_norm, (x, weight, 1e-6, 1.0, x + 1)),
        "rms_norm_backward": (op.rms_norm_backward, (x, x + 1, weight, random(N).abs(), 1.0, None)),
        "rotary_": (op.rotary_, (q, k, *angles(N, 32), False)),
        "gated": (op.gated, (x, x + 1, ops.SILU)),
        "gated, halves": (op.gated, (*random(N, 128).chunk(2, 1), ops.GELU_TANH)),
        "gated_backward_": (op.gated_backward_, (x, x + 1, x + 2, ops.SILU)),
        "unpack": (
            op.unpack,
            (
                nested.data, state.absmax, state.code, state.offset, state.state2.absmax,
                state.state2.code, 64, 256, [256, 128], torch.bfloat16,
            ),
        ),
        "unpack, not nested": (
            op.unpack,
            (
                flat.data, plain.absmax, plain.code, None, None, None, 64, 0, [256, 128],
                torch.float32,
            ),
        ),
        "dropout": (op.dropout, (x, 0.5, torch.tensor([3]))),
        "dropout of a part": (op.dropout, (x[:, 3:9], 0.5, torch.tensor([3]))),
        "cross_entropy_": (op.cross_entropy_, (x, torch.arange(N), 3.0, 2.0)),
    }  # fmt: skip


@pytest.mark.parametrize("name", every_call())
def test_an_operator_changes_what_its_schema_says_and_has_the_shapes_it_tells_a_trace(
    name: str,
) -> None:
    operator, arguments = every_call()[name]
    torch.library.opcheck(
        operator.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_every_operator_was_checked() -> None:
    defined = {n for n in dir(ops) if not n.startswith("_") and hasattr(torch.ops.qlora, n)}
    assert len(defined) == 8
    assert defined == {name.partition(",")[0].partition(" of")[0] for name in every_call()}


# --- a projection


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_projection_is_a_linear_with_an_adapter(biased: bool, adds: bool) -> None:
    class Wrapper:
        scaling, lora_dropout = {"default": 1.7}, {"default": torch.nn.Identity()}

    base = torch.nn.Linear(64, 96, bias=biased).requires_grad_(False)
    pair = Pair(random(8, 64), random(96, 8))
    x, dy, add = random(N, 64), random(N, 96), random(N, 96) if adds else None
    leaves = [t.double().requires_grad_() for t in (x, pair.a, pair.b)]
    exact = functional.linear(
        leaves[0], base.weight.double(), base.bias.double() if biased else None
    )
    exact = exact + 1.7 * leaves[0] @ leaves[1].T @ leaves[2].T
    gradients = torch.autograd.grad(exact, leaves, dy.double())
    projection = Projection(base, Wrapper())
    residual = None if add is None else add.clone()
    y, inner = projection.forward(x, pair, None, add=add)
    again, same = projection.forward(x, pair, None, add=add, inner=inner)
    assert torch.equal(y, again) and same is inner and inner is not None and inner.shape == (N, 8)
    assert add is None or torch.equal(add, residual)  # type: ignore[arg-type]
    right = exact.detach() + (0 if add is None else add)
    dx, dinner = projection.input_gradient(dy, pair, None)
    assert dinner is not None and torch.equal(dinner, projection.inner_gradient(dy, pair))
    da, db = projection.weight_gradients(x, dy, inner, dinner, None)
    for found, wanted in zip((y, dx, da, db), (right, *gradients), strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


def test_a_product_scaled_in_one_launch_reads_nothing_of_the_empty_matrix_it_is_added_to() -> None:
    class Wrapper:
        scaling, lora_dropout = {"default": 2.0}, {"default": torch.nn.Identity()}

    projection = Projection(torch.nn.Linear(4, 4), Wrapper())
    x = torch.ones(2, 4)
    x.new_empty = lambda *shape: torch.full(shape, torch.nan)  # type: ignore[method-assign]
    assert torch.equal(projection._scaled(x, torch.ones(4, 3)), torch.full((2, 3), 8.0))


def test_a_trace_of_a_layers_operators_needs_no_data() -> None:
    with FakeTensorMode():
        x = torch.empty(N, 64, dtype=torch.bfloat16)
        y, rstd = ops.rms_norm(x, torch.empty(64), 1e-6)
        losses = ops.cross_entropy_(x, torch.empty(N, dtype=torch.long))
    assert y.dtype == torch.bfloat16 and rstd.dtype == losses.dtype == torch.float32
    assert y.shape == x.shape and rstd.shape == losses.shape == (N,)
