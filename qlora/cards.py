"""Cards: what a machine has, what a name means, and what follows for a recipe's dtype and optimizer."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from qlora.errors import HardwareError
from qlora.settings import Recipe

GIB = 2**30
DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Card:
    """Where a recipe would run, as the driver or a name describes it.

    ``supports_bf16`` asks for compute capability 8 because ``torch.cuda.is_bf16_supported()`` counts
    emulation: it says True on a T4. ``free_bytes`` is what a fresh process may allocate; a driver
    asked from a process that already has its CUDA context reports less, which errs to the safe side.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None

    @property
    def supports_bf16(self) -> bool:
        if self.capability is None:
            return self.kind == "cpu"
        return self.capability >= (8, 0)


# Usable GiB and capability. A "24 GB" GeForce reports 23.3-23.7 GiB and a "12 GB" one 11.6-11.8:
# 97 % of the nominal GiB is what a plan may count on. GDDR data-center cards lose more, to ECC.
_USABLE = 0.97
_CARDS = {
    "T4": (14.6, (7, 5)), "L4": (22.0, (8, 9)), "A10G": (22.0, (8, 6)), "L40S": (44.4, (8, 9)),
    "P100": (15.9, (6, 0)), "V100": (15.7, (7, 0)), "A100-40GB": (39.4, (8, 0)),
    "A100-80GB": (79.1, (8, 0)), "H100": (79.1, (9, 0)), "RTX A6000": (47.4, (8, 6)),
    "RTX 2070": (7.76, (7, 5)), "RTX 2080 Ti": (10.67, (7, 5)), "RTX 3060": (11.64, (8, 6)),
    "RTX 3060 Ti": (7.76, (8, 6)), "RTX 3070": (7.76, (8, 6)), "RTX 3080": (9.7, (8, 6)),
    "RTX 3090": (23.28, (8, 6)), "RTX 4060": (7.76, (8, 9)), "RTX 4060 Ti": (7.76, (8, 9)),
    "RTX 4060 Ti 16GB": (15.52, (8, 9)), "RTX 4070": (11.64, (8, 9)), "RTX 4080": (15.52, (8, 9)),
    "RTX 4090": (23.28, (8, 9)), "RTX 5060 Ti 16GB": (15.52, (12, 0)), "RTX 5070": (11.64, (12, 0)),
    "RTX 5080": (15.52, (12, 0)), "RTX 5090": (31.04, (12, 0)),
}  # fmt: skip


def named_card(text: str) -> Card:
    """The card a person means by ``12GB``, ``rtx4060ti-16gb`` or ``T4``, empty and ready.

    ``12 GB`` counts as a card sold with 12 GB, of which 97 % of 12 GiB is usable; ``12 GiB`` is taken
    literally. A bare size tells nothing of the generation: capability 8.6 (bf16) is assumed.

    Raises:
        HardwareError: Unknown; the nearest names are given.

    >>> round(named_card("12 GB").free_bytes / 2**30, 1), named_card("t4").supports_bf16
    (11.6, False)
    """
    if size := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gb|gib|g)\s*", text, re.IGNORECASE):
        exact = size[2].lower() == "gib"
        usable = int(float(size[1]) * GIB * (1 if exact else _USABLE))
        if usable:
            label = f"{size[1]} {'GiB' if exact else 'GB'} card (capability 8.6 assumed)"
            return Card(label, "cuda", usable, usable, (8, 6))
    names = {plain(name): name for name in _CARDS}
    found = names.get(plain(text))
    if found is None:
        near = [name for name in names if plain(text) and plain(text) in name][:4]
        near = near or difflib.get_close_matches(plain(text), names, n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(names[n] for n in near)}?" if near else ""
        raise HardwareError(
            f"{text!r} is not a card known here.{hint} A size such as '12GB' does too; known are "
            f"{', '.join(_CARDS)}."
        )
    gib, capability = _CARDS[found]
    return Card(found, "cuda", int(gib * GIB), int(gib * GIB), capability)


def plain(name: str) -> str:
    """What is left of a card's name when a maker's words and the spelling are taken away.

    >>> plain("NVIDIA GeForce RTX 3060") == plain("rtx-3060")
    True
    """
    return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())


def compute_dtype(recipe: Recipe, card: Card) -> DType:
    """The dtype matrices are multiplied in: bf16 from capability 8, fp16 on older cards, fp32 on CPU.

    Raises:
        HardwareError: bfloat16 is asked for on a card that only emulates it.
    """
    asked = recipe.quant.compute_dtype
    if asked == "bfloat16" and not card.supports_bf16:
        raise HardwareError(
            f"quant.compute_dtype is bfloat16, which the {card.name} does not compute in (it needs "
            "compute capability 8.0). Write auto or float16; float32 is slow and safe."
        )
    if asked != "auto":
        return asked
    if card.kind == "cpu":
        return "float32"
    return "bfloat16" if card.supports_bf16 else "float16"


def require_attention(recipe: Recipe, card: Card) -> None:
    """Refuse FlashAttention on a card that cannot run it.

    Raises:
        HardwareError: It is asked for, and the card is older than capability 8.0 or is none.
    """
    if recipe.model.attn_implementation == "flash_attention_2" and (
        card.kind != "cuda" or (card.capability or (0, 0)) < (8, 0)
    ):
        raise HardwareError(
            "model.attn_implementation is 'flash_attention_2', which needs a card of capability 8 or "
            f"newer; this is {card.name}. Write 'auto' or 'sdpa'."
        )


def optimizer(recipe: Recipe, card: Card) -> str:
    """The optimizer by transformers' name: ``auto`` is 8-bit and paged on CUDA, torch's on a CPU."""
    if recipe.train.optim != "auto":
        return recipe.train.optim
    return "paged_adamw_8bit" if card.kind == "cuda" else "adamw_torch"
