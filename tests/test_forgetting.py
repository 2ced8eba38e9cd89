"""The general text is all there and read whole, and what was lost of it is told."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from conftest import BASE, REPOSITORY, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import scoring
from qlora.evaluation import forgetting
from qlora.scoring import RowScore

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = REPOSITORY / "qlora" / "embedded" / "general"


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(BASE)


def unwatched(starts, label):
    return starts


def test_the_text_is_of_many_kinds_and_no_passage_stands_twice():
    found = forgetting.passages()
    lines = (FOLDER / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(found) == len(lines) == 62
    kinds = Counter(passage.field for passage in found)
    assert len(kinds) >= 20 and kinds["python"] >= 3 and kinds["arithmetic"] >= 5
    assert {"german", "french", "spanish", "sql", "dialogue", "e-mail"} <= set(kinds)
    assert len({passage.text for passage in found}) == 62
    assert all(20 <= len(passage.text.split()) <= 130 for passage in found)
    for line in lines:
        assert set(json.loads(line)) == {"field", "text"}


def test_its_code_is_code():
    for passage in forgetting.passages():
        if passage.field == "python":
            compile(passage.text, "passage", "exec")
        if passage.field == "json":
            json.loads(passage.text)


def test_a_file_beside_it_says_where_it_comes_from_and_under_which_licence():
    said = (FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in said and "62 short passages" in said


def test_every_token_counts_but_the_first_that_nothing_could_predict(tok):
    rows, sizes = forgetting.tokenized(tok)
    for row, size, passage in zip(rows, sizes, forgetting.passages(), strict=True):
        assert row["input_ids"] == tok(passage.text)["input_ids"]
        assert row["labels"] == [-100, *row["input_ids"][1:]]
        first = tok.decode(row["input_ids"][:1])
        assert size == len(passage.text.encode()) - len(first.encode())


def test_where_the_tokenizer_writes_a_bos_the_whole_text_counts(tok):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer, pad_token=tok.pad_token)
    bos = tok.convert_ids_to_tokens(1)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 1)]
    )
    rows, sizes = forgetting.tokenized(own)
    assert {row["input_ids"][0] for row in rows} == {1}
    assert sizes == [len(passage.text.encode()) for passage in forgetting.passages()]


def test_a_passage_longer_than_the_model_is_cut_with_its_bytes(tok):
    rows, sizes = forgetting.tokenized(tok, 10)
    assert {len(row["input_ids"]) for row in rows} == {10}
    passage = forgetting.passages()[0].text
    kept = tok.decode(tok(passage)["input_ids"][:10])
    assert passage.startswith(kept)
    first = tok.decode(tok(passage)["input_ids"][:1])
    assert sizes[0] == len(kept.encode()) - len(first.encode())


def test_the_loss_and_the_bits_are_those_of_the_library(tmp_path, tok):
    """The reference: transformers' own mean loss of a passage alone."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path)).eval()
    found = forgetting.read(model, tok, unwatched, positions=64)
    one = forgetting.compare(tok, None, found, positions=64)
    total, bits = 0.0, 0
    for passage in forgetting.passages():
        ids = torch.tensor([tok(passage.text)["input_ids"][:64]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        bits += len(tok.decode(ids[0]).encode()) - len(tok.decode(ids[0, :1]).encode())
    assert one.tokens == sum(score.tokens for score in found)
    assert one.tuned == pytest.approx(total / one.tokens, rel=1e-5)
    assert one.bits_per_byte[1] == pytest.approx(total / math.log(2) / bits, rel=1e-3)
    assert one.base is None and one.interval is None
    assert str(one) == f"{one.tuned:.3f} nats a token, {one.bits_per_byte[1]:.3f} bits a byte"


def scores(tok, *rise_by_field: tuple[str, float], noise: float = 0.0):
    """Made-up scores of 2 nats a token, with a rise in some fields."""
    generator = torch.Generator().manual_seed(0)
    rises = dict(rise_by_field)
    rows, _ = forgetting.tokenized(tok)
    found = []
    for row, passage in zip(rows, forgetting.passages(), strict=True):
        count = len(row["input_ids"]) - 1
        wobble = noise * float(torch.randn((), generator=generator))
        nats = 2.0 + rises.get(passage.field, rises.get("", 0.0)) + wobble
        found.append(RowScore(nats * count, count))
    return found


def test_what_was_lost_is_told_with_the_kind_of_text_that_lost_most(tok):
    base = scores(tok)
    found = forgetting.compare(tok, base, scores(tok, ("", 0.1), ("python", 0.9), noise=0.01))
    assert found.base == pytest.approx(2.0)
    assert found.tuned == pytest.approx(
        scoring.mean(scores(tok, ("", 0.1), ("python", 0.9), noise=0.01))
    )
    assert "worse: the tuned model lost some of it, most in python (+0." in str(found)
    assert str(found).startswith("2.000 -> 2.1")
    assert found.interval.low < found.interval.difference < found.interval.high


def test_what_was_not_lost_is_no_difference_or_a_gain(tok):
    base = scores(tok)
    same = forgetting.compare(tok, base, scores(tok, noise=0.3))
    assert str(same).endswith("no difference that these 62 passages can show")
    assert str(forgetting.compare(tok, base, scores(tok, ("", -0.2)))).endswith(": better")


def test_it_can_be_written_as_json(tok):
    found = forgetting.compare(tok, scores(tok), scores(tok, ("", 0.1))).to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["difference"]["difference"] == pytest.approx(0.1)
    assert found["by_field"]["sql"] == pytest.approx([2.0, 2.1])
