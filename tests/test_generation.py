"""Answers: batched as if alone, greedy unless asked, streamed as they come, scored strictly."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from qlora import (
    adapter,
    answering,
    chat,
    generation,
    loader,
    rundir,
    sft,
    tokenizer,
    trainer,
)
from qlora.errors import CheckpointError
from qlora.generation import Sampling
from qlora.records import Record, Turn


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run of the tiny model; its answers are short and its chat template is ChatML."""
    from qlora.recipe import recipe_from

    folder = tmp_path_factory.mktemp("generation")
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}"} for n in range(1, 60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_from(
        {
            "model": {"name": str(tiny)},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
            "train": {
                "max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 2e-2,
                "gradient_accumulation_steps": 1, "warmup_steps": 0, "save_steps": 30,
                "activation_checkpointing": False,
            },
            "run": {"dir": str(folder), "name": "run"},
        }
    )  # fmt: skip
    return trainer.train(recipe, console=Console(quiet=True))


@pytest.fixture(scope="module")
def speaker(run):
    return chat.load_speaker(run.dir)


def prompts(speaker, *texts):
    asked = [Record((Turn("user", text), Turn("assistant", ""))) for text in texts]
    return [speaker.found.renderer.prompt_ids(record) for record in asked]


def test_a_batch_answers_each_prompt_as_if_it_were_alone_and_in_order(speaker):
    tok, sampling = speaker.found.renderer.tok, Sampling(max_new_tokens=12)
    texts = ("A long story about the sea and the wind", "Hi", "What is 2 and 2?", "Once")
    asked = [tok(text)["input_ids"] for text in texts]
    with adapter.disabled(speaker.model):  # the random base talks about anything
        together = generation.answer_all(speaker.model, tok, asked, sampling, 3)
        alone = [generation.answer_all(speaker.model, tok, [one], sampling, 1)[0] for one in asked]
    assert together == alone
    assert len({answer.text for answer in together}) == 4


def test_answering_leaves_the_mode_and_the_random_state_as_they_were(speaker):
    speaker.model.train()
    random = torch.get_rng_state()
    sampling = Sampling(temperature=1.0, max_new_tokens=4)
    generation.answer_all(
        speaker.model, speaker.found.renderer.tok, prompts(speaker, "Hi"), sampling, 1
    )
    assert speaker.model.training and torch.equal(random, torch.get_rng_state())
    speaker.model.eval()


def test_greedy_means_greedy_whatever_the_base_declares(speaker):
    speaker.model.generation_config.do_sample = True
    speaker.model.generation_config.temperature = 5.0
    asked = prompts(speaker, "Once upon a time")
    answers = {
        generation.answer_all(
            speaker.model, speaker.found.renderer.tok, asked, Sampling(max_new_tokens=8), 1
        )[0].text
        for _ in range(3)
    }
    assert len(answers) == 1


def test_sampling_follows_the_temperature(speaker):
    torch.manual_seed(0)
    asked = prompts(speaker, "Once upon a time")
    hot = Sampling(temperature=3.0, max_new_tokens=8)
    spoken = {
        generation.stream(
            speaker.model, speaker.found.renderer.tok, asked[0], hot, lambda _: None
        ).text
        for _ in range(4)
    }
    assert len(spoken) > 1


def test_an_answer_says_whether_it_ended_by_itself(speaker):
    tok = speaker.found.renderer.tok
    stop = tok.eos_token_id
    assert generation._cut([5, 6, stop, 7], tok, {stop}).stopped
    assert generation._cut([5, 6, stop, 7], tok, {stop}).text == tok.decode([5, 6]).strip()
    assert not generation._cut([5, 6, 7], tok, {stop}).stopped


def test_the_streamed_pieces_are_the_answer(speaker):
    pieces = []
    answer = speaker.answer([Turn("user", "Say 7.")], Sampling(max_new_tokens=12), pieces.append)
    assert "".join(pieces).strip() == answer.text


