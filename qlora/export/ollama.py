"""A Modelfile for Ollama whose rendered prompt has the tokens of training, or a refusal that says why not.

Ollama writes prompts with Go's text/template, not with the chat template of the model. So the chat
template is asked for conversations of marked turns; what stands between the marks becomes the Go
template. That is then evaluated on other conversations, and each must give the tokens that the run was
trained with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import rundir, tokenizer
from qlora.errors import DataError, ExportError
from qlora.export import gotemplate
from qlora.export.gotemplate import LAST, quoted
from qlora.records import Turn
from qlora.trained import Trained

MAX_CONTEXT = 4096  # asked for at most: the cache of a longer one is memory that few questions need
_MARKS = tuple(f"zq{number}zq" for number in range(6))
_ELSE = (
    "Serve the GGUF file with llama.cpp's own server, which runs the chat template as it is, or the run "
    "with `qlora serve`."
)
# Conversations that the template was not made of: (system, questions and answers in turn).
_TRIALS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("What is two plus two?",)),
    ("", ("Hi", "Hello! How can I help?", "And 3.14 * 2,000?")),
    ("", ("Überall 東京\n\n  indented\tline", "{'a': [1, 2]}\n", "a", "b", 'He said "no" {{ .x }}')),
    ("Be brief.", ("What is two plus two?",)),
    ("Du bist hilfsbereit.\nAntworte kurz.", ("Hi", "Hallo.", "x", "y", "Noch etwas?")),
    ("", ("ignore <b>this</b> & 'that'", "No.", "1 2 3", "4", "5 6", "7", "8?")),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """A Go template that was proven, and what it cannot do.

    Attributes:
        text: Without the BOS, which llama.cpp adds by the GGUF file's word.
        add_bos: Whether the GGUF file must say that a BOS comes first.
        proven: Of how many conversations the tokens were compared, all of them equal.
        limits: Sentences about what is not as in training.
    """

    text: str
    add_bos: bool
    proven: int
    limits: tuple[str, ...]


def begins_with_bos(found: Trained) -> bool:
    """Whether the prompts of training begin with the tokenizer's BOS."""
    ids = found.prompt_ids([Turn("user", "a")])
    return found.tok.bos_token_id is not None and ids[:1] == [found.tok.bos_token_id]


def template(found: Trained) -> Template:
    """The Go template that asks with the tokens of training.

    Raises:
        ExportError: The chat template does what a Go template of turns cannot; says what.
    """
    if not found.renderer.chat:
        return _prove_plain(found)
    with_system, refusal = _pieces(found, system=True)
    without, why = _pieces(found, system=False)
    if without is None:
        raise ExportError(f"the chat template cannot be written as one of Ollama's: {why}. {_ELSE}")
    limits = []
    if with_system is None:
        if "refuse" not in refusal:
            raise ExportError(
                f"the chat template cannot be written as one of Ollama's: {refusal}. {_ELSE}"
            )
        limits.append("The chat template knows no system turn; one that is given is left out.")
    elif with_system[2:] != without[1:]:
        raise ExportError(
            "the chat template cannot be written as one of Ollama's: with a system turn it writes the "
            f"turns after it otherwise. {_ELSE}"
        )
    text = _written(with_system, without, _bos(found))
    limits += _limits(found)
    made = Template(text, begins_with_bos(found), 0, tuple(limits))
    proven = _prove(found, made, system=with_system is not None)
    return Template(text, made.add_bos, proven, made.limits)


def modelfile(found: Trained, file: str, made: Template) -> str:
    """The Modelfile's text for a GGUF file that lies beside it."""
    tok = found.tok
    generation = _generation_config(found)
    stops = [tok.convert_ids_to_tokens(token) for token in tokenizer.stop_ids(tok, generation)]
    config = found.config.config.get_text_config()
    context = min(MAX_CONTEXT, getattr(config, "max_position_embeddings", None) or MAX_CONTEXT)
    lines = [
        "# Asks with the tokens of training. ollama create NAME -f Modelfile",
        f"FROM ./{file}",
        f'TEMPLATE """{made.text}"""',
        *(f"PARAMETER stop {_parameter(stop)}" for stop in stops if stop),
        f"PARAMETER num_ctx {context}",
        "# Greedy and unpenalized, as the run was evaluated; Ollama's own are 0.8 and 1.1.",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
        *(f"# Not as in training: {limit}" for limit in made.limits),
    ]
    return "\n".join(lines) + "\n"


def write(found: Trained, folder: Path, file: str, made: Template) -> Path:
    """Write the Modelfile beside a GGUF file."""
    path = folder / "Modelfile"
    rundir.write_text(path, modelfile(found, file, made))
    return path


# --- making it


