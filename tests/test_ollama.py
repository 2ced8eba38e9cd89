"""The Modelfile's template asks with the tokens of training, through every family of chat templates."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest

from qlora import records
from qlora.errors import ExportError
from qlora.export import gotemplate, ollama
from qlora.records import Record, Turn
from qlora.rendering import Renderer
from qlora.trained import Trained

EVERY = sorted(families.EVERY)
TALKS = (
    ("", ("What is 12 + 30?",)),
    ("", ("First.", "Answer one.", "Second?")),
    ("", ("a b", "c\n\nd", 'é 東京 "x" {{ y }} }}', "{'k': 1}", "last one, 3,000.5?")),
    ("You are terse.", ("Only question",)),
    ("Line one.\n\nLine two.", ("q1", "a1", "q2", "a2", "q3", "a3", "q4")),
)


ODD = ("", "plain\n", "a {{ b", 'ends with "', '"""', "{", "}} {{", '\\ "x" {{é \\x7b')


def trained(tok: Any, *, chat: bool = True, form: str = "messages") -> Trained:
    """A run as far as asking goes."""
    config = SimpleNamespace(
        config=SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=512), model_type="llama"
        ),
        commit=None,
    )
    recipe: Any = SimpleNamespace(model=SimpleNamespace(name="./nowhere"))
    renderer = Renderer(tok, chat=chat)
    return Trained("a/run", None, recipe, None, config, renderer, form, None)  # type: ignore[arg-type]


def turns_of(system: str, said: Sequence[str]) -> list[Turn]:
    first = [Turn("system", system)] if system else []
    return [*first, *(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said))]


