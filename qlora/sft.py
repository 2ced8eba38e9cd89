"""TRL's SFTTrainer for one recipe. The only user of trl.

TRL's constructor and resume change the adapter's dtype, its data preparation drops rows in silence, and
its defaults hide a NaN. All of that is switched off or put right here, through public seams.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from qlora import adapter, cards, diagnosis, hardware, packing, randomness
from qlora.cards import Card
from qlora.data import Prepared
from qlora.errors import RecipeError
from qlora.keeping import Keeper
from qlora.kernels.loss import Head, linear_cross_entropy
from qlora.offload import InputsOnHost
from qlora.packing import Collator, Layout
from qlora.prefetch import Prefetcher
from qlora.relief import Pass, Relief, passes
from qlora.rendering import IGNORED
from qlora.rundir import Run
from qlora.settings import Recipe


class Observer(Protocol):
    """Told of every micro-batch that trains: its rows, and its tokens without padding and with it.

    And of the seconds that each step waited for its rows.
    """

    def waited(self, seconds: float) -> None: ...

    def saw(self, rows: list[int], tokens: int, computed: int, loss: torch.Tensor) -> None: ...

    def again(self) -> None:
        """The step is begun anew: what was seen of it does not count."""


class RowTrainer(SFTTrainer):
    """TRL's trainer, over steps of rows that :class:`qlora.packing.Collator` has laid out.

    A batch of its loader is all the rows of an optimizer step, as micro-batches. The dtype of the
    adapter is restored and asserted at the last moment before the optimizer exists, which is after a
    resume as well. What the Trainer would write as pickles and read back is left to a
    :class:`qlora.keeping.Keeper`.
    """

    keeper: Keeper | None = None  # without one nothing is saved
    relief: Relief | None = None  # where a step runs out of memory; without one the error goes on
    observers: Sequence[Observer] = ()
    offloads = False  # of the inputs of recomputed layers
    head: Head | None = None  # of the fused loss of qlora.kernels, where that is used
    _held_out_sums: list[tuple[float, int]]
    _passes: Sequence[Pass] = ()  # of the present step, as they fitted
    _phase = ""
    _has_drawn = False  # rows in this training
    _random: dict[str, Any]  # as it was when the step began

    @cached_property
    def prefetcher(self) -> Prefetcher:
        return Prefetcher()

    def get_train_dataloader(self) -> Any:
        return self.prefetcher.loader(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self.prefetcher.loader(super().get_eval_dataloader(*args, **kwargs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's: the next batch of the loader. What that takes is what training waits for data."""
        began = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self._has_drawn = True
        seconds = time.perf_counter() - began
        for observer in self.observers:
            observer.waited(seconds)
        return found

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._has_drawn = False
        with self.prefetcher.running():
            return super().train(*args, **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One optimizer step's gradient: each micro-batch forward and backward.

        The Trainer's own accumulation stays at 1: how many passes a step needs depends on how its rows
        lie. Every pass divides its sum of losses by the supervised tokens of the whole step. If memory runs
        out, the step begins anew, from the same random state, with the pass that did not fit in two.
        """
        self._random = randomness.take()
        self._passes = steps = passes(inputs)
        losses: list[torch.Tensor] = []
        while True:
            try:
                for one in steps[len(losses) :]:
                    self._phase = "forward"
                    loss = super().training_step(model, one.batch, inputs["supervised"])
                    for observer in self.observers:
                        observer.saw(one.rows, one.tokens, one.batch["input_ids"].numel(), loss)
                    losses.append(loss)
                break
            except (RuntimeError, MemoryError) as error:
                if self.relief is None or not hardware.ran_out_of_memory(error):
                    raise
            # Outside of the handler: the error holds on to the frames, and they to the tensors.
            steps = self.relief.halve(steps, len(losses), self.state.global_step + 1, self._phase)
            self._passes = steps
            losses = []
            model.zero_grad()
            self.relief.free()
            randomness.put(self._random)
            for observer in self.observers:
                observer.again()
        return torch.stack(losses).sum()

    def blame(self) -> str:
        """Where the present step loses its numbers first, when it is taken once more.

        The first module whose output is no finite number; if all are, the first weight that way back whose
        gradient is none. Weights, gradients, random state and modes stay as they are.
        """
        now = randomness.take()
        randomness.put(self._random)
        try:
            again = [partial(self._loss_again, one.batch) for one in self._passes]
            return diagnosis.where_lost(self.model, again)
        except (RuntimeError, MemoryError) as error:
            if not hardware.ran_out_of_memory(error):
                raise
            return "no memory is left to look for the layer"
        finally:
            randomness.put(now)

    def _loss_again(self, batch: dict[str, Any]) -> torch.Tensor:
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(
                self.model, self._prepare_inputs(batch), num_items_in_batch=1
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.keeper is not None:
            self.keeper.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.keeper is not None
        self.keeper.weights(self, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.keeper is not None:
            self.keeper.optimizer(self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimizer's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.keeper is not None:
            self.keeper.random(begun=self._has_drawn)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        """The mean loss of a batch's supervised tokens; sums are kept for :meth:`evaluation_loop`."""
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in inputs["micro_batches"]:
                moved = self._prepare_inputs(batch)
                total = total + self.compute_loss(model, moved, num_items_in_batch=1).double().cpu()
        self._held_out_sums.append((float(total), inputs["supervised"]))
        return total / inputs["supervised"], None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The Trainer's loop, whose loss is the mean over supervised tokens, as in training.

        transformers 5.23 takes the mean of the batches' means, which weighs a token of a short answer
        more than one of a long answer and changes with the batch size.
        """
        self._held_out_sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total = math.fsum(loss for loss, _ in self._held_out_sums)
        count = sum(supervised for _, supervised in self._held_out_sums)
        output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's evaluation, without a trace: its loader would draw from dropout's random state."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.prefetcher.running():
            return super().evaluate(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's fused loss on a card; on a CPU the same sum over materialized logits.

        The fused loss saves a card's memory by computing the head twice. A CPU has the memory and not
        the time: the step of a small model is a third shorter this way. Where rows of the head train,
        the logits are materialized too: TRL 1.16 reads ``lm_head.weight``, which in peft 0.21 is the
        frozen one. TRL's own entropy and accuracy are left out: they read the device three times a
        micro-batch, and so wait for it.
        """
        usual = self.args.loss_type == "nll" and not self.aux_loss_enabled
        usual = usual and self.label_smoother is None  # TRL's own path knows it
        plain = self.args.use_cpu or adapter.trains_tokens(self.model)
        if not usual or return_outputs:
            self.prefetcher.begin()
            asked = packing.for_model(inputs) | {"labels": inputs["labels"]}
            return super().compute_loss(model, asked, return_outputs, num_items_in_batch)
        supervised = num_items_in_batch
        if supervised is None:
            supervised = (inputs["labels"][:, 1:] != IGNORED).sum()
        away = self.offloads and model.training and torch.is_grad_enabled()
        with InputsOnHost() if away else nullcontext():
            loss = loss_of(model, inputs, supervised, materialize=plain, head=self.head)
        self._phase = "backward"  # what comes next
        self.prefetcher.begin()  # the device has the forward pass in hand
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        adapter.restore_dtype(self.model)
        adapter.assert_census(self.model)
        return super().create_optimizer(*args, **kwargs)

    def spare_optimizer(self) -> Any:
        """Another optimizer as the recipe's, over the same weights, to be thrown away.

        Never a paged one: bitsandbytes 0.50 does not free managed memory, so its pages would stay for the
        rest of the run. The unpaged variant keeps the same bytes in the card's own memory.
        """
        kept = self.optimizer, self.optimizer_cls_and_kwargs
        kind, settings = kept[1] or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if settings.get("is_paged"):
            settings = settings | {"is_paged": False}
        self.optimizer, self.optimizer_cls_and_kwargs = None, (kind, settings)
        try:
            return super().create_optimizer()
        finally:
            self.optimizer, self.optimizer_cls_and_kwargs = kept

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """What is computed in this block is told to no observer, enters no metric, is tried once."""
        kept = self.observers, self._metrics, self._total_train_tokens, self.relief
        self.observers, self.relief = (), None
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}  # TRL's own
        self._held_out_sums = []
        try:
            yield
        finally:
            self.observers, self._metrics, self._total_train_tokens, self.relief = kept

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _total_steps(self.args, len(self.train_dataset))

    def scale(self) -> float | None:
        """The gradient scaler's value; None where there is none."""
        scaler = self.accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    def start_over(self) -> None:
        """Forget optimizer and schedule, so that the next training makes its own."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.optimizer_cls_and_kwargs = None
        self.model_wrapped = self.model
        self.model.zero_grad()
        if (scaler := self.accelerator.scaler) is not None:
            # It holds what it found of the old optimizer's gradients, under an id that can be used again.
            scaler.update(scaler.get_scale())

    def schedule_over(self, steps: int) -> list[Any]:
        """The recipe's schedule over another number of steps: factors of the peak rate by step."""
        nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        schedule: Any = get_scheduler(
            self.args.lr_scheduler_type,
            nothing,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        return list(schedule.lr_lambdas)


def loss_of(
    model: Any,
    inputs: dict[str, Any],
    supervised: int | torch.Tensor,
    *,
    materialize: bool,
    head: Head | None = None,
) -> torch.Tensor:
    """The summed loss of a micro-batch over the supervised tokens of its step.

    Args:
        model: With TRL's fused head on its base, unless the logits are materialized.
        inputs: What :class:`qlora.packing.Collator` laid out, labels included; left as it is.
        supervised: Tokens to divide by.
        materialize: Hold the logits, rather than project them tile by tile and once more in the
            backward pass.
        head: Take the loss of :mod:`qlora.kernels` over this head, which does neither.
    """
    asked = packing.for_model(inputs)
    if head is not None:
        base, dtype = model.get_base_model(), head.dtype
        with torch.autocast(inputs["labels"].device.type, dtype, enabled=dtype != torch.float32):
            hidden = base.base_model(**asked, use_cache=False).last_hidden_state.flatten(0, 1)
        at, labels = inputs["supervised_at"], inputs["labels"].flatten()
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None) or 0.0
        total = linear_cross_entropy(hidden[at], labels[at + 1], head, softcap=softcap)
    elif materialize:
        labels = inputs["labels"][:, 1:].flatten()
        logits = model(**asked, use_cache=False).logits[:, :-1].flatten(0, 1)
        total = functional.cross_entropy(logits.float(), labels, reduction="sum")
    else:
        asked["labels"] = inputs["labels"]
        total = -model(**asked, use_cache=False, fused_lm_head=True).log_probs.sum()
    return total / torch.as_tensor(supervised).clamp(min=1)