def _pieces(found: Trained, *, system: bool) -> tuple[list[str] | None, str]:
    """What the chat template writes around three exchanges: before, between and after the contents.

    Returns:
        ``[before system, after system,] before the first question, after a question, after an answer, after
        the last question``; or None and why not.
    """
    marks = _MARKS if system else _MARKS[1:]
    roles = [*(["system"] if system else []), "user", "assistant", "user", "assistant", "user"]
    turns = [Turn(role, mark) for role, mark in zip(roles, marks, strict=True)]
    try:
        text = found.renderer.prompt(found.record(turns))
    except DataError as error:
        return None, f"it refuses these turns ({error})"
    pieces, rest = [], text
    for mark in marks:
        before, found_it, rest = rest.partition(mark)
        if not found_it or mark in rest:
            return None, "it does not show each turn once and in order"
        pieces.append(before)
    first = 1 if system else 0  # what stands before the first question
    head, (to_answer, to_question, to_answer_2, to_question_2) = (
        pieces[: first + 1],
        pieces[first + 1 :],
    )
    if (to_answer, to_question) != (to_answer_2, to_question_2):
        return None, "it writes a turn otherwise when another one follows"
    return [*head, to_answer, to_question, rest], ""


def _written(with_system: list[str] | None, without: list[str], bos: str) -> str:
    """The Go template of the pieces. Turns other than questions and answers are its head."""
    before, to_answer, to_question, last = without
    head = quoted(before.removeprefix(bos))
    if with_system is not None:
        one, two = with_system[:2]
        start = quoted(one.removeprefix(bos))
        head = f"{{{{ if .System }}}}{start}{{{{ .System }}}}{quoted(two)}{{{{ else }}}}{head}{{{{ end }}}}"
    asked = f"{{{{ if {LAST} }}}}{quoted(last)}{{{{ else }}}}{quoted(to_answer)}{{{{ end }}}}"
    if last == to_answer:
        asked = quoted(last)
    said = f"{{{{ if {LAST} }}}}{{{{ else }}}}{quoted(to_question)}{{{{ end }}}}"
    return (
        f"{head}{{{{ range $i, $m := .Messages }}}}"
        f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{asked}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{said}{{{{ end }}}}{{{{ end }}}}'
    )


def _bos(found: Trained) -> str:
    return found.tok.bos_token if begins_with_bos(found) else ""


def _limits(found: Trained) -> list[str]:
    """What some contents become in training that a Go template cannot do to them."""
    limits = []
    if _strips(found):
        limits.append(
            "the chat template strips spaces around a turn, which Ollama leaves as they are."
        )
    thought = "<think>\nzq1zq\n</think>\n\nzq2zq"
    turns = [Turn("user", "a"), Turn("assistant", thought), Turn("user", "b")]
    if thought not in found.renderer.prompt(found.record(turns)):
        limits.append(
            "the chat template drops the thoughts of earlier answers, which a client that sends them back "
            "whole gets asked with; one turn alone is exact."
        )
    return limits


def _strips(found: Trained) -> bool:
    spaced = [Turn("user", "  zq0zq  "), Turn("assistant", "  zq1zq  "), Turn("user", "  zq2zq  ")]
    text = found.renderer.prompt(found.record(spaced))
    return any(turn.content not in text for turn in spaced)


# --- proving it


def ids_of(found: Trained, made: Template, turns: Sequence[Turn]) -> list[int]:
    """The tokens with which Ollama asks: the template evaluated, and the BOS if the GGUF file asks "
    "for it."""
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    text = gotemplate.evaluate(
        made.text, system=system, prompt=turns[-1].content, messages=list(turns)
    )
    if made.add_bos:
        text = found.tok.bos_token + text
    return list(found.tok(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prove(found: Trained, made: Template, *, system: bool) -> int:
    proven, strips = 0, _strips(found)
    for instruction, said in _TRIALS:
        if instruction and not system:
            continue
        turns = [Turn("system", instruction)] if instruction else []
        for number, words in enumerate(said):
            words = words.strip() if strips else words  # what is stripped is told
            turns.append(Turn("assistant" if number % 2 else "user", words))
        if ids_of(found, made, turns) != found.prompt_ids(turns):
            raise ExportError(
                "the chat template cannot be written as one of Ollama's: a conversation of "
                f"{len(turns)} turns{' with a system turn' if instruction else ''} gets other tokens "
                f"than in training, because the template looks at what is said. {_ELSE}"
            )
        proven += 1
    return proven


def _prove_plain(found: Trained) -> Template:
    """For rows that trained as plain text: the question alone, between the headings of its format."""
    before, _, after = found.renderer.prompt(found.record([Turn("user", _MARKS[0])])).partition(
        _MARKS[0]
    )
    made = Template(
        f"{quoted(before)}{{{{ .Prompt }}}}{quoted(after)}",
        begins_with_bos(found),
        0,
        ("rows trained as plain text, so that each question stands alone: there are no turns.",),
    )
    questions = [said[0] for _, said in _TRIALS]
    for question in questions:
        turns = [Turn("user", question)]
        if ids_of(found, made, turns) != found.prompt_ids(turns):
            raise ExportError(
                "the plain prompt cannot be written for Ollama: its tokens are not those of training. "
                + _ELSE
            )
    return Template(made.text, made.add_bos, len(questions), made.limits)


def _generation_config(found: Trained) -> Any:
    """What a model's folder says of its ends, where it says something."""
    from transformers import GenerationConfig

    from qlora.recipe import is_local, local_path

    name = found.recipe.model.name
    try:
        where = str(local_path(name)) if is_local(name) else name
        return GenerationConfig.from_pretrained(where, revision=found.config.commit)
    except (OSError, ValueError):
        return None


def _parameter(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
