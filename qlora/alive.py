"""Proofs that an adapter lives: it is made of numbers, does something, and is the same on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from qlora import adapter
from qlora.errors import CheckpointError, TrainingDiverged

_PROBE = "read_back"


def verify(
    model: Any, folder: Path, input_ids: torch.Tensor, called: Path | None = None
) -> dict[str, float]:
    """Read a saved adapter back from disk and prove that it is what is being trained.

    Args:
        model: The model in training, with the adapter in memory.
        folder: Where it was just saved.
        input_ids: Probe tokens, shape (1, T).
        called: The name that the folder is going to have, for messages.

    Returns:
        Largest logit difference disk against memory and tuned against base, and B's largest value.
        Weights, mode and random state of the model are left as they were.

    Raises:
        CheckpointError: B is all zero, the file differs from memory, or the logits do.
        TrainingDiverged: The logits are not finite.
    """
    adapter.require_adapter(folder)
    called = called or folder
    largest_b = _largest_b(folder)
    if largest_b == 0.0:
        raise CheckpointError(
            f"{called}: the adapter is dead: B is still zero, so it does nothing. The learning rate "
            "has been zero so far (a warmup longer than the run?) or no gradient reaches the adapter."
        )
    training = model.training
    devices = [input_ids.device] if input_ids.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), adapter.quiet_peft():
        model.eval()
        in_memory = model(input_ids=input_ids, use_cache=False).logits.float()
        with model.disable_adapter():
            of_base = model(input_ids=input_ids, use_cache=False).logits.float()
        try:
            model.load_adapter(str(folder), adapter_name=_PROBE, is_trainable=False)
            _require_equal_weights(model, folder)
            model.set_adapter(_PROBE)
            on_disk = model(input_ids=input_ids, use_cache=False).logits.float()
        finally:
            model.set_adapter("default")
            if _PROBE in model.peft_config:
                model.delete_adapter(_PROBE)
            model.train(training)
    report = {
        "disk_against_memory": float((on_disk - in_memory).abs().max()),
        "tuned_against_base": float((in_memory - of_base).abs().max()),
        "largest_b": largest_b,
    }
    if not bool(in_memory.isfinite().all()):  # the disk is not to blame
        raise TrainingDiverged(
            f"{called}: with this adapter the logits of a row of the data are not finite any more; it is "
            "not kept. Lower train.learning_rate or raise train.warmup_steps, and resume from the last "
            "checkpoint."
        )
    # Equal weights give equal logits up to the order of a kernel's sums.
    tolerance = 1e-3 * max(1.0, float(in_memory.abs().max()))
    if not report["disk_against_memory"] <= tolerance:
        raise CheckpointError(
            f"{called}: the saved adapter computes something else than the one in training: logits "
            f"differ by {report['disk_against_memory']:.3g}."
        )
    if not report["tuned_against_base"] > 0.0:
        raise CheckpointError(f"{called}: the adapter is dead: the logits are the same without it.")
    return report


def require_finite(model: nn.Module, step: int) -> None:
    """Refuse to save weights that are no numbers.

    Raises:
        TrainingDiverged: Names the first of them.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    finite = torch.stack([p.detach().isfinite().all() for _, p in trained])
    if not bool(finite.all()):
        name = next(
            name for (name, _), good in zip(trained, finite.tolist(), strict=True) if not good
        )
        raise TrainingDiverged(
            f"step {step}: {name} is not finite any more; nothing of it is saved. Lower "
            "train.learning_rate or raise train.warmup_steps, and resume from the last checkpoint."
        )


def _largest_b(folder: Path) -> float:
    tensors = load_file(folder / "adapter_model.safetensors")
    b = [float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name]
    if not b:
        raise CheckpointError(f"{folder}: the adapter is dead: the file holds no lora_B matrix.")
    return max(b)


def _require_equal_weights(model: Any, folder: Path) -> None:
    named = dict(model.named_parameters())
    trained = [name for name in named if "default" in name.split(".")]
    for name in trained:
        twin = named.get(
            ".".join(_PROBE if part == "default" else part for part in name.split("."))
        )
        if twin is None or not torch.equal(named[name], twin):
            raise CheckpointError(f"{folder}: {name} on disk is not what is in memory.")
