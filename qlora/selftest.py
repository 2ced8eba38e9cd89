"""Is a step's gradient the same however its rows are laid out? Tried on the user's own base, data and card.

Eight rows of the recipe go through the trainer's own step in every layout that training may choose: one
row a pass or several, packed or padded, with activations kept or computed again, by the libraries' layers
or by fused ones; and through its evaluation. One row a pass, padded, is the reference: nothing there can
leak, and every other case must give its loss and its adapter gradients, up to rounding.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from qlora import adapter, data, fitting, hardware, loader, memory, packing, ready, sft, tokenizer
from qlora.cards import Card
from qlora.data import Prepared
from qlora.errors import DataError, DoesNotFit, SelfTestFailed
from qlora.invariance import CASES, REFERENCE, ROWS, TOLERANCES, Case, Finding, Report
from qlora.kernels import attached
from qlora.kernels.family import NotFused
from qlora.packing import Layout
from qlora.rundir import Run
from qlora.screen import GIB, Screen
from qlora.settings import Recipe
from qlora.shape import Shape

B_DEVIATION = 0.02  # as weights are initialised: B A then moves the logits by a few percent


def examine(recipe: Recipe, console: Console) -> Report:
    """Put the same rows through training in every layout, and compare.

    Args:
        recipe: As it would be trained; its base, data, adapter and compute dtype are used.
        console: Where progress is shown.

    Raises:
        QLoRAError: As :func:`qlora.trainer.train`, before anything is computed.
        DataError: Fewer than two rows to train on.
        SelfTestFailed: No gradient reaches a part of the adapter.
    """
    screen = Screen(console)
    card = hardware.card()
    config = loader.read_config(recipe)
    shape = Shape.from_config(config.values)
    sft.require_known_fields(recipe)
    fitted = fitting.fit(recipe, shape, card)
    recipe, plan = fitted.recipe, fitted.plan
    tok, _ = tokenizer.load(recipe, config.commit)
    prepared = data.prepare(recipe, tok, config.vocab_size, screen.track)
    prepared, notes = _chosen(prepared)
    base = loader.load_base(recipe, card, config, bars=screen.live)
    for note in base.notes:
        screen.say("base", note)
    fresh = ready.new_tokens(base.model, recipe, prepared, screen)
    model = adapter.attach(base.model, _variant(recipe, REFERENCE), fresh)
    randomise_b(model, recipe.train.seed)
    dropped = _without_dropout(model)
    if recipe.lora.lora_dropout or dropped:
        which = ["lora.lora_dropout", *dropped] if recipe.lora.lora_dropout else dropped
        notes.append(f"no dropout here ({', '.join(which)}): it differs from pass to pass")
    bench = Bench(recipe, card, shape, base, model, tok, prepared)
    if bench.always_checkpointing:
        notes.append("activation checkpointing is on in every case: without it, it would not fit")
    findings: list[Finding] = []
    for case in screen.track(CASES, "selftest"):
        try:
            findings.append(bench.attempt(case))
        except torch.OutOfMemoryError:
            if case is REFERENCE:
                raise DoesNotFit(memory.explain_out_of_memory(plan)) from None
            findings.append(bench.unused(case, "the card ran out of memory"))
    lengths = bench.lengths
    return Report(
        card=card.name,
        architecture=base.facts["architecture"],
        attention=base.facts["attention"],
        dtype=base.facts["compute_dtype"],
        rows=len(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        tokens=sum(lengths),
        supervised=bench.supervised,
        tolerance=bench.tolerance,
        findings=tuple(findings),
        notes=tuple(notes),
    )


class Bench:
    """The loaded model and the rows, on which one case after the other is tried."""

    def __init__(
        self,
        recipe: Recipe,
        card: Card,
        shape: Shape,
        base: loader.Base,
        model: Any,
        tok: Any,
        prepared: Prepared,
    ) -> None:
        self.recipe = recipe
        self.card = card
        self.shape = shape
        self.base = base
        self.model = model
        self.tok = tok
        self.prepared = prepared
        self.tolerance = TOLERANCES[base.facts["compute_dtype"]]
        self.lengths: list[int] = [len(ids) for ids in prepared.train["input_ids"]]
        self.supervised = 0
        self.always_checkpointing = False
        alone = Layout(recipe.data.max_length, 1, packed=False)
        self.always_checkpointing = self._does_not_fit(REFERENCE, alone) is not None
        self._packing: tuple[Layout, str] | None = None
        self._loss = math.nan
        self._gradients: dict[str, torch.Tensor] = {}

    def attempt(self, case: Case) -> Finding:
        """Build the trainer of this case, let it take its step or evaluate, and compare."""
        if case.checkpointing and self.always_checkpointing:
            return self.unused(case, "it is on in every case")
        if case.level and self.recipe.train.kernels == "off":
            return self.unused(case, "train.kernels is off")
        layout, problem = self._layout(case)
        if problem:
            return self.unused(case, problem)
        with tempfile.TemporaryDirectory(prefix="qlora-selftest-") as folder:
            try:
                modules = self._fused(case)
            except NotFused as why:
                return self.unused(case, str(why))
            try:
                trainer = self._trainer(case, layout, Run(Path(folder)))
                began = time.perf_counter()
                if case.evaluation:
                    loss, gradients = float(trainer.evaluate()["eval_loss"]), None
                else:
                    loss, gradients = self._step(trainer)
                seconds = time.perf_counter() - began
            finally:
                attached.detach(modules)
        if case is REFERENCE:
            assert gradients is not None
            self._loss, self._gradients = loss, gradients
            self._require_gradients()
        overall, worst, name = None, None, ""
        if gradients is not None:
            overall, worst, name = difference(gradients, self._gradients)
        return Finding(
            case,
            self.tolerance,
            passes=len(layout.micro_batches(self.lengths)),
            seconds=seconds,
            loss=loss,
            loss_difference=abs(loss - self._loss) / abs(self._loss),
            gradient_difference=overall,
            worst_difference=worst,
            worst_parameter=name,
        )

    def unused(self, case: Case, why: str) -> Finding:
        return Finding(case, self.tolerance, unused=why)

    def _layout(self, case: Case) -> tuple[Layout, str]:
        """The layout that training would take, and why the case cannot be tried, if it cannot."""
        variant = _variant(self.recipe, case)
        if not case.packed:
            layout = Layout(variant.data.max_length, case.sequences, packed=False)
            return layout, self._does_not_fit(case, layout) or ""
        if self.recipe.data.packing is False:
            return Layout(variant.data.max_length, 1, packed=False), "data.packing is false"
        if self._packing is None:
            rows = self.prepared.train[:3]["input_ids"]
            self._packing = packing.choose(variant, self.model, rows, self.base.facts["attention"])
        chosen, note = self._packing
        layout = dataclasses.replace(chosen, sequences=case.sequences)
        if not layout.packed:
            return layout, f"packing is {note}"
        sequences = [one for batch in layout.micro_batches(self.lengths) for one in batch]
        if len(sequences) == len(self.lengths):
            return layout, (
                f"no two of these rows fit into data.max_length ({layout.max_length:,} tokens), "
                "so packing changes nothing"
            )
        return layout, self._does_not_fit(case, layout) or ""

    def _does_not_fit(self, case: Case, layout: Layout) -> str | None:
        """What the case's largest pass needs, if that is more than there is."""
        needs = []
        for batch in layout.micro_batches(self.lengths):
            widths = [sum(self.lengths[i] for i in one) for one in batch]
            rows, width = (1, sum(widths)) if layout.flat else (len(batch), max(widths))
            needs.append((rows * width, rows, width))
        _, rows, width = max(needs)
        variant = _changed(
            _variant(self.recipe, case),
            train={
                "per_device_train_batch_size": rows,
                "activation_checkpointing": (
                    case.checkpointing or self.always_checkpointing or case.level > 1
                ),
            },
            data={"max_length": width},
            eval={"generate": 0},
        )
        plan = memory.plan(variant, self.shape, self.card)
        if plan.fits:
            return None
        return (
            f"it would need {plan.total_bytes / GIB:.1f} GiB (predicted) and "
            f"{self.card.free_bytes / GIB:.1f} GiB were free"
        )

    def _fused(self, case: Case) -> list[nn.Module]:
        """What is attached to the model for this case.

        Raises:
            NotFused: As :func:`qlora.kernels.attached.attach`.
        """
        if not case.level:
            return []
        levels = [case.level] * self.shape.layers
        return attached.attach(self.model, self.card, levels=levels)

    def _trainer(self, case: Case, layout: Layout, run: Run) -> sft.RowTrainer:
        base = self.model.get_base_model()
        fuses = case.level > 0 or self.recipe.quant.head == "8bit"
        adapter.checkpoint_layers(base, case.checkpointing or self.always_checkpointing)
        return sft.build(
            _variant(self.recipe, case), run, self.card, self.model, self.tok, self.prepared, layout,
            observers=(), callbacks=(), head=attached.head_of(self.model) if fuses else None,
        )  # fmt: skip

    def _step(self, trainer: sft.RowTrainer) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and adapter gradients of the trainer's own step over its own batch of all the rows."""
        adapter.assert_census(self.model)
        batches = list(trainer.get_train_dataloader())
        rows = [row for batch in batches for one in batch["rows"] for row in one]
        assert len(batches) == 1 and len(rows) == len(self.lengths), "a step holds all the rows"
        self.supervised = batches[0]["supervised"]
        # As train() does it: the forward pass runs in the recipe's dtype.
        model = trainer.accelerator.prepare(trainer.model)
        scaler = trainer.accelerator.scaler
        while True:
            self.model.zero_grad(set_to_none=True)
            loss = float(trainer.training_step(model, batches[0], None))
            scale = 1.0 if scaler is None else scaler.get_scale()
            gradients = {
                name: parameter.grad.detach().cpu().double() / scale
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and parameter.grad is not None
            }
            self.model.zero_grad(set_to_none=True)
            finite = all(torch.isfinite(gradient).all() for gradient in gradients.values())
            if scaler is None or finite or scale <= 1.0:
                return loss, gradients
            scaler.update(
                scale / 2
            )  # fp16 overflowed: training would skip this step and do the same

    def _require_gradients(self) -> None:
        """The comparison is worth nothing where there is nothing to compare."""
        dead = [
            name
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
            and parameter.requires_grad
            and not (name in self._gradients and bool(self._gradients[name].any()))
        ]
        if dead:
            raise SelfTestFailed(
                f"{len(dead)} adapter matrices get no gradient from {len(self.lengths)} rows, such as "
                f"{dead[0]}: they would never train. Leave them out with lora.target_modules."
            )


