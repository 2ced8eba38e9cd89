"""Is this machine ready? Each thing a run leans on, tried rather than assumed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from qlora import hardware, hub, nf4, tracking
from qlora.cards import Card

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding. ``fail`` means that training cannot work; ``note`` that something is worth knowing."""

    name: str
    status: Literal["ok", "note", "fail"]
    found: str
    advice: str = ""


def examine(folder: Path) -> list[Check]:
    """Every check, in the order in which a run would meet its object.

    Args:
        folder: Where runs would be written.
    """
    card = hardware.card()
    checks: list[Callable[[], Check]] = [
        _python,
        _packages,
        lambda: _card(card),
        lambda: _nf4(card),
        lambda: _attention(card),
        lambda: _kernels(card),
        lambda: _disk(folder),
        _hub,
        _wandb,
    ]
    return [check() for check in checks]


def _python() -> Check:
    return Check("python", "ok", platform.python_version())  # an older one could not install us


def _packages() -> Check:
    wanted = [Requirement(line) for line in importlib.metadata.requires("qlora") or []]
    problems = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version}, needed {requirement.specifier}")
    if problems:
        return Check("packages", "fail", "; ".join(problems), "pip install -r requirements.lock")
    shown = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    return Check("packages", "ok", ", ".join(f"{n} {importlib.metadata.version(n)}" for n in shown))


def _card(card: Card) -> Check:
    free, total = card.free_bytes / GIB, card.total_bytes / GIB
    if card.kind == "cpu":
        built = (
            "this torch is a CPU build"
            if torch.version.cuda is None
            else "the driver shows no card"
        )
        return Check(
            "card",
            "note",
            f"no CUDA card ({built}); {card.name}, {free:.1f} of {total:.1f} GiB free",
            "Small models train on a CPU; for 1B and more use a card (a free Colab T4 will do).",
        )
    capability = ".".join(map(str, card.capability or ()))
    found = f"{card.name}, capability {capability}, {free:.1f} of {total:.1f} GiB free"
    if not card.supports_bf16:
        return Check("card", "ok", f"{found}; no bf16 units: computes in fp16 with fp32 adapters")
    return Check("card", "ok", f"{found}; computes in bf16")


def _nf4(card: Card) -> Check:
    """Quantize and compute with bitsandbytes on the device itself; imports prove nothing."""
    try:
        error = nf4.error(128, hardware.device(card))
    except (RuntimeError, OSError, AttributeError) as failure:
        first = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        return Check(
            "nf4", "fail", f"bitsandbytes does not run here: {first}", "Match its CUDA version."
        )
    if error > nf4.MAX_ERROR:
        return Check("nf4", "fail", f"a round trip loses {error:.4f} of the variance, not 0.0085")
    return Check(
        "nf4", "ok", f"a round trip on the {card.kind.upper()} loses {error:.4f} of the variance"
    )


def _attention(card: Card) -> Check:
    if hardware.has_flash_attention(card):
        return Check("attention", "ok", "FlashAttention 2 is installed and will be used")
    return Check("attention", "ok", "PyTorch's SDPA (FlashAttention 2 is not needed)")


def _kernels(card: Card) -> Check:
    """What fused layers need on a card: Triton, which compiles its launcher with a C compiler."""
    if card.kind == "cpu":
        return Check("kernels", "ok", "fused layers in plain torch; Triton is for cards")
    off = "The libraries' layers train instead, slower."
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Check("kernels", "note", "triton is not installed", off)
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        return Check("kernels", "note", "triton finds no C compiler (cc, gcc, clang)", off)
    return Check("kernels", "ok", f"triton {version}; proven on your model when a run starts")


def _disk(folder: Path) -> Check:
    folder = folder.expanduser()
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free / GIB
    if not os.access(existing, os.W_OK):
        return Check(
            "disk", "fail", f"{existing} cannot be written", "Choose another with run.dir=DIR."
        )
    if free < 10:
        return Check("disk", "note", f"{free:.1f} GiB free", "An 8B base alone downloads 16 GB.")
    return Check("disk", "ok", f"{free:.0f} GiB free for {folder}")


def _hub() -> Check:
    token = "a token is set" if _has_hub_token() else "no token (gated models need HF_TOKEN)"
    problem = hub.unreachable()
    if problem:
        return Check("hub", "note", f"{problem}; {token}", "Local folders and the quickstart work.")
    return Check("hub", "ok", f"reachable; {token}")


def _wandb() -> Check:
    mode, reason = tracking.mode_now()
    return Check("wandb", "ok", f"would run {mode} ({reason}); used only with run.report_to=wandb")


def _has_hub_token() -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