def fuse_head(base: Any) -> None:
    """Give a base the fused head that TRL's constructor gives it."""
    add_fused_lm_head(base, outputs=("log_probs",))


def build(
    recipe: Recipe,
    run: Run,
    card: Card,
    model: Any,
    tok: Any,
    prepared: Prepared,
    layout: Layout,
    *,
    keeper: Keeper | None = None,
    observers: Sequence[Observer],
    callbacks: Sequence[TrainerCallback],
    head: Head | None = None,
) -> RowTrainer:
    """TRL's trainer for this recipe, with the adapter's dtype restored after its constructor."""
    trainer = RowTrainer(
        model=model,
        args=sft_config(recipe, run, card, len(prepared.train)),
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        processing_class=tok,
        data_collator=Collator(layout, tok.pad_token_id, 8 if card.kind == "cuda" else 1),
        callbacks=[*callbacks, keeper] if keeper else list(callbacks),
    )
    trainer.keeper = keeper
    trainer.remove_callback(PrinterCallback)
    trainer.observers = observers
    trainer.offloads = recipe.train.activation_offload
    trainer.head = head
    adapter.restore_dtype(model)
    return trainer


def sft_config(recipe: Recipe, run: Run, card: Card, rows: int) -> SFTConfig:
    """The recipe in TRL's terms. ``train.sft_config`` cannot reach what is set here."""
    dtype = cards.compute_dtype(recipe, card)
    settings = recipe.train
    shared = {
        name: getattr(settings, name)
        for name in (
            "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
            "max_grad_norm", "seed", "logging_steps", "save_total_limit",
        )
    }  # fmt: skip
    config = SFTConfig(
        output_dir=str(run.checkpoints),
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=rows_per_step(recipe),  # see RowTrainer.training_step
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=rows_per_step(recipe),
        optim=cards.optimizer(recipe, card),
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=card.kind == "cpu",
        activation_checkpointing=False,  # the adapter module owns it
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps or 10**9,
        report_to=[],  # our own callback writes the metrics
        logging_nan_inf_filter=False,  # it would log a NaN as 0.0 and go on
        logging_first_step=True,
        disable_tqdm=True,
        remove_unused_columns=False,  # row numbers travel with each batch
        max_length=None,  # rows are already cut to what was asked
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=card.kind == "cuda",
        **shared,
        **settings.sft_config,
    )
    if settings.save_steps is None:
        config.save_steps = max(1, math.ceil(_total_steps(config, rows) / 4))
    return config


