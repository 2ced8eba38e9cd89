"""Real pretrained weights on real data that nobody here wrote, where a checkout has them beside it."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from qlora import cli, load_recipe, trainer


def test_stories_learn_grade_school_arithmetic_from_init_to_a_living_adapter(
    real_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    base = str(real_data / "stories260K-hf")
    monkeypatch.setattr(
        sys, "argv", ["qlora", "init", str(real_data / "gsm8k" / "test.jsonl"), "--model", base]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert "1,319 rows, read as prompt_completion" in capsys.readouterr().out
    recipe = load_recipe("test.yaml", ["train.max_steps=12", "train.logging_steps=1"])
    run = trainer.train(recipe, console=Console(quiet=True))
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert run.result["after"]["held_out_loss"] < 0.8 * run.result["before"]["held_out_loss"]
    assert run.result["alive"]["disk_against_memory"] == 0.0


def test_a_base_without_a_chat_template_refuses_conversations(real_data, tmp_path):
    from qlora.errors import ModelError

    base, data = real_data / "stories260K-hf", real_data / "llamafactory_demo" / "identity.json"
    recipe = load_recipe(
        "quickstart",
        [f"model.name={base}", f"run.dir={tmp_path}", "data.max_length=512"],
    )
    with pytest.raises(ModelError, match="no chat template"):
        trainer.train(recipe, console=Console(quiet=True))
    plain = load_recipe(
        "quickstart",
        [
            f"model.name={base}", f"run.dir={tmp_path}", f"data.train={data}", "data.held_out=",
            "eval.generate=0", "train.max_steps=3", "data.max_length=512",
        ],
    )  # fmt: skip
    run = trainer.train(plain, console=Console(quiet=True))
    assert run.result["steps"] == 3