def randomise_b(model: nn.Module, seed: int) -> None:
    """Give every B small values, as if it had trained: while it is zero, A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * B_DEVIATION
            parameter.data.copy_(values)


def difference(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[float, float, str]:
    """Distance of two gradients relative to the expected one's norm; and the worst parameter's own.

    Returns:
        The distance over all parameters together, the largest over one parameter, and its name.
    """
    if found.keys() != expected.keys():
        name = sorted(found.keys() ^ expected.keys())[0]
        return math.inf, math.inf, name
    apart = {name: float((found[name] - expected[name]).norm()) for name in expected}
    norms = {name: float(expected[name].norm()) for name in expected}
    shares = {name: apart[name] / max(norms[name], 1e-30) for name in expected}
    # NaN compares false with everything, so it is looked for first.
    worst = max(shares, key=lambda name: (math.isnan(shares[name]), shares[name]))
    overall = math.hypot(*apart.values()) / math.hypot(*norms.values())
    return overall, shares[worst], worst


def _chosen(prepared: Prepared) -> tuple[Prepared, list[str]]:
    """The rows to try, by quantiles of their length, to train on and to evaluate; and notes."""
    lengths = np.array(prepared.train["length"][:])
    if len(lengths) < 2:
        raise DataError(
            f"the self-test compares layouts of at least 2 rows; the recipe's data has {len(lengths)} "
            "to train on. Name a file with more rows in data.train, or write data.held_out_fraction=0."
        )
    order = np.argsort(lengths, kind="stable")
    places = np.linspace(0, len(order) - 1, min(ROWS, len(order))).round().astype(int)
    rows = prepared.train.select(order[places].tolist())
    notes = (
        [] if len(order) >= ROWS else [f"the data has {len(order)} rows to train on, not {ROWS}"]
    )
    return dataclasses.replace(prepared, train=rows, held_out=rows), notes


def _variant(recipe: Recipe, case: Case) -> Recipe:
    """The recipe, laid out as the case says, with all the rows in one step and no dropout."""
    return _changed(
        recipe,
        train={
            "per_device_train_batch_size": case.sequences,
            "gradient_accumulation_steps": math.ceil(ROWS / case.sequences),
            "activation_checkpointing": False,  # switched between the cases
            "kernels": "auto" if case.level else "off",
            "levels": None,
            "mlp_tile": None,
            "sft_config": recipe.train.sft_config | {"dataloader_drop_last": False},
        },
        data={"packing": recipe.data.packing if case.packed else False},
        lora={"lora_dropout": 0.0},
    )


def _changed(recipe: Recipe, **sections: Mapping[str, Any]) -> Recipe:
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=dict(values))
            for name, values in sections.items()
        }
    )


def _without_dropout(model: nn.Module) -> list[str]:
    """Switch off the base's own dropout, wherever a module keeps its probability; returns the names."""
    found = []
    for module in model.modules():
        for key, value in list(vars(module).items()):
            rate = "drop" in key or (isinstance(module, nn.Dropout) and key == "p")
            if rate and isinstance(value, float) and value > 0:
                setattr(module, key, 0.0)
                found.append("dropout" if key == "p" else key)
    return [f"the base's {name}" for name in dict.fromkeys(found)]
