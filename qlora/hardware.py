"""What the machine is: one card or none, how much memory is free, what it really computes in.

Only asks and reports. What follows from it is decided in :mod:`qlora.memory` and the loader.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
from pathlib import Path

import torch

from qlora.cards import Card


def card() -> Card:
    """The first visible CUDA card with its free bytes now, or the CPU with its available RAM.

    The capability is the card's own: ``torch.cuda.is_bf16_supported()`` also counts emulation and is
    True on a T4, which has no bf16 units.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        return Card(
            name=torch.cuda.get_device_name(0),
            kind="cuda",
            total_bytes=total,
            free_bytes=free,
            capability=torch.cuda.get_device_capability(0),
        )
    total, available = ram_bytes()
    return Card(name=_cpu_name(), kind="cpu", total_bytes=total, free_bytes=available)


def device(card: Card) -> torch.device:
    """Where a card's tensors live."""
    return torch.device("cuda", 0) if card.kind == "cuda" else torch.device("cpu")


def has_flash_attention(card: Card) -> bool:
    """Whether FlashAttention 2 is installed and the card (capability 8 or newer) can run it."""
    return (
        card.kind == "cuda"
        and (card.capability or (0, 0)) >= (8, 0)
        and importlib.util.find_spec("flash_attn") is not None
    )


def memory_in_use(card: Card) -> tuple[int, int]:
    """Bytes held now and at the peak: by torch on CUDA, by the whole process on a CPU."""
    if card.kind == "cuda":
        return torch.cuda.memory_allocated(0), torch.cuda.max_memory_allocated(0)
    status = Path("/proc/self/status")
    if not status.is_file():  # only Linux tells; elsewhere nothing is better than a guess
        return 0, 0
    fields = dict(
        line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm")
    )
    return _kib(fields["VmRSS"]), _kib(fields["VmHWM"])


def let_go() -> None:
    """Give back what nothing in this process holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a card, or the host, has no memory left.

    torch has a class for its own allocator alone. cuBLAS, cuDNN, the driver and the CPU's allocator say
    it in the text of a plain RuntimeError.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return any(words in said for words in _OUT)


_OUT = (
    "_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory", "DefaultCPUAllocator:",
)  # fmt: skip


def _kib(text: str) -> int:
    return int(text.split()[0]) * 1024


def ram_bytes() -> tuple[int, int]:
    """(total, available) bytes of the host's memory; where only the total is told, it stands for both."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return _kib(fields["MemTotal"]), _kib(fields["MemAvailable"])
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    return 0, 0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU ({next(named, platform.processor() or platform.machine())})"