def transformers_ids(tok: Any, turns: Sequence[Turn]) -> list[int]:
    """The independent reference: transformers' own rendering."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tok(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", EVERY)
def test_the_tokens_are_those_of_training_in_every_family(name: str) -> None:
    tok = families.tokenizer_of(name)
    found = trained(tok)
    made = ollama.template(found)
    assert made.proven >= 4
    compared = 0
    for system, said in TALKS:
        if system and not families.EVERY[name].system:
            continue
        turns = turns_of(system, said)
        assert ollama.ids_of(found, made, turns) == transformers_ids(tok, turns)
        compared += 1
    assert compared == (5 if families.EVERY[name].system else 3)


@pytest.mark.parametrize("name", EVERY)
def test_a_bos_is_written_by_the_file_or_by_the_template_but_not_by_both(name: str) -> None:
    tok = families.tokenizer_of(name)
    made = ollama.template(trained(tok))
    begins = "{{ bos_token }}" in families.EVERY[name].template
    assert made.add_bos is begins
    assert tok.bos_token is None or tok.bos_token not in made.text


@pytest.mark.parametrize("name", EVERY)
def test_what_a_family_cannot_express_is_told(name: str) -> None:
    family = families.EVERY[name]
    limits = " ".join(ollama.template(trained(families.tokenizer_of(name))).limits)
    assert ("no system turn" in limits) is (not family.system)
    assert ("strips spaces" in limits) is family.trims
    assert ("thoughts of earlier answers" in limits) is (name == "qwen3")


@pytest.mark.skipif(shutil.which("go") is None, reason="needs a Go toolchain")
def test_go_itself_gives_what_our_evaluator_gives(tmp_path: Path) -> None:
    cases = []
    for name in EVERY:
        made = ollama.template(trained(families.tokenizer_of(name)))
        for system, said in TALKS:
            cases.append((made.text, system, turns_of(system, said)))
    cases += [(gotemplate.quoted(text), "", []) for text in ODD]
    asked = [
        {
            "t": text,
            "s": system,
            "m": [{"Role": turn.role, "Content": turn.content} for turn in turns],
        }
        for text, system, turns in cases
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PATH": str(Path(shutil.which("go") or "").parent) + ":/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    expected = [
        gotemplate.evaluate(text, system=system, messages=turns) for text, system, turns in cases
    ]
    assert json.loads(done.stdout) == expected


GO = """package main
import ("bytes"; "encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Case struct { T string; S string; M []*Message }
func main() {
	data, _ := os.ReadFile("asked.json")
	var cases []Case
	if err := json.Unmarshal(data, &cases); err != nil { panic(err) }
	var out []string
	for _, c := range cases {
		t, err := template.New("").Option("missingkey=zero").Parse(c.T)
		if err != nil { panic(err) }
		var b bytes.Buffer
		err = t.Execute(&b, map[string]any{"System": c.S, "Messages": c.M, "Response": ""})
		if err != nil { panic(err) }
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def test_a_template_that_counts_its_turns_is_refused() -> None:
    tok = _with(families.tokenizer_of("zephyr"), "({{ messages | length }})" + families.ZEPHYR)
    with pytest.raises(
        ExportError, match=r"written as one of Ollama's: .*gets other tokens than in training"
    ):
        ollama.template(trained(tok))


def test_a_template_that_writes_later_turns_otherwise_is_refused() -> None:
    later = families.ZEPHYR.replace(
        "{% for m in messages %}", "{% for m in messages %}{{ '* ' if loop.index > 3 }}"
    )
    with pytest.raises(ExportError, match=r"(?s)otherwise.*`qlora serve`"):
        ollama.template(trained(_with(families.tokenizer_of("zephyr"), later)))


def test_a_template_that_looks_at_what_is_said_is_refused() -> None:
    shouting = families.ZEPHYR.replace(
        "{% if m.role == 'assistant' %}",
        "{{ '!' if '?' in m.content }}{% if m.role == 'assistant' %}",
    )
    with pytest.raises(ExportError, match="because the template looks at what is said"):
        ollama.template(trained(_with(families.tokenizer_of("zephyr"), shouting)))


def test_plain_questions_are_asked_bare_and_alpaca_ones_under_their_headings() -> None:
    tok = families.tokenizer_of("llama3")
    bare = ollama.template(trained(tok, chat=False, form="prompt_completion"))
    assert bare.text == "{{ .Prompt }}" and bare.add_bos
    headed = trained(tok, chat=False, form="alpaca")
    made = ollama.template(headed)
    assert made.text == records.alpaca_prompt("{{ .Prompt }}")
    question = Turn("user", "Name a colour.")
    row = Record(
        (question, Turn("assistant", "")), plain_prompt=records.alpaca_prompt(question.content)
    )
    assert ollama.ids_of(headed, made, [question]) == headed.renderer.prompt_ids(row)
    assert "each question stands alone" in made.limits[0]


def test_the_modelfile_names_every_end_and_samples_as_the_run_was_evaluated(tmp_path: Path) -> None:
    found = trained(families.tokenizer_of("llama3"))
    text = ollama.modelfile(found, "m-q8_0.gguf", ollama.template(found))
    lines = text.splitlines()
    assert "FROM ./m-q8_0.gguf" in lines
    stops = {
        line.removeprefix("PARAMETER stop ") for line in lines if line.startswith("PARAMETER stop")
    }
    assert stops == {'"<|eot_id|>"', '"<|end_of_text|>"'}
    assert "PARAMETER temperature 0" in lines and "PARAMETER repeat_penalty 1.0" in lines
    assert "PARAMETER num_ctx 512" in lines  # the base has no more
    assert text.count('"""') == 2
    assert (
        ollama.write(found, tmp_path, "x.gguf", ollama.template(found)).read_text().count("FROM")
        == 1
    )


# --- the evaluator


@pytest.mark.parametrize("text", ODD)
def test_any_text_survives_being_written_into_a_template(text: str) -> None:
    written = gotemplate.quoted(text)
    assert gotemplate.evaluate(f"<{written}>" if "{{ " in written else written) in (
        f"<{text}>",
        text,
    )
    assert '"""' not in written


@pytest.mark.parametrize(
    ("template", "why"),
    [("{{ .Tools }}", "not known"), ("{{ if gt 1 2 }}x{{ end }}", "not known"), ("{{ end }}", "without a"),
     ("{{ if .System }}x", "does not end"), ("{{ else }}", "without an if")],
)  # fmt: skip
def test_what_the_evaluator_does_not_know_is_an_error(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        gotemplate.evaluate(template)


def _with(tok: Any, template: str) -> Any:
    import copy

    changed = copy.deepcopy(tok)
    changed.chat_template = families.MARK.sub("", template)
    return changed
