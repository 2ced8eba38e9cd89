"""A chat template renders what transformers renders, within two seconds and 256 MB, on every row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE
from families import EVERY, tokenizer_of
from transformers import AutoTokenizer

from qlora import templates, tokenizer
from qlora.errors import DataError, ModelError
from qlora.records import Record, Turn
from qlora.rendering import Renderer
from qlora.templates import Refused
from qlora.tokenizer import Asked

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux keeps to a limit of memory"
)


@pytest.fixture
def tok() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def fresh() -> Iterator[None]:
    """No process from before, and none left behind."""
    forget()
    yield
    forget()


def forget() -> None:
    if templates._worker is not None:
        templates._worker.close()
        templates._worker = None


def variables(turns: int = 1) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}] * turns, "tools": None}


def one(template: str, turns: int = 1) -> str | Refused:
    (text,) = templates.render(template, [variables(turns)], "demo")
    return text


# --- the same text as transformers


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "ü", "n": 1.5}}}
CONVERSATIONS: list[list[Turn]] = [
    [Turn("user", "Hi.")],
    [Turn("user", " Hi.\n"), Turn("assistant", "Ho <b>&</b> \U0001f600")],
    [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")],
    [Turn("system", "Be {{ brief }}."), Turn("user", "{% a %}"), Turn("assistant", "")],
    [Turn("user", "\ud800 alone"), Turn("assistant", "\u2028\x00")],
    [Turn("user", "a"), Turn("assistant", "b", fields={"reasoning_content": "thinks"})],
    [Turn("user", "a"), Turn("assistant", "b", fields={"thinking": "thinks", "name": None})],
    [
        Turn("user", "a"),
        Turn("assistant", "", fields={"tool_calls": [CALL]}),
        Turn("tool", "found", fields={"name": "look"}),
        Turn("assistant", "It is there."),
    ],
]


@pytest.mark.parametrize("name", [*EVERY, "base"])
@pytest.mark.parametrize("tools", [(), (TOOL,)])
@pytest.mark.parametrize("reply", [False, True])
def test_every_family_renders_byte_for_byte_as_transformers_does(
    name: str, tools: Any, reply: bool
) -> None:
    tok = AutoTokenizer.from_pretrained(BASE) if name == "base" else tokenizer_of(name)
    asked = [Asked(turns, tools, reply) for turns in CONVERSATIONS]
    for turns, text in zip(CONVERSATIONS, tokenizer.render_all(tok, asked), strict=True):
        try:
            expected = tok.apply_chat_template(
                [turn.message() for turn in turns], tools=list(tools) or None,
                tokenize=False, add_generation_prompt=reply,
            )  # fmt: skip
        except Exception:  # noqa: BLE001 - the template's, whatever it is
            assert isinstance(text, DataError)
        else:
            assert text == expected


DIALECT = [
    "{%- generation -%} {% set x = 1 %}{{ messages[0].content }} {%- endgeneration %}{{ x is defined }}",
    "  {% if true %}\n  line\n  {% endif %}\n{{ messages | tojson }}\n",
    "{{ {'b': '<ü>', 'a': [1, 2.5, none]} | tojson(indent=2, sort_keys=true) }}",
    "{{ {'a': 1} | tojson(separators=(',', ':')) }}",
    "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a + ns.b }}{{ ns.c is defined }}",
    "{% set ns = namespace({'x': 3}) %}{{ ns.x }}",
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys([1, 2], 0) }}",
    "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools }}|{{ documents }}|{{ nothing }}",
    "{{ messages[0] }}{{ messages | length }}{{ tools is none }}",
    "{{ strftime_now('%Y') }}",
    "{{ '%s' | format('a') }}{{ '{}-{}'.format(1, 2) }}{{ 'a'.center(5) }}",
    "{{ messages[0].content | upper }}",
    "{{ messages[0]['name'] is defined }}",
    "{{ raise_exception('never ' + messages[0].role) }}",
    "{{ nothing.at.all }}",
    "{% set ns = namespace(_a=1) %}",
    "{% set ns = namespace() %}{% set ns._a = 1 %}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__ }}",
]  # fmt: skip


@pytest.mark.parametrize("template", DIALECT)
def test_each_word_of_the_dialect_means_what_it_means_to_transformers(
    tok: Any, template: str
) -> None:
    tok.chat_template = template
    turns = [Turn("user", "Grüße", fields={"name": None, "list": [1, (2,)], "raw": b"bytes"})]
    try:
        expected = tok.apply_chat_template([turn.message() for turn in turns], tokenize=False)
    except Exception as error:  # noqa: BLE001 - the template's, whatever it is
        with pytest.raises(DataError, match="refuses the turns") as caught:
            tokenizer.render(tok, turns)
        assert "_a" in str(caught.value) or str(error) in str(caught.value)
    else:
        assert tokenizer.render(tok, turns) == expected


def test_a_value_of_no_type_of_json_is_shown_by_its_types_name(tok: Any) -> None:
    tok.chat_template = "{{ messages[0].when }} {{ messages[0].raw }}"
    fields = {"when": datetime(2026, 1, 1, tzinfo=UTC), "raw": b"x"}
    turns = [Turn("user", "a", fields=fields)]
    assert tokenizer.render(tok, turns) == "<datetime> <bytes>"
    assert tok.apply_chat_template([turns[0].message()], tokenize=False) == "<datetime> <bytes>"


def test_a_tokenizer_with_several_templates_uses_the_one_for_tools(tok: Any) -> None:
    tok.chat_template = {"default": "plain", "tool_use": "tools"}
    asked = [Asked([Turn("user", "a")], tools) for tools in ((), (TOOL,), ())]
    assert tokenizer.render_all(tok, asked) == ["plain", "tools", "plain"]
    tok.chat_template = {"rag": "plain"}
    with pytest.raises(ModelError, match=r"the chat template of .*no default"):
        tokenizer.render(tok, [Turn("user", "a")])


# --- the limits


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
SLOW = {
    "loops": ENDLESS,
    "one operation in C": "{{ ('9' * 4000) | int ** 3000 }}",
    "a list of itself": DOUBLED + "{{ ns.a | tojson | length }}",
}
LARGE = {
    "times": "{{ 'a' * 300000000 }}",
    "known when compiled": "{{ 'a' * 100000000 ~ 'b' * 100000000 ~ 'c' * 100000000 }}",
    "doubling": "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "format": "{{ '{:2000000000d}'.format(1) }}",
    "filter": "{{ 'a' | center(2000000000) }}",
    "join": "{{ range(99999) | join('a' * 90000) | length }}",
    "bytes": "{{ (5).to_bytes(2000000000, 'big') | length }}",
    "list": "{{ (range(99999) | list * 3000) | sort | length }}",
}


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
@pytest.mark.skipif(sys.platform == "win32", reason="tested with the clock of the other side")
def test_a_rendering_that_goes_on_for_ever_is_stopped(template: str) -> None:
    with pytest.raises(
        ModelError, match=r"^demo: it used up its 2 seconds on a conversation of 1 turn"
    ):
        one(template)
    assert one(CHATML) == "<|im_start|>user\nhello<|im_end|>\n"  # and the next one is served


@linux_only
@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_rendering_that_takes_gigabytes_is_stopped(template: str) -> None:
    with pytest.raises(ModelError, match="demo: it used up its 256 MB of memory on a conversation"):
        one(template)
    assert one(CHATML) == "<|im_start|>user\nhello<|im_end|>\n"


def test_a_text_that_is_longer_than_any_row_is_refused() -> None:
    with pytest.raises(ModelError, match=r"it wrote 17,000,000 characters, more than 16,777,216"):
        one("{{ 'a' * 17000000 }}")
    assert one("{{ ('a' * 16000000) }}") == "a" * 16_000_000


@pytest.mark.skipif(sys.platform == "win32", reason="a timer of this side there, too")
def test_a_template_that_waits_for_a_certain_row_is_stopped_at_that_row() -> None:
    waiting = CHATML + "{% if messages | length > 3 %}" + ENDLESS + "{% endif %}"
    rows = [variables(n) for n in (1, 2, 3)]
    assert all(isinstance(text, str) for text in templates.render(waiting, rows, "demo"))
    with pytest.raises(
        ModelError, match=r"demo: .*2 seconds on a conversation of 4 turns \(user, "
    ):
        templates.render(waiting, [*rows, variables(4), variables(1)], "demo")


def test_what_is_said_in_a_conversation_is_not_printed() -> None:
    with pytest.raises(ModelError) as caught:
        one("{% if messages %}{{ 'a' * 17000000 }}{% endif %}")
    assert "hello" not in str(caught.value)
    assert "name another in data.chat_template, or another base" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(9000) %}{% set ns.a = [ns.a] %}{% endfor %}"
        "{{ ns.a | tojson }}",
        "{{ range(1000000) }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ 'a'.encode('no such') }}",
    ],
)
def test_whatever_else_goes_wrong_in_a_template_is_its_refusal(template: str) -> None:
    assert isinstance(one(template), Refused)


def test_a_refusal_stands_in_its_place_among_texts(tok: Any) -> None:
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}ok"
    texts = templates.render(refusing, [variables(1), variables(2), variables(1)], "demo")
    assert texts[0] == texts[2] == "ok"
    assert isinstance(texts[1], Refused) and str(texts[1]) == "one turn only"


def test_a_template_that_is_no_jinja_is_refused_with_its_line() -> None:
    with pytest.raises(ModelError, match=r"demo: no valid Jinja: line 2: Encountered unknown tag"):
        one("{{ messages }}\n{% fro x in y %}")


@pytest.mark.parametrize("size", [templates.MAX_CHARS, templates.MAX_CHARS + 1])
def test_a_template_has_at_most_64_ki_characters(
    size: int, make_recipe: Any, tmp_path: Path
) -> None:
    text = CHATML + "{#" + "x" * (size - len(CHATML) - 4) + "#}"
    file = tmp_path / "own.jinja"
    file.write_text(text)
    recipe = make_recipe(data__chat_template=str(file))
    if size <= templates.MAX_CHARS:
        tok, _ = tokenizer.load(recipe)
        assert tokenizer.render(tok, [Turn("user", "hello")]) == one(CHATML)
        return
    for refused in (lambda: tokenizer.load(recipe), lambda: one(text)):
        with pytest.raises(ModelError, match=r"65,537 characters; at most 65,536\. Name a shorter"):
            refused()


def test_an_error_names_the_file_that_the_recipe_names(make_recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ 'a' * 17000000 }}")
    tok, _ = tokenizer.load(make_recipe(data__chat_template=str(file)))
    with pytest.raises(ModelError, match=r"^data\.chat_template is '.*own\.jinja': it wrote"):
        Renderer(tok, chat=True)


def test_an_error_names_the_base_whose_template_it_is(tok: Any) -> None:
    tok.chat_template = "{{ 'a' * 17000000 }}"
    with pytest.raises(ModelError, match=r"^the chat template of '.*base': it wrote"):
        Renderer(tok, chat=True)


# --- the process


def test_the_process_is_given_no_token_and_cannot_write(fresh: None, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert one("ok") == "ok"
    assert templates._worker is not None
    proc = Path(f"/proc/{templates._worker.process.pid}")
    if not proc.is_dir():
        pytest.skip("needs /proc")
    assert b"secret" not in (proc / "environ").read_bytes()
    limits = (proc / "limits").read_text()
    (written,) = [line for line in limits.splitlines() if line.startswith("Max file size")]
    assert written.split()[3:5] == ["0", "0"]


def test_the_process_loads_nothing_heavy(fresh: None) -> None:
    code = "import sys, json, qlora.templates; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"jinja2"' in done.stdout
    assert not any(f'"{name}"' in done.stdout for name in ("torch", "numpy", "transformers"))


def test_a_process_that_was_killed_is_started_again(fresh: None) -> None:
    one("ok")
    assert templates._worker is not None
    first = templates._worker.process
    first.kill()
    first.wait()
    assert one("ok") == "ok"
    assert templates._worker.process.pid != first.pid


def test_an_interrupt_never_leaves_an_answer_for_the_next_question(
    fresh: None, monkeypatch: Any
) -> None:
    one("ok")
    with monkeypatch.context() as patched:

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        patched.setattr(templates, "_received", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one("of the interrupted")
    assert one("of the next") == "of the next"


def test_a_process_that_does_not_start_says_why(fresh: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(templates, "_CODE", "raise SystemExit('no jinja here')")
    with pytest.raises(ModelError, match="which does not start: no jinja here"):
        one("ok")


def test_nonsense_from_the_process_is_not_waited_for(fresh: None, monkeypatch: Any) -> None:
    """Should a template ever get out of the sandbox, it still speaks to a reader of texts only."""
    code = "import sys; sys.stdout.buffer.write(b'+' + bytes(8) + b'T' + b'\\xff' * 8)"
    monkeypatch.setattr(templates, "_CODE", code)
    with pytest.raises(ModelError, match="the process that renders it ended"):
        one("ok")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no other clock")
def test_without_a_clock_of_the_kernel_this_side_keeps_the_time(
    fresh: None, monkeypatch: Any
) -> None:
    """As on Windows."""
    code = templates._CODE.replace("import sys;", "import sys, signal; del signal.setitimer;")
    monkeypatch.setattr(templates, "_CODE", code)
    monkeypatch.delattr(signal, "setitimer")
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    with pytest.raises(ModelError, match=r"demo: it used up its 0\.3 seconds"):
        one(ENDLESS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_starts_its_own(fresh: None) -> None:
    one("ok")
    child = os.fork()
    if child == 0:
        good = one("of the child") == "of the child"
        forget()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert one("of the parent") == "of the parent"


def test_many_threads_each_get_their_own_answers() -> None:
    seen: set[int] = set()

    def ask(n: int) -> bool:
        seen.add(threading.get_ident())
        text = f"{{# {n} #}}{{{{ messages | length }}}} for {n}"
        return one(text, turns=n) == f"{n} for {n}"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))
    assert len(seen) > 1


# --- many at once


def records(count: int) -> list[Record]:
    return [
        Record((Turn("user", f"What is {n}?"), Turn("assistant", f"{n}."),
                Turn("user", "And then?"), Turn("assistant", f"It is {n + 1}.")))
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_are_expected_are_spelled_as_alone_and_asked_for_together(
    name: str, monkeypatch: Any
) -> None:
    tok = tokenizer_of(name)
    rows = records(80)
    alone = [Renderer(tok, chat=True).spell(row) for row in rows]
    asked: list[int] = []
    real = templates.render

    def counted(template: str, conversations: Any, origin: str) -> Any:
        asked.append(len(conversations))
        return real(template, conversations, origin)

    renderer = Renderer(tok, chat=True)
    monkeypatch.setattr(templates, "render", counted)
    renderer.expect(rows)
    assert [renderer.spell(row) for row in rows] == alone
    assert (
        len(asked) <= 2 and sum(asked) > 200
    )  # texts and, of some templates, prompts without an opening


def test_rows_may_come_in_another_order_than_expected(tok: Any) -> None:
    tok.chat_template = CHATML
    rows = records(70)
    renderer = Renderer(tok, chat=True)
    alone = {row: renderer.spell(row) for row in rows}
    renderer.expect(rows)
    for row in [*rows[:3], rows[50], *rows[3:], rows[0]]:
        assert renderer.spell(row) == alone[row]


def test_long_conversations_are_not_rendered_ahead(tok: Any, monkeypatch: Any) -> None:
    """Each of n turns renders all before it: ahead, that would be n texts of n turns at once."""
    tok.chat_template = CHATML
    turns = tuple(Turn("user" if n % 2 == 0 else "assistant", f"{n} " * 50) for n in range(400))
    rows = [records(1)[0], Record(turns), *records(2)]
    renderer = Renderer(tok, chat=True)
    asked: list[int] = []
    real = tokenizer.render_all

    def counted(tok: Any, these: Any) -> Any:
        asked.append(len(these))
        return real(tok, these)

    monkeypatch.setattr(tokenizer, "render_all", counted)
    renderer.expect(rows)
    spelled = [renderer.spell(row) for row in rows]
    assert max(asked) <= 6 and len(spelled[1].answers) == 200
