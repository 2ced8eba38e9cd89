"""Every setting once: its type, default, bounds and meaning.

Help texts, the JSON schema and the README's table are generated from the fields below, so a default
stands in one place. The list of fields stands in a test too: adding one is a deliberate act.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from qlora import document, durations


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_sources(value: object) -> object:
    """One file, or one mapping, stands for a list of one."""
    return (value,) if isinstance(value, str | dict | BaseModel) else _as_tuple(value)


def _as_levels(value: object) -> object:
    counts = _as_tuple(value)
    whole = isinstance(counts, tuple) and all(type(n) is int and n >= 0 for n in counts)
    if counts is not None and not (whole and len(counts) == 5):  # type: ignore[arg-type]
        raise ValueError(
            f"train.levels is {value!r}, but it must be five counts, one a level, that add up to the "
            "model's layers, such as [32, 0, 0, 0, 0]"
        )
    return counts


NotNegative = Annotated[int, Field(ge=0)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Format = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"]


class _Section(BaseModel):
    """Strict types, unknown keys refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _a_duration(value: str | None) -> str | None:
    if value is not None:
        try:
            durations.seconds(value)
        except ValueError as error:
            raise ValueError(f"run.save_every is {error}") from None
    return value


class Model(_Section):
    """The frozen base."""

    name: str = Field(
        description="A folder with safetensors, a hub id (owner/name), or embedded:base.",
        min_length=1,
    )
    revision: str = Field("main", description="Hub branch, tag or commit; the commit is recorded.")
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="auto: with train.kernels on a card PyTorch's own kernels, the fastest by trial, told "
        "where packed rows end; else FlashAttention 2 where it is installed and the card supports it, else "
        "sdpa, else eager for models whose attention needs it (Gemma 2).",
    )


class Quant(_Section):
    """How the base is stored (QLoRA, arXiv:2305.14314, section 3)."""

    quant_type: Literal["nf4", "none"] = Field(
        "nf4", description="nf4: 4-bit NormalFloat; none: plain LoRA on a 16-bit base."
    )
    double_quant: bool = Field(
        True, description="Quantize the scales too: 4.5 -> 4.13 bits a weight."
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="auto: bfloat16 from compute capability 8, float16 on older cards (T4), "
        "float32 on a CPU.",
    )
    cache: bool = Field(
        True,
        description="Keep the quantized base on disk: the next start reads about a third of the bytes.",
    )
    head: Literal["16bit", "8bit"] = Field(
        "16bit",
        description="8bit: a head of its own in 8 bits with a scale a row, half its bytes; needs "
        "train.kernels. What it costs in loss stands in tests/measurements/head-8bit.json.",
    )