def test_the_base_answers_with_the_adapter_switched_off_and_on_again(speaker, run, cpu):
    from qlora.recipe import load_recipe

    turns, sampling = [Turn("user", "Say 9.")], Sampling(max_new_tokens=10)
    tuned = speaker.answer(turns, sampling, lambda _: None)
    as_base = speaker.answer(turns, sampling, lambda _: None, as_base=True)
    assert speaker.answer(turns, sampling, lambda _: None) == tuned != as_base
    recipe = load_recipe(run.recipe_file)
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    prompt = speaker.found.renderer.prompt_ids(Record((*turns, Turn("assistant", ""))))
    bare = generation.stream(base, speaker.found.renderer.tok, prompt, sampling, lambda _: None)
    assert bare == as_base


def test_a_conversation_in_the_terminal_shows_both_and_remembers_only_the_tuned(run):
    console = Console(record=True, width=100, force_terminal=False)
    questions = iter(["Say 3.", "Say 4.", "/new", "Say 3.", "", "never asked"])
    chat.converse(run.dir, console, questions, Sampling(max_new_tokens=6), compare=True)
    lines = console.export_text().splitlines()
    assert sum(line.startswith("base ") for line in lines) == 3
    tuned = [line for line in lines if line.startswith("tuned")]
    assert len(tuned) == 3 and tuned[0] == tuned[2]  # /new forgot the first question


def test_a_folder_that_is_no_run_cannot_be_talked_to(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        chat.load_speaker(tmp_path)


def test_an_unfinished_run_speaks_from_its_newest_whole_checkpoint(make_recipe, monkeypatch):
    original = sft.RowTrainer.compute_loss

    def interrupted(self, model, *args, **kwargs):
        if model.training and self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "compute_loss", interrupted)
    recipe = make_recipe()
    with pytest.raises(Exception, match="checkpoint-3"):
        trainer.train(recipe, console=Console(quiet=True))
    speaker = chat.load_speaker(recipe.run.dir)
    assert speaker.found.source.name == "checkpoint-3"
    assert "checkpoint-3" in chat._name(speaker.found)
    assert adapter.count(speaker.model).trainable == 0


@pytest.mark.parametrize(
    ("expected", "answer", "fields", "right"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "y", "a": 1}', ["a"], True),
        ('{"a": 1, "b": "x"}', '{"b": "y", "a": 1}', ["a", "b"], False),
        ('{"a": 1}', '{"a": "1"}', ["a"], False),
        ('{"a": 1}', '{"a": 1} and more', ["a"], False),
        ('{"a": 1}', "[1]", ["a"], False),
        ('{"a": 1}', "", ["a"], False),
        ('{"a": 1}', '{"b": 1}', ["a"], False),
        ("yes", " yes\n", [], True),
        ("yes", "Yes", [], False),
    ],
)
def test_an_answer_is_right_only_if_it_is_strictly_the_same(expected, answer, fields, right):
    assert answering.is_right(expected, answer, fields) is right


def test_scores_count_right_and_self_ended_answers():
    answers = [generation.Answer("a", True), generation.Answer("b", False)]
    scored = answering.Answered([], answers, [True, False])
    assert (scored.exact_match, scored.stop_rate) == (0.5, 0.5)


def test_plain_alpaca_models_are_asked_as_they_were_trained(make_recipe, tmp_path, tiny):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare)
    (bare / "chat_template.jinja").unlink()
    rows = [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(30)]
    file = tmp_path / "alpaca.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(model__name=str(bare), data__train=str(file), train__max_steps=1)
    run = trainer.train(recipe, console=Console(quiet=True))
    assert rundir.read_json(run.dir / "data.json")["rendering"] == "plain"
    speaker = chat.load_speaker(run.dir)
    seen = []
    original = generation.stream

    def spy(model, tok, prompt, sampling, say):
        seen.append(tok.decode(prompt))
        return original(model, tok, prompt, sampling, say)

    generation.stream = spy
    try:
        speaker.answer([Turn("user", "Say 3.")], Sampling(max_new_tokens=2), lambda _: None)
    finally:
        generation.stream = original
    assert seen == ["### Instruction:\nSay 3.\n\n### Response:\n"]
    assert tokenizer.end_of_turn(speaker.found.renderer.tok) is None
