"""The Triton operators against the plain ones: interpreted on a CPU, and as they run on a card.

Triton's interpreter must be chosen before Triton is imported, so a process of its own (this file, run as
a script) works through the checks, and the tests read what it found. It rounds bf16 down: fp32 alone.
It accepts more than the compiler does, which needs no card either: another process compiles everything.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora.bnb import bnb
from qlora.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
NAMES = [
    "rms_norm", "rms_norm_backward", "rotary_", "gated", "gated_backward_", "unpack", "dropout",
    "cross_entropy_",
]  # fmt: skip


def storage(x: torch.Tensor) -> torch.Tensor:
    """Everything that a tensor is a view of: what lies between its rows must not change."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def flat(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        elif isinstance(value, torch.Tensor):
            yield storage(value)


@dataclass(frozen=True)
class Place:
    """Where the operators run, in what dtype, and whether at the widths of real models."""

    device: str
    dtype: torch.dtype
    real: bool

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers, drawn on the CPU."""
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.dtype)

    def sent(self, x: Any) -> Any:
        """A copy on the device, with the strides and the surroundings of the original."""
        if not isinstance(x, torch.Tensor):
            return x
        copy = storage(x).to(self.device, copy=True)
        return copy.as_strided(x.shape, x.stride(), x.storage_offset())

    def run(self, name: str, *args: Any) -> Any:
        if self.device == "cuda":
            return getattr(torch.ops.qlora, name)(*args)
        from qlora.kernels import triton_ops  # interpreted: what would be dispatched to

        return getattr(triton_ops, name)(*args)

    def compare(self, name: str, *args: Any, exact: bool = False, atol: float = 2e-6) -> Any:
        """Results, and arguments afterwards, are those of the plain operator but for a rounding."""
        plain, ours = [INTERPRETED.sent(a) for a in args], [self.sent(a) for a in args]
        expected = getattr(ops, f"_{name}")(*plain)
        found = self.run(name, *ours)
        for ref, got in zip(flat([expected, *plain]), flat([found, *ours]), strict=True):
            eps = torch.finfo(ref.dtype).eps if ref.is_floating_point() else 0.0
            bounds = {"rtol": 0, "atol": 0} if exact else {"rtol": max(eps, 2e-5), "atol": atol}
            torch.testing.assert_close(got.cpu(), ref, **bounds)
        return found


INTERPRETED = Place("cpu", torch.float32, real=False)
CHECKS: dict[str, Callable[[Place], None]] = {}


def check(function: Callable[[Place], None]) -> Callable[[Place], None]:
    CHECKS[function.__name__] = function
    return function


@check
def norms(at: Place) -> None:
    # a head, a hidden size, and a row wider than what a program holds
    small, real = [(7, 5), (3, 70), (9, 257), (2, 17000)], [(8192, 128), (512, 4096), (3, 40000)]
    for (rows, width), offset, added in product(
        real if at.real else small, (0.0, 1.0), (False, True)
    ):
        x = at.random(rows, width + 16)[:, 8 : width + 8]
        weight, add = at.random(width), at.random(rows, width) if added else None
        _, rstd = at.compare("rms_norm", x, weight, 1e-5, offset, add)
        dy = at.random(rows, width + 1)[:, 1:]
        at.compare("rms_norm_backward", dy, x, weight, rstd.cpu(), offset, add)


@check
def rotary(at: Place) -> None:
    # tokens, positions, heads, key heads, head size, rotated: all of it, or a part (Phi, GLM)
    small = [(6, 3, 3, 1, 10, 10), (4, 4, 5, 2, 16, 6), (3, 1, 1, 1, 64, 64)]
    real = [(1024, 512, 32, 8, 128, 128), (512, 512, 28, 4, 128, 64), (300, 300, 8, 4, 256, 256)]
    for shape, inverse in product(real if at.real else small, (False, True)):
        tokens, positions, heads, key_heads, size, rotated = shape
        angle = torch.arange(positions)[:, None] / 10 ** torch.linspace(0, 4, rotated // 2)
        cos, sin = (f(angle).repeat(1, 2).to(at.dtype) for f in (torch.cos, torch.sin))
        fused = at.random(tokens, heads + 2 * key_heads, size)
        q, k = fused[:, :heads], fused[:, heads : heads + key_heads]
        at.compare("rotary_", q, k, cos, sin, inverse)
        q = at.random(heads, tokens, size).transpose(0, 1)  # heads first
        at.compare("rotary_", q, k, cos.float(), sin.float(), inverse)


@check
def gated_mlp(at: Place) -> None:
    small, real = [(5, 3), (3, 130), (2, 1500)], [(512, 14336), (64, 11008), (16, 28672)]
    for (rows, width), kind in product(real if at.real else small, (ops.SILU, ops.GELU_TANH)):
        # where tanh is near -1, GELU's fp32 sums cancel: either form is a few 1e-6 off
        atol = 5e-5 if kind == ops.GELU_TANH else 2e-6
        both = at.random(rows, 2 * width)
        gate, up = both[:, :width], both[:, width:]
        gate *= 3
        gate[0, :3] = torch.tensor([-60.0, 60.0, 0.0])
        at.compare("gated", gate, up, kind, atol=atol)
        at.compare("gated", gate.contiguous(), up, kind, atol=atol)
        at.compare("gated_backward_", at.random(rows, width), gate, up, kind, atol=atol)


@check
def unpack(at: Place) -> None:
    # bitsandbytes' CPU kernel is right where rows are whole blocks
    small = [(5, 128), (72, 256), (1, 128)]
    real = [(4096, 4096), (1024, 14336), (7, 14336)]
    for shape, nested, blocksize in product(real if at.real else small, (True, False), (64, 128)):
        packed, state = bnb.functional.quantize_4bit(
            at.random(*shape).float(),
            blocksize=blocksize,
            compress_statistics=nested,
            quant_type="nf4",
        )
        tail = [None, None, None]
        if nested:
            tail = [state.offset, state.state2.absmax, state.state2.code]
        size2 = state.state2.blocksize if nested else 0
        args = (packed, state.absmax, state.code, *tail, blocksize, size2, list(shape), at.dtype)
        at.compare("unpack", *args, exact=at.dtype == torch.float32)


@check
def unpack_an_odd_number_of_weights(at: Place) -> None:
    packed, state = bnb.functional.quantize_4bit(torch.randn(9, 23), blocksize=64, quant_type="nf4")
    args = (packed, state.absmax, state.code, None, None, None, 64, 0, [9, 23], torch.float32)
    nibbles = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], 1).flatten()[: 9 * 23].int()
    expected = state.code[nibbles] * state.absmax.repeat_interleave(64)[: 9 * 23]
    found = at.run("unpack", *(at.sent(a) for a in args))
    assert torch.equal(found.cpu(), expected.view(9, 23))
    words = at.run("unpack", *(at.sent(a) for a in (packed.flatten().view(torch.int16), *args[1:])))
    assert torch.equal(words, found)  # bnb_4bit_quant_storage


@check
def dropout(at: Place) -> None:
    rows, width = (2048, 4096) if at.real else (40, 1001)
    ones = at.sent(torch.ones(rows, width + 7, dtype=at.dtype))[:, :width]
    seeds = [torch.tensor(n) for n in (0, 1, 2**31, 2**40 + 1, -5)]
    masks = []
    for p, seed in [(0.25, seed) for seed in seeds] + [(0.9, seeds[0])]:
        y = at.run("dropout", ones, p, seed)
        assert y.is_contiguous() and y.dtype == at.dtype
        kept = y != 0
        assert torch.equal(y, kept.to(at.dtype) * (1 / (1 - p)))
        spread = (p * (1 - p) / kept.numel()) ** 0.5
        assert abs(float(kept.float().mean()) - (1 - p)) < 5 * spread
        for dim, count in ((0, rows), (1, width)):  # no row and no column is favoured
            off = (kept.float().mean(dim) - (1 - p)).abs().max()
            assert float(off) < 6 * (p * (1 - p) / count) ** 0.5
        x = at.sent(at.random(rows, width))
        again = at.run("dropout", x, p, seed)  # the same mask for whatever has this shape
        wanted = torch.where(kept, x.float() * (1 / (1 - p)), 0.0).to(at.dtype)
        torch.testing.assert_close(again, wanted, rtol=torch.finfo(at.dtype).eps, atol=0)
        masks += [kept]
        assert 0.5 < float((kept[0] == kept[1]).float().mean()) < 0.9
    for i, j in product(range(5), range(5)):  # two masks at 0.25 agree at 0.75**2 + 0.25**2
        agree = float((masks[i] == masks[j]).float().mean())
        assert agree == 1 if i == j else abs(agree - 0.625) < 0.02
    assert torch.equal(at.run("dropout", ones, 0.0, seeds[3]), ones)


@check
def cross_entropy(at: Place) -> None:
    small, real = [(3, 5), (4, 1000), (2, 20001)], [(256, 128256), (64, 151936), (16, 262144)]
    for (rows, width), softcap in product(real if at.real else small, (0.0, 30.0)):
        labels = torch.arange(rows) * 977 % width
        labels[0], labels[-1] = width - 1, 0
        logits = at.random(rows, width + 8)[:, 8:]
        logits *= 4
        at.compare("cross_entropy_", logits, labels, softcap, 1.0)
        at.compare("cross_entropy_", logits, labels, softcap, 0.25)
        logits[:, : width // 2] = float("-inf")  # whole blocks of it
        labels += (labels < width // 2) * (width - width // 2 - 1)
        at.compare("cross_entropy_", logits, labels, softcap, 1.0)


@check
def a_label_outside_the_vocabulary(at: Place) -> None:
    logits = at.sent(at.random(3, 50))
    losses = at.run("cross_entropy_", logits, at.sent(torch.tensor([-100, 3, 50])), 0.0, 1.0)
    assert losses.isnan().tolist() == [True, False, True]


# --- interpreted


def script(*arguments: str, **variables: str) -> Any:
    """What this file prints, run as a script."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (torch for CPUs comes without it)")
    command = [sys.executable, "-W", "error", __file__, *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What each check ended with: nothing, or a traceback."""
    return dict(script(TRITON_INTERPRET="1"))


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_it_is_the_plain_operator(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == "", interpreted[name]


def test_every_operator_has_a_function_of_its_arguments() -> None:
    source = (ROOT / "qlora" / "kernels" / "triton_ops.py").read_text()
    functions = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
    for name in NAMES:
        schema = getattr(torch.ops.qlora, name).default._schema
        ours = [argument.arg for argument in functions[name].args.args]
        assert ours == [argument.name for argument in schema.arguments]


@pytest.mark.parametrize(
    ("capability", "dtype"), [("75", "float16"), ("80", "bfloat16"), ("90", "float32")]
)
def test_it_compiles_for(capability: str, dtype: str, tmp_path: Path) -> None:
    shared = script(capability, dtype, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(shared) == len(NAMES)
    assert max(shared.values()) <= 2**15  # of the 64 KiB that a T4 has, for two programs at once


# --- on a card


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card: torch.cuda.is_available() is False"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_card_it_is_the_plain_operator(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bf16 needs compute capability 8.0")
    CHECKS[name](Place("cuda", dtype, real=True))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA card: torch.cuda.is_available() is False"
)
def test_on_a_card_offsets_pass_2_to_the_31() -> None:
    rows, width = 17000, 128256
    if torch.cuda.mem_get_info()[0] < 3 * rows * width:
        pytest.skip("needs 6.5 GB of free memory")
    logits = torch.zeros(rows, width, dtype=torch.float16, device="cuda")
    logits[-2:] = torch.randn(2, width, device="cuda").half()
    last = logits[-2:].cpu()
    labels = torch.full((rows,), 5, device="cuda")
    losses = ops.cross_entropy_(logits, labels)
    expected = ops.cross_entropy_(last, labels[-2:].cpu())
    torch.testing.assert_close(losses[-2:].cpu(), expected)
    torch.testing.assert_close(logits[-2:].cpu(), last)
    assert float(logits[0, 5]) == -1  # no other row's program wrote here


def interpret() -> dict[str, str]:
    import numpy as np

    found = {}
    for name, function in CHECKS.items():
        try:
            with np.errstate(over="ignore"):  # exp of a large number is inf, which a sigmoid means
                function(INTERPRETED)
            found[name] = ""
        except Exception:  # noqa: BLE001 - a test each, and one must not hide the others
            found[name] = traceback.format_exc()
    return found


def compiled(capability: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile what real models launch, with no card; bytes of shared memory by kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from qlora.kernels import triton_ops

    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, **kwargs: Any) -> None:
        binary = run(kernel, *args, **(kwargs | {"warmup": True}))
        name = kernel.fn.__name__
        shared[name] = max(shared.get(name, 0), binary.metadata.shared)

    JITFunction.run = compile_only
    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    driver.set_active(card)

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    for width in (128, 4096, 16384, 40000):
        x, weight, rstd = empty(2, width), empty(width), empty(2, kind=torch.float)
        for add in (None, x):
            triton_ops.rms_norm(x, weight, 1e-5, 1.0, add)
            triton_ops.rms_norm_backward(x, x, weight, rstd, 1.0, add)
    q, k, cos = empty(8, 32, 128), empty(8, 8, 128), empty(8, 128)
    triton_ops.rotary_(q, k, cos, cos, False)
    triton_ops.rotary_(q, k, cos, cos, True)
    gate = empty(2, 28672)[:, :14336]
    for kind in (ops.SILU, ops.GELU_TANH):
        triton_ops.gated(gate, gate, kind)
        triton_ops.gated_backward_(gate, gate, gate, kind)
    packed, code = empty(2**15, 1, kind=torch.uint8), empty(16, kind=torch.float)
    scales, code2 = empty(4, kind=torch.float), empty(256, kind=torch.float)
    offset = empty(kind=torch.float)
    nested = (packed[:1024, 0], code, offset, scales, code2)
    for absmax, *tail in (nested, (empty(1024, kind=torch.float), code, None, None, None)):
        triton_ops.unpack(packed, absmax, *tail, 64, 256, [256, 256], dtype)
    triton_ops.dropout(empty(2, 4096), 0.1, torch.tensor(1))
    for softcap in (0.0, 30.0):
        triton_ops.cross_entropy_(empty(2, 128256), torch.zeros(2, dtype=torch.int64), softcap, 1.0)
    return shared


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(compiled(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
    else:
        print(json.dumps(interpret()))
