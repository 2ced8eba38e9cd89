"""The embedded base and the ticket task: small enough, honest, and reproducible to the byte."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "qlora" / "embedded" / "base"
TICKETS = ROOT / "qlora" / "embedded" / "tickets"
SIDES = ("train", "heldout")
KEYS = ["queue", "priority", "product", "reply"]
MARK = "•"


def script(name: str) -> ModuleType:
    """A module of ``scripts/``, which is a folder of commands and not a package."""
    if str(ROOT / "scripts") not in sys.path:
        sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module(name)


def read(side: str) -> list[tuple[str, dict[str, Any]]]:
    """(ticket, parsed answer) for every row of a split."""
    rows = [json.loads(line) for line in (TICKETS / f"{side}.jsonl").read_text().splitlines()]
    return [(r["messages"][-2]["content"], json.loads(r["messages"][-1]["content"])) for r in rows]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    return {side: read(side) for side in SIDES}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Four thousand documents of the pretraining corpus as plain text."""
    documents = script("make_corpus").documents(4000, 12)
    return [
        d if isinstance(d, str) else "\n".join(turn["content"] for turn in d) for d in documents
    ]


# --- the base


def test_the_weights_stay_under_eight_megabytes() -> None:
    assert 0 < (BASE / "model.safetensors").stat().st_size <= 8_000_000


