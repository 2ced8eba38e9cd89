"""What is counted of a step: arithmetic, launches, unpacked weights and waits of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from qlora.bnb import bnb
from qlora.counting import WorkCounter
from qlora.kernels import ops
from qlora.kernels.attention import CpuFlash, Efficient, Flash, Kernel, Scores
from qlora.kernels.projection import Projection
from qlora.tracing import inside_attention


def counted(work: Callable[[], Any]) -> WorkCounter:
    with WorkCounter() as counter:
        work()
    return counter


N, IN, OUT = 24, 64, 128
LINEAR = 2 * N * IN * OUT  # a multiplication and an addition each


def products() -> dict[str, Callable[[], Any]]:
    x, w, b, y = torch.ones(N, IN), torch.ones(OUT, IN), torch.ones(OUT), torch.ones(N, OUT)
    return {
        "linear": lambda: functional.linear(x, w),
        "linear with a bias": lambda: functional.linear(x, w, b),
        "mm": lambda: torch.mm(x, w.T),
        "addmm": lambda: torch.addmm(y, x, w.T, alpha=3),
        "in place": lambda: y.addmm_(x, w.T),
        "batched": lambda: torch.bmm(x.view(2, N // 2, IN), w.T.expand(2, IN, OUT)),
    }


@pytest.mark.parametrize("name", products())
def test_a_product_costs_two_operations_for_each_pair_and_one_launch(name: str) -> None:
    found = counted(products()[name])
    assert found.flops == LINEAR
    assert sum(found.launches.values()) == 1 and found.unpacked == found.host_reads == 0


def test_the_passes_of_a_linear_cost_three_times_the_forward_one() -> None:
    x = torch.ones(N, IN, requires_grad=True)
    w = torch.ones(OUT, IN, requires_grad=True)
    assert counted(lambda: functional.linear(x, w).sum().backward()).flops == 3 * LINEAR


B, T, H, D = 2, 32, 4, 16


@pytest.mark.parametrize("kernel", [CpuFlash(), Flash(), Efficient()])
def test_causal_attention_costs_half_of_its_square(kernel: Kernel) -> None:
    square = 2 * B * H * T * T * D  # of one product
    with FakeTensorMode():
        q = torch.empty(B, T, H, D, dtype=torch.bfloat16)
        k, v = (torch.empty(B, T, H // 2, D, dtype=torch.bfloat16) for _ in "kv")
        scores = Scores(0.25)
        with WorkCounter() as forward:
            o, saved = kernel.forward(q, k, v, scores)
        with WorkCounter() as backward:
            kernel.backward(torch.empty_like(o), q, k, v, o, saved, scores)
    assert forward.flops == 2 * square / 2
    assert backward.flops == 5 * square / 2  # the scores again, and four gradients


def test_sdpa_on_a_cpu_counts_like_the_kernel_below_it() -> None:
    q = torch.randn(B, H, T, D, requires_grad=True)

    def passes() -> None:
        functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    assert counted(passes).flops == 7 * B * H * T * T * D


VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "view": lambda x: x.view(-1),
    "transpose": lambda x: x.T,
    "slice": lambda x: x[1:3, 2:],
    "split": lambda x: x.split(2),
    "chunk": lambda x: x.chunk(2, 1),
    "expand": lambda x: x[None].expand(3, -1, -1),
    "detach": lambda x: x.detach(),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "reshape": lambda x: x.reshape(-1, 2),
    "empty": lambda x: torch.empty_like(x),
}


@pytest.mark.parametrize("name", VIEWS)
def test_looking_at_a_tensor_differently_launches_nothing(name: str) -> None:
    x = torch.ones(4, 8)
    found = counted(lambda: VIEWS[name](x))
    assert not found.launches and found.flops == 0


def test_a_reshape_that_must_copy_and_elementwise_work_are_launches() -> None:
    x = torch.ones(4, 8)
    assert counted(lambda: x.T.reshape(-1)).launches == {"clone": 1}
    assert counted(lambda: (x + 1).mul_(2)).launches == {"add": 1, "mul_": 1}
    assert counted(lambda: x.to(torch.bfloat16)).launches == {"_to_copy": 1}


def test_a_seed_that_stays_on_the_host_is_no_launch() -> None:
    seed = torch.tensor([5])
    with WorkCounter() as counter:
        seed.to(torch.int64, copy=True)
    assert not counter.launches


def test_each_value_that_the_host_waits_for_is_counted() -> None:
    x = torch.arange(4.0)
    assert counted(lambda: (x[0].item(), float(x[1]), bool(x[2] > 0))).host_reads == 3
    assert counted(lambda: x.sum()).host_reads == 0


def linear4bit() -> Any:
    linear = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    linear.compute_type_is_set = True
    linear.support_avx512bf16_for_cpu = False
    return linear.to("cpu")


def test_unpacked_weights_are_counted_by_both_ways_to_unpack() -> None:
    linear, x = linear4bit(), torch.ones(N, IN)
    projection = Projection(linear)
    ours = counted(lambda: projection.forward(x, None, None))
    assert ours.unpacked == OUT * IN and ours.flops == LINEAR
    assert ours.launches == {"unpack": 1, "mm": 1}
    theirs = counted(lambda: linear(x))
    assert theirs.unpacked == OUT * IN and theirs.flops == LINEAR


def test_fake_tensors_count_like_real_ones() -> None:
    def work(make: Callable[..., torch.Tensor]) -> WorkCounter:
        gate, up, weight = make(N, IN), make(N, IN), make(OUT, IN)

        def layer() -> None:
            product = ops.gated(gate, up, ops.SILU)
            normed, rstd = ops.rms_norm(product, weight[0], 1e-6)
            dy = torch.mm(torch.mm(normed, weight.T), weight)
            dx = ops.rms_norm_backward(dy, product, weight[0], rstd)
            ops.gated_backward_(dx, gate, up, ops.SILU)

        return counted(layer)

    real = work(torch.ones)
    with FakeTensorMode():
        fake = work(torch.empty)
    assert real.launches == fake.launches and real.flops == fake.flops == 2 * LINEAR
    assert sum(real.launches.values()) == 6


def test_what_a_cards_attention_allocates_inside_is_counted_while_it_works() -> None:
    q, k = (
        torch.empty(1, 256, 8, 40, dtype=torch.bfloat16),
        torch.empty(1, 256, 2, 40, dtype=torch.bfloat16),
    )
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    sums, tokens = 4 * 256 * 8, 256
    flash = inside_attention("_flash_attention_backward", q, k, offsets)
    assert (
        flash == sums + 4 * (tokens + 2 * 128) * 8 * 64 + 2 * q.nbytes
    )  # heads of 40 are laid out as 64
    alone = inside_attention("_flash_attention_backward", q, q, None)
    assert alone == sums + 4 * (tokens + 128) * 8 * 64
    assert inside_attention("efficient_attention_backward", q, k, offsets) == sums + 4 * q.numel()
