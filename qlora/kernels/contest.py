"""Which attention kernel is the fastest on this card, for packed rows of this model: tried, not assumed.

Every candidate passes the same rows forward and backward, in turns, against the clock. One that fails or
gives another gradient than the first is out, and that is told.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qlora.kernels.attention import Bounds, Kernel, Scores

TURNS = 7  # the median of them; the first of each is left out, it compiles and loads
TOLERANCE = 0.05  # of the gradients' norm, between two 16-bit kernels


@dataclass(frozen=True)
class Contest:
    """The fastest kernel, and the milliseconds of all of them, or why one is out."""

    winner: Kernel
    said: str


def fastest(
    candidates: dict[str, Kernel],
    shapes: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Contest:
    """Let kernels race over packed rows.

    Args:
        candidates: By name; the first one is what the others are compared with.
        shapes: Heads, key heads, and elements of a head.
        tokens: Of the sequence, in four rows of equal length.
        dtype: Of queries, keys and values.
        device: The card.
        clock: Seconds.
    """
    heads, kv_heads, dim = shapes
    tokens = max(4, tokens // 4 * 4)
    offsets = torch.arange(0, tokens + 1, tokens // 4, dtype=torch.int32, device=device)
    scores = Scores(dim**-0.5, bounds=Bounds(offsets, tokens // 4))
    generator = torch.Generator().manual_seed(0)  # the run's own random state stays as it is

    def drawn(count: int) -> torch.Tensor:
        made = torch.randn(1, tokens, count, dim, generator=generator, dtype=torch.float)
        return made.to(device, dtype)

    q, k, v, do = drawn(heads), drawn(kv_heads), drawn(kv_heads), drawn(heads)

    def passed(kernel: Kernel) -> tuple[torch.Tensor, ...]:
        o, saved = kernel.forward(q, k, v, scores)
        return kernel.backward(do, q, k, v, o, saved, scores)

    seconds: dict[str, list[float]] = {}
    out: dict[str, str] = {}
    first: tuple[torch.Tensor, ...] | None = None
    for turn in range(TURNS + 1):
        for name in [name for name in candidates if name not in out]:
            try:
                _wait(device)
                began = clock()
                gradients = passed(candidates[name])
                _wait(device)
            except (RuntimeError, NotImplementedError) as error:
                out[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
                continue
            if turn:
                seconds.setdefault(name, []).append(clock() - began)
            elif first is None:
                first = gradients
            elif not (apart := _apart(gradients, first)) <= TOLERANCE:
                out[name] = f"gradients differ by {apart:.2g}"
    medians = {name: statistics.median(times) for name, times in seconds.items() if name not in out}
    if not medians:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in out.items()))
    ranked = sorted(medians, key=medians.__getitem__)
    said = ", ".join(f"{name} {medians[name] * 1e3:.2f} ms" for name in ranked)
    left = "".join(f"; {name} is out: {why}" for name, why in out.items())
    return Contest(candidates[ranked[0]], f"{said} for {tokens:,} packed tokens{left}")


def _apart(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    shares = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return max(shares, key=lambda share: (share != share, share))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
