"""The claim of the quickstart, end to end: nothing before, nearly everything after, by learning."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import REPOSITORY
from rich.console import Console

from qlora import chat, load_recipe, trainer
from qlora.generation import Sampling
from qlora.records import Turn

TICKETS = REPOSITORY / "qlora" / "embedded" / "tickets"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The recipe exactly as it ships, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    console = Console(record=True, width=120, force_terminal=False)
    run = trainer.train(load_recipe("quickstart", [f"run.dir={folder}"]), console=console)
    return run, console.export_text()


def test_the_base_cannot_and_the_tuned_model_can(quickstart):
    run, _ = quickstart
    before, after = run.result["before"], run.result["after"]
    assert before["answered"] == after["answered"] >= 100
    assert before["exact_match"] < 0.05
    assert after["exact_match"] > 0.90
    assert after["stop_rate"] > 0.99
    assert after["held_out_loss"] < 0.5 * before["held_out_loss"]


def test_it_ends_with_both_answers_the_score_the_place_and_what_to_type_next(quickstart):
    run, said = quickstart
    result = run.result
    assert "expected" in said and "base" in said and "tuned" in said
    assert f"{result['before']['exact_match']:.1%} before" in said
    assert f"{result['after']['exact_match']:.1%} after" in said
    last = [line for line in said.splitlines() if line.strip()][-2:]
    assert last[0].split() == ["run", str(run.dir)]
    assert last[1].split() == ["next", "qlora", "chat", str(run.dir)]


def test_the_tuned_model_answers_a_new_ticket_in_strict_json(quickstart):
    run, _ = quickstart
    speaker = chat.load_speaker(run.dir)
    row = json.loads((TICKETS / "heldout.jsonl").read_text().splitlines()[-1])
    question = next(m["content"] for m in row["messages"] if m["role"] == "user")
    answer = speaker.answer([Turn("user", question)], Sampling(max_new_tokens=96), lambda _: None)
    assert answer.stopped
    assert list(json.loads(answer.text)) == ["queue", "priority", "product", "reply"]


def test_with_answers_shuffled_between_rows_the_score_stays_near_the_base(tmp_path):
    """The control: format alone, without the relation of ticket and answer, earns nothing."""
    rows = [json.loads(line) for line in (TICKETS / "train.jsonl").read_text().splitlines()]
    answers = [row["messages"][-1] for row in rows]
    random.Random(0).shuffle(answers)
    for row, answer in zip(rows, answers, strict=True):
        row["messages"][-1] = answer
    shuffled = Path(tmp_path / "shuffled.jsonl")
    shuffled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(
        "quickstart",
        [
            f"data.train={shuffled}",
            f"run.dir={tmp_path}",
            "train.num_train_epochs=0.5",
            "eval.generate=100",
        ],
    )
    run = trainer.train(recipe, console=Console(quiet=True))
    assert run.result["after"]["exact_match"] < 0.05
    assert run.result["after"]["stop_rate"] > 0.9  # it did learn the format