def rows_per_step(recipe: Recipe) -> int:
    """Rows of one optimizer step."""
    return recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps


def require_known_fields(recipe: Recipe) -> None:
    """Refuse, before anything is loaded, what trl or transformers would fail on once everything is.

    Raises:
        RecipeError: A key of ``train.sft_config`` is unknown or has a value of another kind, or
            ``train.optim`` is no optimizer; names the nearest known one.
    """
    optimizers = [name.value for name in OptimizerNames]
    if recipe.train.optim not in ("auto", *optimizers):
        near = difflib.get_close_matches(recipe.train.optim, optimizers, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"train.optim is {recipe.train.optim!r}, which is no optimizer of transformers "
            f"{importlib.metadata.version('transformers')}.{hint} Write auto, or one such as adamw_torch "
            "or paged_adamw_8bit."
        )
    known = {field.name: field.default for field in dataclasses.fields(SFTConfig) if field.init}
    for key, value in recipe.train.sft_config.items():
        if not _is_like(value, known.get(key)):
            raise RecipeError(
                f"train.sft_config.{key} must be {_KINDS[type(known[key])]}; found {value!r}."
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"train.sft_config.{key} is no field of SFTConfig in trl "
                f"{importlib.metadata.version('trl')}.{hint}"
            )


_KINDS = {bool: "true or false", int: "a number", float: "a number"}


def _is_like(value: object, default: object) -> bool:
    """Whether a value may stand where this default does; of a default that is no number nothing is told."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True


def _total_steps(config: SFTConfig, rows: int) -> int:
    if config.max_steps > 0:
        return int(config.max_steps)
    batches = math.ceil(rows / config.per_device_train_batch_size)
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    return math.ceil(config.num_train_epochs * per_epoch)