def test_the_base_loads_offline_and_every_linear_is_a_multiple_of_64_wide() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    widths = [m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(widths) == 7 * model.config.num_hidden_layers + 1
    assert [width for width in widths if width % 64] == []
    assert model.config.max_position_embeddings >= 512
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_the_tokenizer_gives_text_back_and_adds_nothing(tokenizer: Any, splits: Any) -> None:
    texts = [
        '{"queue": "billing"}',
        "naïve – 漢字 🙂\n\ttab  two",
        *(t for t, _ in splits["heldout"]),
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_padding_is_a_token_of_its_own(tokenizer: Any) -> None:
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token is None
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert [tokenizer(token).input_ids for token in special] == [[0], [1], [2], [3]]


def test_every_digit_is_one_token(tokenizer: Any) -> None:
    ids = tokenizer("order 40718 and X5").input_ids
    assert [t for t in map(tokenizer.decode, ids) if any(c.isdigit() for c in t)] == list("407185")


def test_the_template_marks_the_assistant_turn_with_its_end(tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Good day."},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert text == prompt + "Good day.<|im_end|>\n"
    out = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    trained = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(trained) == "Good day.<|im_end|>"


def test_the_template_and_pretraining_render_a_chat_alike(tokenizer: Any) -> None:
    pytest.importorskip("torch")
    chat = script("make_corpus").turns("Hi.", "Good day.")
    rendered = script("pretrain_base").render(chat)
    assert rendered == tokenizer.apply_chat_template(chat, tokenize=False) + "<|endoftext|>"


# --- the task


@pytest.mark.parametrize("side", SIDES)
def test_every_answer_is_one_line_of_strict_json_about_its_ticket(side: str, splits: Any) -> None:
    world = script("ticket_world")
    assert len(splits[side]) == {"train": 6000, "heldout": 300}[side]
    for line in (TICKETS / f"{side}.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        answer = json.loads(assistant["content"])
        assert assistant["content"] == json.dumps(answer) and "\n" not in assistant["content"]
        assert list(answer) == KEYS
        assert answer["queue"] in world.QUEUES
        assert answer["priority"] in world.PRIORITIES
        assert answer["product"] in user["content"]
        assert answer["reply"].endswith(".") and answer["reply"].count(".") == 1


@pytest.mark.parametrize("side", SIDES)
def test_no_constant_answer_can_score(side: str, splits: Any) -> None:
    rows = len(splits[side])
    for key, most in (("queue", 0.25), ("priority", 0.40), ("product", 0.03)):
        counts = Counter(answer[key] for _, answer in splits[side])
        assert counts.most_common(1)[0][1] <= most * rows


def test_the_splits_share_no_product_person_or_company(splits: Any) -> None:
    world = script("ticket_world")
    products = {side: {a["product"] for _, a in splits[side]} for side in SIDES}
    assert not products["train"] & products["heldout"]
    for bank in (world.PEOPLE, world.COMPANIES):
        assert not set(bank["train"]) & set(bank["heldout"])
    training_text = "\n".join(ticket for ticket, _ in splits["train"])
    foreign = products["heldout"] | set(world.PEOPLE["heldout"])
    assert len(foreign) > 80
    words = set(re.findall(r"\w+", training_text))
    assert words & foreign == set()


def names_of(side: str) -> re.Pattern[str]:
    """Whatever is a name or a number in this side's tickets: an independent reading of the text."""
    world = script("ticket_world")
    listed = "|".join([*world.COMPANIES[side], *world.PEOPLE[side]])
    # No sentence begins with a product, so a capital inside one is a name.
    return re.compile(rf"\b(?:{listed}|\d+)\b|(?<=[a-z] )[A-Z][a-z]{{2,}}\b")


def masked_sentences(ticket: str, names: re.Pattern[str]) -> set[str]:
    """The ticket's sentences, lowered, with every name hidden and the greeting cut off."""
    parts = re.split(r"(?<=[.?!])\s+", names.sub(MARK, ticket))
    # "Dear team, My lamp": a greeting ends in a comma before a capital letter and names nothing.
    parts[0] = re.sub(rf"^[^,{MARK}]*,\s+(?=[A-Z{MARK}])", "", parts[0])
    return {part.strip().lower() for part in parts} - {MARK}


def test_the_splits_share_no_sentence_once_names_are_masked(splits: Any) -> None:
    seen = {side: set[str]() for side in SIDES}
    for side in SIDES:
        names = names_of(side)
        for ticket, _ in splits[side]:
            seen[side] |= masked_sentences(ticket, names)
    assert len(seen["train"]) > 80 and len(seen["heldout"]) > 40
    assert seen["train"] & seen["heldout"] == set()


def test_the_banks_of_the_splits_share_no_wording() -> None:
    wordings, corpus = script("ticket_wordings").WORDINGS, script("make_corpus")
    train, heldout = wordings["train"].sentences(), wordings["heldout"].sentences()
    assert len(set(train)) == len(train) and len(set(heldout)) == len(heldout)
    assert not {corpus.skeleton(s) for s in train} & {corpus.skeleton(s) for s in heldout}


def test_making_the_tickets_again_gives_the_same_bytes(tmp_path: Path) -> None:
    assert script("make_tickets").main(["--out", str(tmp_path)]) == 0
    for side in SIDES:
        again = (tmp_path / f"{side}.jsonl").read_bytes()
        assert again == (TICKETS / f"{side}.jsonl").read_bytes()


def test_another_seed_gives_other_tickets() -> None:
    make_rows = script("make_tickets").make_rows
    assert make_rows("train", 30, 1) == make_rows("train", 30, 1)
    assert make_rows("train", 30, 1) != make_rows("train", 30, 2)


def test_the_scripts_refuse_nonsense_with_status_2(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert script("make_tickets").main(["--train-rows", "0"]) == 2
    assert script("make_tickets").main(["--out", str(tmp_path / "file")]) == 2
    assert script("make_corpus").main(["--documents", "0"]) == 2
    assert script("make_corpus").main(["--out", str(tmp_path / "no" / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


# --- the corpus


def test_the_corpus_is_the_same_every_time() -> None:
    documents = script("make_corpus").documents
    assert list(documents(200, 5)) == list(documents(200, 5))
    assert list(documents(200, 5)) != list(documents(200, 6))


def test_the_corpus_holds_nothing_of_the_answer_format(corpus: list[str]) -> None:
    text = "\n".join(corpus)
    for key in KEYS:
        assert f'"{key}":' not in text
    assert '{"queue"' not in text
    for document in corpus:
        for braced in re.findall(r"\{.*?\}", document):  # braces hold lists of quoted names
            with pytest.raises(json.JSONDecodeError):
                json.loads(braced)


def test_the_corpus_holds_no_ticket_and_no_ticket_sentence(corpus: list[str], splits: Any) -> None:
    turns = {turn for document in corpus for turn in document.split("\n")}
    text = "\n".join(corpus).lower()
    for side in SIDES:
        assert not {ticket for ticket, _ in splits[side]} & turns
        for sentence in script("ticket_wordings").WORDINGS[side].sentences():
            fixed = max(re.split(r"\{\w\}", sentence.lower()), key=len).strip()
            if fixed in text:  # only then is the slow look worth it: with any words in the gaps
                gaps = re.sub(r"\\\{\w\\\}", r"[\\w ]{1,40}?", re.escape(sentence.lower()))
                assert not re.search(rf"(?<!\w){gaps}(?!\w)", text), sentence


def test_the_corpus_holds_no_brand_person_or_company_of_the_tickets(
    corpus: list[str], splits: Any
) -> None:
    world = script("ticket_world")
    words = set(re.findall(r"\w+", "\n".join(corpus)))
    for side in SIDES:
        brands = {answer["product"] for _, answer in splits[side]}
        assert brands & words == set()
        assert set(world.PEOPLE[side]) & words == set()
        assert not [c for c in world.COMPANIES[side] if c in "\n".join(corpus)]


def test_a_corpus_phrase_that_spells_a_ticket_sentence_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus, prose = script("make_corpus"), script("prose_world")
    monkeypatch.setattr(prose, "ASIDES", ("He said there is no rush and left.",))
    with pytest.raises(ValueError, match="He said there is no rush"):
        corpus.refuse_ticket_sentences()
