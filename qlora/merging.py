"""A run's adapter merged into its base, and the proof that the result is what was trained.

Merging onto the 16-bit checkpoint, or into 4-bit weights, is off by the error of quantization from what
was trained and evaluated; folding the adapter into the unpacked 4-bit base is not. Neither is believed:
both are measured on held-out rows against the model that was trained, the nearer one is written, read back
from disk as anybody would, and measured once more. What is too far off is not kept.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError

import qlora
from qlora import (
    adapter,
    cards,
    hardware,
    loader,
    modelcard,
    probing,
    report,
    rundir,
    shards,
    tokenizer,
    trained,
    weights,
)
from qlora.agreement import Agreement, compare
from qlora.errors import ExportError, ModelError
from qlora.folded import Folded, Onto
from qlora.places import expanded, shown
from qlora.probing import Probes
from qlora.recipe import EMBEDDED, HUB, is_local
from qlora.records import Turn
from qlora.screen import Screen, duration
from qlora.trained import Trained
from qlora.weights import Stored

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
# The largest mean KL divergence from the trained model, in nats a token. Unpacked NF4 is off by rounding
# alone; the checkpoint by what quantization took: let pass while it is little beside what was learned.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
QUANTIZING, SHARE_LOST = 0.1, 0.05
SPARE_BYTES = 64 * 2**20
_TURNS = [
    Turn("user", "Where is my parcel?"),
    Turn("assistant", "On its way."),
    Turn("user", "When?"),
]


@dataclass(frozen=True)
class Merged:
    """A merged model on disk and how near it came.

    Attributes:
        dir: A folder that any library of the field opens.
        onto: Which base the adapter was folded into.
        dtype: Of the weights.
        verdict: The model on disk held against the trained one.
        learned: The base held against the trained one: what there was to lose.
        measured: By base it could be folded into, the distance from the trained model.
        to_checkpoint: By the same, the distance from the 16-bit checkpoint that was quantized.
        probes: The rows on which all of this was measured.
        seconds: Until the base was loaded, and from there until it was measured, written and proven.
    """

    dir: Path
    onto: Onto
    dtype: str
    verdict: Agreement
    learned: Agreement
    measured: dict[Onto, Agreement]
    to_checkpoint: dict[Onto, Agreement]
    probes: str
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "onto": self.onto,
            "dtype": self.dtype,
            "verdict": self.verdict.to_json(),
            "learned": self.learned.to_json(),
            "measured": {onto: one.to_json() for onto, one in self.measured.items()},
            "to_checkpoint": {onto: one.to_json() for onto, one in self.to_checkpoint.items()},
            "probes": self.probes,
            "seconds": self.seconds,
        }


def merge(
    where: str | Path,
    out: str | Path | None = None,
    *,
    onto: Literal["auto", "nf4", "16bit"] = "auto",
    dtype: DTypeName = "auto",
    max_kl: float | None = None,
    console: Console | None = None,
) -> Merged:
    """Write a run's adapter and base as one 16-bit model, shard by shard, and prove it.

    In memory at a time are the 4-bit base, one file's tensors and their bytes.

    Args:
        where: A finished run.
        out: The folder to write; default: ``merged`` in the run.
        onto: The base to fold into; auto measures both and takes the nearer to what was trained.
        dtype: Of the weights; auto is what the run computed in, or on a CPU the checkpoint's own.
        max_kl: The largest mean KL divergence, in nats a token, from the trained model; default: what
            rounding may do; onto 16bit a twentieth of what training moved the base by, at most 0.1.
        console: Where it is told; standard output by default.

    Raises:
        ExportError: ``out`` is there already, the disk is too small, or the merged model is further from
            the trained one than ``max_kl``: nothing is left behind then.
        CheckpointError: The run has not finished, or its adapter or base is not what it was.
    """
    screen = Screen(console or Console())
    began = time.monotonic()
    found = trained.find(where, finished=True)
    if found.run is None or found.source is None:
        raise ExportError(
            f"{where}: a model without an adapter; there is nothing to merge. Name a run."
        )
    target = expanded(out) if out is not None else found.run.dir / "merged"
    rundir.require_free(target)
    # Where the table lies changes no number; here it is wanted whole.
    train = found.recipe.train.model_copy(update={"embedding_offload": False})
    found = replace(found, recipe=found.recipe.model_copy(update={"train": train}))
    wanted = _dtype(found, dtype)
    clock = {"began": began}
    model = trained.load(found, bars=screen.live)
    probes = probing.probes(found, screen.track)
    clock["loaded"] = time.monotonic()
    screen.say("merge", f"{found.name}: {len(probes.rows)} {probes.origin} tell how near it comes")
    reference = probes.logits(model)
    with adapter.disabled(model):
        learned = probes.agreement(reference, model)
    candidates, originals = _candidates(found, model, onto, screen)
    _prove(candidates)
    measured, to_checkpoint = _measure(candidates, originals, wanted, probes, reference, screen)
    kept = min(measured, key=lambda name: measured[name].kl)
    compute = getattr(torch, cards.compute_dtype(found.recipe, found.card))
    coarse = max(wanted, compute, key=ROUNDING.__getitem__)
    limit = _limit(max_kl, coarse, learned, quantized=kept == "16bit" and originals is not None)
    if max_kl is None:  # where little was learned, the base itself would be near enough
        least = max(4 * measured[kept].kl, ROUNDING[torch.float32])
        limit = min(limit, max(learned.kl / 2, least))
    clock["measured"] = time.monotonic()
    try:
        with rundir.writing_aside(target) as folder:
            _write(folder, found, model, candidates[kept], wanted, screen)
            clock["written"] = time.monotonic()
            del model, candidates
            hardware.let_go()
            verdict = _verdict(folder, found, probes, reference)
            clock["proven"] = time.monotonic()
            marks = list(clock.items())
            merged = Merged(
                target, kept, str(wanted).removeprefix("torch."), verdict, learned, measured,
                to_checkpoint, probes.origin,
                {name: round(now - then, 2) for (_, then), (name, now) in pairwise(marks)},
            )  # fmt: skip
            _require_near(merged, limit)
            _describe(folder, found, merged)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{target}: cannot be written: {getattr(error, 'strerror', None) or error}. Nothing is left of "
            "it; free some room, or name another folder with --out."
        ) from None
    screen.say("proof", f"read back from disk, against the trained model: {verdict}")
    took = duration(time.monotonic() - began)
    screen.say("merged", f"onto {kept}, {merged.dtype}, in {took}: {shown(target)}")
    if out is None:
        report.leave(found.run, screen)  # whose first lines now tell of it
    return merged


def _prove(candidates: Mapping[Onto, Folded]) -> None:
    for one in candidates.values():
        one.prove()


def _limit(
    max_kl: float | None, dtype: torch.dtype, learned: Agreement, *, quantized: bool
) -> float:
    if max_kl is not None:
        return max_kl
    return max(ROUNDING[dtype], min(QUANTIZING, SHARE_LOST * learned.kl) if quantized else 0.0)


def _dtype(found: Trained, asked: DTypeName) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)  # type: ignore[no-any-return]
    compute = getattr(torch, cards.compute_dtype(found.recipe, found.card))
    own = getattr(found.config.config.get_text_config(), "dtype", None)
    return compute if compute != torch.float32 else own or compute


def _candidates(
    found: Trained, model: Any, onto: str, screen: Screen
) -> tuple[dict[Onto, Folded], Mapping[str, Stored] | None]:
    """The bases to fold into that are asked for, and the checkpoint's tensors where they are of use.

    Raises:
        ExportError: The one that is asked for is not there.
    """
    loaded = Folded(model)
    if not loaded.packed:  # plain LoRA: what is loaded is the checkpoint
        if onto == "nf4":
            raise ExportError(f"{found.name}: its base is not 4-bit. Merge with --onto 16bit.")
        return {"16bit": loaded}, None
    if onto == "nf4":
        return {"nf4": loaded}, None
    try:
        originals = weights.tensors(loader.weight_files(found.recipe, found.config))
        wanted = Folded(model, originals)
    except (
        ExportError,
        ModelError,
        OSError,
        SafetensorError,
    ) as error:  # the NF4 base may be kept alone
        said = str(error).strip().splitlines()[0]
        if onto == "16bit":
            raise ExportError(f"{found.name}: cannot be merged onto 16bit: {said}") from None
        screen.say("merge", f"onto 16bit cannot be tried: {said}")
        return {"nf4": loaded}, None
    return ({"16bit": wanted} if onto == "16bit" else {"nf4": loaded, "16bit": wanted}), originals


def _measure(
    candidates: Mapping[Onto, Folded],
    originals: Mapping[str, Stored] | None,
    dtype: torch.dtype,
    probes: Probes,
    reference: torch.Tensor,
    screen: Screen,
) -> tuple[dict[Onto, Agreement], dict[Onto, Agreement]]:
    """How far each is from the trained model, and from the 16-bit checkpoint as it was before training."""
    of_checkpoint = None
    if originals is not None:
        model = next(iter(candidates.values())).model
        bare = Folded(model, originals, with_adapter=False)
        with adapter.disabled(model), bare.in_place(dtype):
            of_checkpoint = probes.logits(model)
    measured: dict[Onto, Agreement] = {}
    to_checkpoint: dict[Onto, Agreement] = {}
    for name, one in candidates.items():
        with one.in_place(dtype):
            logits = probes.logits(one.model)
        measured[name] = compare(reference, logits)
        said = f"onto {name}: KL {measured[name].kl:.2g} from what was trained"
        if of_checkpoint is not None:
            to_checkpoint[name] = compare(of_checkpoint, logits)
            said += f", {to_checkpoint[name].kl:.3g} from the original 16-bit base"
        screen.say("measured", said)
    return measured, to_checkpoint


def _write(
    folder: Path, found: Trained, model: Any, folded: Folded, dtype: torch.dtype, screen: Screen
) -> None:
    """Weights, configuration, tokenizer, and what ends a generation."""
    slots = folded.slots(dtype)
    size = sum(slot.nbytes for slot in slots.values())
    free = shutil.disk_usage(folder).free
    if free < size + SPARE_BYTES:
        raise ExportError(
            f"{folder.parent}: the merged model takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free. Free some room, or name another folder with --out."
        )

    def watch(names: Sequence[str]) -> Iterable[str]:
        return screen.track(names, "merging")

    shards.write(folder, slots, lambda name: folded.tensor(name, dtype), watch)
    config = copy.deepcopy(folded.base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(folded.base).__name__]
    rundir.write_json(folder / "config.json", config.to_diff_dict())
    tok = found.tok
    tok.save_pretrained(folder)
    ends = tokenizer.stop_ids(tok, folded.base.generation_config)
    generation = folded.base.generation_config.to_diff_dict()
    generation |= {"eos_token_id": ends, "pad_token_id": tok.pad_token_id}
    rundir.write_json(folder / "generation_config.json", generation)
    rundir.write_json(folder / trained.MERGED, _facts(found))


def _facts(found: Trained) -> dict[str, Any]:
    """What :func:`qlora.trained.find` needs to ask a merged model as its run was asked."""
    recipe = found.recipe
    # A merged model is given away: where files lie on this machine is nobody's business.

    def is_public(name: str) -> bool:
        return name.startswith(EMBEDDED) or not is_local(name)

    names = [*(source.name for source in recipe.data.sources), recipe.data.held_out or EMBEDDED]
    public = all(name.startswith((EMBEDDED, HUB)) for name in names)
    data = recipe.data.model_dump(mode="json") | {"chat_template": None}
    if not public:
        data |= {"train": [trained.UNKNOWN], "held_out": None}
    return {
        "run": found.name,
        "base": recipe.model.name if is_public(recipe.model.name) else "",
        "rendering": "chat" if found.renderer.chat else "plain",
        "form": found.form,
        "data": data,
        "eval": found.recipe.eval.model_dump(mode="json"),
        "qlora": qlora.__version__,
    }


def _verdict(folder: Path, found: Trained, probes: Probes, reference: torch.Tensor) -> Agreement:
    """The folder as anybody would load it, held against the model that was trained.

    Raises:
        ExportError: It does not load whole, or asks with other tokens.
    """
    again = trained.find(folder)
    if again.prompt_ids(_turns(found)) != found.prompt_ids(_turns(found)):
        raise ExportError(
            f"{folder}: the saved tokenizer asks with other tokens than the run did; nothing is kept. Name "
            "another template in data.chat_template, and train again."
        )
    dtype = getattr(torch, cards.compute_dtype(found.recipe, found.card))
    attention = loader.attention_on(found.card, found.recipe, found.config)
    try:
        model = weights.reopened(folder, found.card, dtype, attention)
    except weights.Incomplete as error:
        raise ExportError(
            f"the merged model does not load again: {error}. Nothing is kept."
        ) from None
    return probes.agreement(reference, model)


def _turns(found: Trained) -> list[Turn]:
    return _TURNS if found.renderer.chat else _TURNS[-1:]


def _require_near(merged: Merged, limit: float) -> None:
    if merged.verdict.kl <= limit:
        return
    way = "--onto nf4" if merged.onto == "16bit" else "--dtype float32"
    raise ExportError(
        f"the merged model is not what was trained: {merged.verdict}. At most {limit:.2g} nats a token "
        f"were allowed (training moved the base by {merged.learned.kl:.2g}). Nothing is kept. Try {way}, "
        "or allow more with --max-kl."
    )


def _describe(folder: Path, found: Trained, merged: Merged) -> None:
    assert found.run is not None
    card = modelcard.text(found, found.run.result, merged.to_json())
    rundir.write_text(folder / "README.md", card)
    rundir.write_json(folder / trained.MERGED, _facts(found) | merged.to_json())