class Lora(_Section):
    """The trainable adapter (LoRA, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=1024, description="Rank of the update B A.")
    lora_alpha: float = Field(
        32.0, gt=0, description="The update is scaled by lora_alpha / r (or / sqrt(r) with rsLoRA)."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: Strings = Field(
        ("all-linear",),
        min_length=1,
        description="all-linear (every linear but the head; QLoRA figure 2), or names such as "
        "[q_proj, v_proj]. Each name must match.",
    )
    use_rslora: bool = Field(
        False, description="Scale by 1/sqrt(r), for r >= 64 (arXiv:2312.03732)."
    )
    train_new_tokens: bool = Field(
        False,
        description="Also train the embedding rows of tokens that the data uses and the base never "
        "learned: just those rows, not a copy of the embedding.",
    )


class Source(_Section):
    """One of several places that rows come from, where it needs settings of its own."""

    name: str = Field(min_length=1, description="As an entry of data.train.")
    weight: float | None = Field(
        None,
        gt=0,
        description="Its share of the supervised tokens, relative to the other sources' weights. No "
        "row is used twice an epoch: what is too much is left out, by a draw with train.seed.",
    )
    format: Format | None = Field(None, description="Instead of data.format.")
    columns: dict[str, str] | None = Field(None, description="Instead of data.columns.")
    split: str | None = Field(None, description="Instead of data.split.")
    revision: str | None = Field(None, description="Instead of data.revision.")


class Data(_Section):
    """What is learned, from where, and which part of a row trains."""

    train: Annotated[
        tuple[Annotated[str, Field(min_length=1)] | Source, ...], BeforeValidator(_as_sources)
    ] = Field(
        min_length=1,
        description="Files (.jsonl .json .csv .tsv .parquet .arrow .txt, also .gz and .zst), patterns "
        "such as data/*.jsonl, a hub data set as hub:owner/name, embedded:tickets/train.jsonl, or "
        "mappings {name, weight, format, columns, split, revision}.",
    )
    split: str = Field("train", description="Split of a hub data set.")
    revision: str = Field("main", description="Revision of a hub data set.")
    held_out: str | None = Field(
        None, description="A file of rows never trained on. Without it, rows are split by content."
    )
    held_out_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of rows held out when held_out is not given; equal rows stay together.",
    )
    format: Format = Field(
        "auto", description="Shape of a row; auto looks at the columns and says what it found."
    )
    columns: dict[str, str] = Field(
        {},
        description="Your column for ours, such as {prompt: question, completion: answer}; a dotted "
        "name such as instances.0.output reaches into a column.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="error: any row that cannot be used stops the run, the first twenty are listed; "
        "skip: they are left out, counted, and written to rejected.jsonl.",
    )
    rendering: Literal["auto", "chat", "plain"] = Field(
        "auto",
        description="chat: rows become turns of the tokenizer's chat template; plain: the text as "
        "it is and an end-of-text token; auto: chat where there is a template or the rows need one.",
    )
    chat_template: str | None = Field(
        None, description="A Jinja file, for a tokenizer that has no template or an unsuited one."
    )
    loss_on: Literal["completions", "assistant", "last_assistant", "all"] = Field(
        "completions",
        description="What trains. completions: every answer, but of a prompt given as messages "
        "nothing; assistant: every assistant turn, the prompt's too; last_assistant: the last one; "
        "all: every token. A turn's own `train: false` (or `weight: 0`) is always obeyed.",
    )
    max_length: int = Field(1024, ge=8, description="Longest row in tokens.")
    over_length: Literal["error", "drop", "truncate", "split"] = Field(
        "drop",
        description="A longer row is refused, dropped, shortened (early exchanges first, then the "
        "prompt; never an answer's end), or, if it is a text, split into several.",
    )
    max_lost_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Refuse to start when over-long rows cost a larger share of supervised tokens.",
    )
    packing: Literal["auto", True, False] = Field(
        "auto",
        description="Lay the rows of an optimizer step into as few sequences of max_length as "
        "possible, each row blind to the others: faster, the same gradients. auto: where that is "
        "proven on the loaded model, else rows of like length are padded together.",
    )
    cache: bool = Field(
        True, description="Keep tokenized rows on disk, found again by content and tokenizer."
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        """``train`` with every entry's settings filled in."""
        filled = (Source(name=s) if isinstance(s, str) else s for s in self.train)
        return tuple(
            source.model_copy(
                update={
                    key: getattr(self, key)
                    for key in ("format", "columns", "split", "revision")
                    if getattr(source, key) is None
                }
            )
            for source in filled
        )

    @model_validator(mode="after")
    def _all_or_no_source_has_a_weight(self) -> Self:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            name = self.sources[weighted.index(False)].name
            raise ValueError(
                f"data.train gives some sources a weight and {name!r} none. Weights are shares of one "
                "whole: give every source one, or none"
            )
        return self


