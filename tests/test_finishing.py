"""`qlora train --finish`: the whole way, what of it was proven, and where it stopped if it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qlora import cli, export, finishing, merging, rundir, trainer
from qlora.errors import ExportError, RecipeError
from qlora.export import gguf
from qlora.export.gguf import Written
from qlora.finishing import Step

pytestmark = pytest.mark.usefixtures("one_thread", "light")


@pytest.fixture
def recipe_file(make_recipe, tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(make_recipe(run__name="mine").dump())
    return file


def train(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["qlora", "train", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_the_whole_way_ends_with_what_was_proven(recipe_file, monkeypatch, capsys, tmp_path):
    """The converter is stood in for: tests have no network to fetch it from."""

    def write(found, folder, target, quant, screen, **_):
        target.parent.mkdir(parents=True)
        target.write_bytes(b"GGUF")
        assert (folder / "model.safetensors").is_file()
        return Written(target, quant, None, 0, (14, 14), None, "gpt-2", ())

    monkeypatch.setattr(gguf, "write", write)
    code, said, _ = train(monkeypatch, capsys, recipe_file, "--finish", "merge,gguf:f16")
    assert code == 0
    run = rundir.open_run(tmp_path / "runs" / "mine")
    assert rundir.read_json(run.dir / "merged" / "merge.json")["verdict"]["top1"] == 1.0
    assert (run.dir / "gguf" / "mine-f16.gguf").is_file()
    proven = [line.split(None, 1)[1] for line in said.splitlines() if line.startswith("proven")]
    assert proven[0].startswith("the base is bit for bit what it was")
    assert proven[1].startswith("held-out loss ") and proven[1].endswith(" after")
    assert proven[2].startswith("merged onto nf4, against the trained model: KL ")
    assert proven[3] == (
        "mine-f16.gguf was not run; 14 of its 14 matrices were read back and are the merged model's"
    )


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("merge,ggf", "--finish names 'ggf'. Write some of merge, gguf, ollama, vllm"),
        ("", "--finish names ''"),
        ("merge:q8_0", "--finish names 'merge:q8_0'"),
        ("gguf:q9_z", "--quant is 'q9_z', which is not known"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    recipe_file, monkeypatch, capsys, tmp_path, asked, told
):
    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("it trained"))
    code, _, err = train(monkeypatch, capsys, recipe_file, "--finish", asked)
    assert code == 2 and told in err


def test_a_step_that_fails_leaves_a_whole_run_and_says_how_to_go_on(
    recipe_file, monkeypatch, capsys, tmp_path
):
    def refuse(*_, **__):
        raise ExportError("the merged model is not what was trained: KL 9 nats a token.")

    monkeypatch.setattr(merging, "merge", refuse)
    code, _, err = train(monkeypatch, capsys, recipe_file, "--finish", "merge,gguf")
    assert code == 2
    run = rundir.open_run(tmp_path / "runs" / "mine")
    assert run.is_complete and not (run.dir / "gguf").exists()
    assert "qlora: the merged model is not what was trained: KL 9" in err
    assert f"The run itself is finished and whole: {run.dir}" in err
    assert err.splitlines()[-2:] == [
        f"  qlora merge {run.dir}",
        f"  qlora export {run.dir} --to gguf --quant q8_0",
    ]


def test_a_stop_in_a_step_says_the_same_and_ends_with_130(
    recipe_file, monkeypatch, capsys, tmp_path
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export", stop)
    code, _, err = train(monkeypatch, capsys, recipe_file, "--finish", "vllm")
    run = rundir.open_run(tmp_path / "runs" / "mine")
    assert code == 130 and err.startswith("qlora: Stopped. The run itself is finished and whole")
    assert err.splitlines()[-1] == f"  qlora export {run.dir} --to vllm"


def test_steps_are_read_as_they_are_written():
    assert finishing.steps("merge, gguf:q8_0 ,ollama:f16,vllm") == (
        Step("merge"), Step("gguf", "q8_0"), Step("ollama", "f16"), Step("vllm"),
    )  # fmt: skip
    with pytest.raises(RecipeError):
        finishing.steps("merge;gguf")


def test_what_a_file_was_proven_to_be_is_said(tmp_path):
    from qlora.agreement import Agreement

    near = Agreement(0.001, 0.01, 0.99, 0.2, 64)
    ran = Written(tmp_path / "a.gguf", "q8_0", near, 4, (0, 0), None, "gpt-2", ())
    assert finishing._said(ran).startswith(
        "a.gguf, run by llama.cpp: the tokens of training in 4 texts; against the merged model KL 0.001"
    )
    assert json.dumps(near.to_json())
