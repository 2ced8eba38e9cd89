"""The random generators of a training, taken and put back: Python's, numpy's, torch's and the card's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def take() -> dict[str, Any]:
    """Their state as a tree that :mod:`qlora.statefile` can hold; the device is not waited for."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(0)} if torch.cuda.is_initialized() else {})


def put(state: dict[str, Any]) -> None:
    """Go on from a state that :func:`take` took.

    A card's is put back where there is one; a run that moves between card and CPU is another run anyway.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"], 0)