class Train(_Section):
    """The optimization, in TRL's and transformers' own terms."""

    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps.")
    per_device_train_batch_size: int = Field(
        1, ge=1, description="Sequences of at most data.max_length tokens in one forward pass."
    )
    gradient_accumulation_steps: int = Field(
        16,
        ge=1,
        description="Times per_device_train_batch_size, the rows of an optimizer step. Packed rows "
        "need fewer passes; the step's rows and gradient stay the same.",
    )
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="Peak rate; 2e-4 suits LoRA to 13B.")
    lr_scheduler_type: Literal[
        "constant_with_warmup", "constant", "cosine", "linear", "cosine_with_min_lr"
    ] = Field("constant_with_warmup", description="HF's plain `constant` ignores warmup_steps.")
    warmup_steps: float = Field(0.03, ge=0, description="Steps, or below 1 a share of all steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of the adapter weights.")
    max_grad_norm: float = Field(0.3, gt=0, description="Gradient clipping (0.3 in QLoRA).")
    optim: str = Field(
        "auto",
        description="auto: paged_adamw_8bit on CUDA, adamw_torch on a CPU; or any optim of "
        "transformers.",
    )
    activation_checkpointing: bool | NotNegative = Field(
        True,
        description="Recompute activations in the backward pass: a third slower, far smaller. A number: "
        "only in so many layers, counted from the first.",
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="auto: decoder layers and loss are computed by qlora.kernels where they know the "
        "family: the same gradients with fewer operations and less memory, proven on the loaded model at "
        "the start; else, and with off, by the libraries.",
    )
    levels: Annotated[
        tuple[NotNegative, NotNegative, NotNegative, NotNegative, NotNegative] | None,
        BeforeValidator(_as_levels),
    ] = Field(
        None,
        description="With kernels, how many layers keep what for the backward pass: five counts that add "
        "up to the model's layers. Level 1 keeps all; 2 computes gate and up again, 3 also q, k, v, 4 also "
        "the residual after attention, 5 everything. null: level 5 where activation_checkpointing asks for "
        "it, else 1.",
    )
    activation_offload: bool = Field(
        False,
        description="Keep the inputs of recomputed layers in the host's memory, where that is not the card "
        "itself; needs activation_checkpointing: true.",
    )
    mlp_tile: Annotated[int, Field(ge=64)] | None = Field(
        None,
        description="With kernels, rows of the MLP that a layer computes at a time where it keeps no gate "
        "and up: its widest tensors are then this long, and its three matrices stay unpacked meanwhile.",
    )
    embedding_offload: bool = Field(
        False,
        description="Leave the embedding table in the host's memory and gather a row a token from it; for "
        "4-bit bases whose head is not the embedding.",
    )
    fit: Literal["as_written", "auto"] = Field(
        "as_written",
        description="auto: micro-batch, accumulation, activation_checkpointing, levels, mlp_tile, "
        "both offloads and paging of the optimizer are chosen for the card, for the least arithmetic that "
        "fits; the rows of an optimizer step stay the same. as_written: what does not fit is refused.",
    )
    rehearse: Literal["auto", True, False] = Field(
        "auto",
        description="Before the first step, take the largest step of the data without keeping it: memory "
        "runs out in the first seconds or not at all. auto: on CUDA.",
    )
    seed: int = Field(
        42, ge=0, lt=2**32, description="Adapter initialisation, data order, dropout."
    )
    logging_steps: int = Field(10, ge=1, description="Steps between two lines of metrics.jsonl.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between held-out losses; null: before and after only."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints; null: a quarter of the run."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept, all of them whole.")
    spike_factor: float | None = Field(
        4.0,
        gt=1,
        description="A step whose loss is more than this times the highest of the last 64 is left out, as "
        "one whose loss or gradient is no finite number always is; below 1 none is. null: none ever is.",
    )
    after_bad_steps: Literal["stop", "roll_back"] = Field(
        "stop",
        description="After three such steps in a row: stop, or go back to the last checkpoint and on with "
        "half the learning rate, three times at most.",
    )
    oom_retries: int = Field(
        3,
        ge=0,
        description="How often in a run a step that runs out of memory is taken again in smaller passes: "
        "the same rows, the same gradient.",
    )
    sft_config: dict[str, Any] = Field(
        {}, description="Any other field of TRL's SFTConfig, by its own name."
    )

    @model_validator(mode="after")
    def _offload_needs_checkpointing(self) -> Self:
        if self.activation_offload and self.activation_checkpointing is not True:
            raise ValueError(
                "train.activation_offload keeps the inputs of recomputed layers in the host's memory, but "
                f"train.activation_checkpointing is {self.activation_checkpointing}. Write "
                "train.activation_checkpointing: true, or leave the offload out"
            )
        return self

    @model_validator(mode="after")
    def _levels_are_of_kernels(self) -> Self:
        for name in ("levels", "mlp_tile"):
            if getattr(self, name) is not None and self.kernels == "off":
                raise ValueError(
                    f"train.{name} is about the layers of qlora.kernels, and train.kernels is off. Leave "
                    "one of the two out"
                )
        if self.levels is not None and self.activation_offload and set(self.levels[:4]) != {0}:
            raise ValueError(
                "train.activation_offload keeps the inputs of layers that are computed again, and "
                "train.levels lets some of them keep more. Leave one of the two out"
            )
        return self


class Run(_Section):
    """Where a run is written and who is told."""

    dir: str = Field("runs", description="Runs are written to <dir>/<name>/<start time>/.")
    name: str = Field(
        "", description="Defaults to the recipe's file name.", pattern=r"^([\w-][\w.-]*)?$"
    )
    save_every: Annotated[str | None, AfterValidator(_a_duration)] = Field(
        "10m",
        description="The longest time between checkpoints, such as 90s, 10m or 1h30m; null: by "
        "train.save_steps alone.",
    )
    mirror: str | None = Field(
        None,
        min_length=1,
        description="A second folder, such as a mounted drive: each checkpoint, and the end of the run, is "
        "copied there while training goes on. qlora.resume finds it.",
    )
    report_to: Literal["none", "wandb", "tensorboard"] = Field(
        "none",
        description="wandb: online with a key and a network, else offline; tensorboard: event files in "
        "<run>/tensorboard. Neither can end a run.",
    )
    project: str = Field("qlora", description="The wandb project.")


class Eval(_Section):
    """What is asked of the model before and after training, beyond the held-out loss."""

    generate: int = Field(0, ge=0, description="Held-out rows answered by base and tuned; 0: none.")
    exact_match: Strings = Field(
        (), description="JSON fields that must all be equal; empty: the whole answer must be equal."
    )
    max_new_tokens: int = Field(128, ge=1, description="Length limit of an answer.")
    batch_size: int = Field(8, ge=1, description="Rows answered at a time.")
    samples: int = Field(
        0,
        ge=0,
        description="Held-out rows answered at every train.eval_steps, for the log; 0: none.",
    )


# sft_config keys that a curated field, or the run directory, already decides.
SFT_CONFIG_OWNED: dict[str, str] = {
    **{name: f"train.{name}" for name in Train.model_fields if name != "sft_config"},
    "gradient_checkpointing": "train.activation_checkpointing",
    "activation_offloading": "train.activation_offload",
    "gradient_checkpointing_kwargs": "train.activation_checkpointing",
    "activation_checkpointing_kwargs": "train.activation_checkpointing",
    "max_length": "data.max_length",
    "completion_only_loss": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "chat_template_path": "data.chat_template",
    "dataset_kwargs": "data",
    "dataset_text_field": "data.columns",
    "model_init_kwargs": "model",
    "bf16": "quant.compute_dtype",
    "fp16": "quant.compute_dtype",
    "report_to": "run.report_to",
    "run_name": "run.name",
    "output_dir": "run.dir",
    "per_device_eval_batch_size": "train.per_device_train_batch_size",
    "data_seed": "train.seed",
    **{
        f"dataloader_{name}": "nothing: a thread prepares the next step's rows"
        for name in (
            "num_workers",
            "prefetch_factor",
            "persistent_workers",
            "multiprocessing_context",
            "in_order",
        )
    },
    "dataloader_pin_memory": "the hardware found",
    "accelerator_config": "nothing: there is one device",
    "use_cpu": "the hardware found",
    "trust_remote_code": "nothing: remote code is never run",
    "hub_token": "nothing: tokens come from the environment (HF_TOKEN)",
    "packing": "data.packing",
    "packing_strategy": "data.packing",
    "padding_free": "data.packing",
    "eval_packing": "data.packing",
    "pad_to_multiple_of": "the hardware found",
    "truncation_mode": "data.over_length",
    "average_tokens_across_devices": "nothing: there is one device",
    "logging_nan_inf_filter": "nothing: a NaN always stops the run",
    "auto_find_batch_size": "train.per_device_train_batch_size and train.oom_retries",
    "resume_from_checkpoint": "qlora train --resume",
    "ignore_data_skip": "nothing: a resumed run goes on where it was",
    "restore_callback_states_from_checkpoint": "nothing: a checkpoint holds all of them",
    "save_only_model": "nothing: a checkpoint can always be resumed",
    "save_on_each_node": "nothing: there is one machine",
    "enable_jit_checkpoint": "nothing: SIGTERM always saves",
    "load_best_model_at_end": "nothing: the adapter is the last step's",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "nothing: training writes to disks only",
    ),
    "remove_unused_columns": "nothing: row numbers travel with each batch",
    "save_strategy": "train.save_steps",
    "eval_strategy": "train.eval_steps",
    "logging_strategy": "train.logging_steps",
}


class Recipe(_Section):
    """Everything that decides a run. Immutable; equal recipes mean equal runs."""

    model: Model
    quant: Quant = Quant()
    lora: Lora = Lora()
    data: Data
    train: Train = Train()
    run: Run = Run()
    eval: Eval = Eval()

    @model_validator(mode="after")
    def _samples_are_of_evaluations(self) -> Self:
        if self.eval.samples and self.train.eval_steps is None:
            raise ValueError(
                f"eval.samples is {self.eval.samples}: so many held-out rows are answered whenever the "
                "held-out loss is measured, and train.eval_steps is null, so that is never. Write a number "
                "of steps there, or leave eval.samples out"
            )
        return self

    @model_validator(mode="after")
    def _an_8_bit_head_has_its_loss(self) -> Self:
        if self.quant.head == "8bit" and (
            self.train.kernels == "off" or self.lora.train_new_tokens
        ):
            other = (
                "lora.train_new_tokens: true"
                if self.lora.train_new_tokens
                else "train.kernels: off"
            )
            raise ValueError(
                f"quant.head is 8bit, which the loss of qlora.kernels alone can read, and {other} does "
                "without it. Write quant.head: 16bit"
            )
        other_loss = {"loss_type", "label_smoothing_factor"} & self.train.sft_config.keys()
        if self.quant.head == "8bit" and other_loss:
            raise ValueError(
                f"quant.head is 8bit, which the loss of qlora.kernels alone can read, and "
                f"train.sft_config.{min(other_loss)} asks for another loss. Write quant.head: 16bit"
            )
        return self

    @model_validator(mode="after")
    def _a_table_with_the_host_is_frozen(self) -> Self:
        if self.train.embedding_offload and self.lora.train_new_tokens:
            raise ValueError(
                "train.embedding_offload leaves the embedding with the host, and lora.train_new_tokens "
                "trains rows of it on the card. Leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _sft_config_keys_are_free(self) -> Self:
        for key in self.train.sft_config:
            owner = SFT_CONFIG_OWNED.get(key)
            if owner is not None:
                raise ValueError(f"train.sft_config.{key} is decided by {owner}; set it there")
        return self

    def dump(self) -> str:
        """YAML of every value, defaults included, that :func:`load_recipe` reads back as equal."""
        return document.dump(self.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for completion and checks in an editor."""
    schema = Recipe.model_json_schema()
    for section in schema["$defs"].values():
        for field in section.get("properties", {}).values():
            items = field.get("items", {})
            if field.get("type") == "array" and "prefixItems" not in field:
                del field["type"]  # one entry may stand for a list of one
                alone = items.get("anyOf", [items])
                field["anyOf"] = [*alone, {"type": "array", "items": field.pop("items")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
