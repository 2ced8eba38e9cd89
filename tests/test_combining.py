"""Several adapters become one run: exactly the sum, proven, and scored on the rows of each."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from conftest import ROWS, save_tiny
from rich.console import Console
from safetensors.torch import load_file, save_file

from qlora import adapter, cli, combining, rundir, trained, trainer
from qlora.combining import deltas, interference
from qlora.combining.interference import Figures, Task
from qlora.errors import CheckpointError, ExportError, RecipeError
from qlora.recipe import recipe_from
from qlora.screen import Screen

QUIET = Console(quiet=True)
TOKENS = torch.arange(5, 37).view(1, -1)
pytestmark = pytest.mark.usefixtures("one_thread", "light", "no_waiting_for_the_disk")


def recipe_of(folder, base, name, **changes):
    """A recipe of six steps on forty rows of its own."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    word = f" {name}" * (1 + len(name) % 3)
    rows = [row | {"completion": row["completion"] + word} for row in ROWS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"name": str(base)},
        "data": {"train": str(file), "max_length": 128, "held_out_fraction": 0.2},
        "lora": {"r": 4},
        "train": {
            "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2, "logging_steps": 3, "save_steps": 6, "warmup_steps": 0,
            "activation_checkpointing": False,
        },
        "run": {"dir": str(folder / "runs"), "name": name},
        "eval": {"generate": 2, "max_new_tokens": 4},
    }  # fmt: skip
    for address, value in changes.items():
        section, _, key = address.partition("__")
        values[section][key] = value
    return recipe_from(values)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("combining")
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def runs(home, tiny):
    """Two runs that differ in rank, alpha, scaling and linears."""
    one = recipe_of(home, tiny, "one", lora__target_modules=["q_proj", "down_proj"])
    other = recipe_of(
        home, tiny, "other", lora__r=2, lora__lora_alpha=8.0, lora__use_rslora=True,
        lora__target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    return [trainer.train(recipe, console=QUIET) for recipe in (one, other)]


@pytest.fixture(scope="module")
def said():
    return Console(record=True, width=140, file=io.StringIO())


@pytest.fixture(scope="module")
def combined(home, runs, said):
    dirs = [run.dir for run in runs]
    return combining.combine(dirs, weights=[0.75, -0.5], console=said)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def by_hand(run, weight):
    """What a run adds to each linear, read from its files without anything of ours."""
    tensors = load_file(run.dir / "adapter" / "adapter_model.safetensors")
    config = json.loads((run.dir / "adapter" / "adapter_config.json").read_text())
    root = config["r"] ** (0.5 if config["use_rslora"] else 1)
    scaling = weight * config["lora_alpha"] / root
    names = {name.partition(".lora_")[0] for name in tensors if ".lora_" in name}
    return {
        name.removeprefix("base_model.model."): scaling
        * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])
        for name in names
    }


# --- what is written


def test_the_combination_computes_what_the_weighted_deltas_add_to_the_base(runs, combined):
    found = trained.find(combined.dir, finished=True)
    tuned = logits(trained.load(found))
    base = trained.load_base(found)
    before, hooks = logits(base), []
    for run, weight in zip(runs, (0.75, -0.5), strict=True):
        for name, delta in by_hand(run, weight).items():
            hooks.append(
                base.get_submodule(name).register_forward_hook(
                    lambda _, args, out, delta=delta: out + args[0] @ delta.T
                )
            )
    assert len(hooks) == 2 * 2 * 2  # two linears of two runs in two layers
    summed = logits(base)
    torch.testing.assert_close(tuned, summed, atol=1e-4, rtol=1e-4)
    assert (summed - before).abs().max() > 0.1


def test_the_new_run_says_what_it_was_made_of_and_is_asked_as_its_first(runs, combined):
    made = combined.result["combination"]
    assert made["method"] == "linear"
    assert [part["weight"] for part in made["runs"]] == [0.75, -0.5]
    assert [part["dir"] for part in made["runs"]] == [str(run.dir.resolve()) for run in runs]
    for part, run in zip(made["runs"], runs, strict=True):
        assert part["adapter_sha256"] == rundir.sha256(run.adapter / "adapter_model.safetensors")
    assert made["error"] == 0
    assert made["proof"]["combined_against_sum"] < 1e-3 < made["proof"]["combined_against_base"]
    first, found = trained.find(runs[0].dir), trained.find(combined.dir)
    assert (found.form, found.renderer.chat) == (first.form, first.renderer.chat)
    assert found.recipe.data == first.recipe.data
    assert found.recipe.run.name == "combined" == combined.dir.parent.name
    lora = found.recipe.lora
    assert (lora.r, lora.lora_alpha, lora.use_rslora) == (6, 6.0, False)
    assert lora.target_modules == ("down_proj", "q_proj", "up_proj")
    assert combined.dir.parent.parent == runs[0].dir.parent.parent
    left = {path.name for path in combined.dir.parent.iterdir()}
    assert left == {combined.dir.name}


def test_each_run_is_scored_as_it_scored_itself_and_the_base(runs, combined):
    tasks = combined.result["combination"]["tasks"]
    for task, run in zip(tasks, runs, strict=True):
        for form, when in (("base", "before"), ("alone", "after")):
            wanted, found = run.result[when], task[form]
            assert found["held_out_loss"] == pytest.approx(wanted["held_out_loss"], abs=1e-5)
            assert found["exact_match"] == wanted["exact_match"]
        assert task["rows"] > 2 and task["combined"]["answered"] == 2
        before, alone, both = (
            task[form]["held_out_loss"] for form in ("base", "alone", "combined")
        )
        assert task["kept"] == pytest.approx((before - both) / (before - alone))
    assert combined.result["before"] == tasks[0]["base"]
    assert combined.result["after"] == tasks[0]["combined"]


def test_what_is_shown_is_the_table_the_likeness_and_the_proof(runs, combined, said):
    text = said.export_text(clear=False)
    tasks = combined.result["combination"]["tasks"]
    for task, run in zip(tasks, runs, strict=True):
        assert f"{run.dir.parent.name}/{run.dir.name}" in text
        for form in ("base", "alone", "combined"):
            assert f"{task[form]['held_out_loss']:.4f}" in text
    assert "linear, rank 6 in 6 linears: nothing is cut off" in text
    assert "its logits are those of the weighted adapters together" in text
    (pair,) = combined.result["combination"]["pairs"]
    assert f"cosine {pair['cosine']:.3f}, opposite signs in {pair['conflicts']:.0%}" in text
    assert text.rstrip().endswith(f"qlora chat {combined.dir}")


@pytest.mark.parametrize("method", ["svd", "ties", "dare_ties"])
def test_the_other_methods_write_a_run_of_their_rank_and_say_what_it_cut_off(
    runs, tmp_path, method
):
    asked = {"method": method, "rank": 3, "out": tmp_path, "name": method, "rows": 0}
    made = combining.combine([run.dir for run in runs], console=QUIET, **asked)
    assert made.dir.parent == tmp_path / method
    said = made.result["combination"]
    assert 0 < said["error"] < 1
    assert said["worst"]["error"] >= said["error"]
    assert [task["note"] for task in said["tasks"]] == ["not asked for"] * 2
    part = deltas.read(made.adapter, method)
    assert part.rank == 3
    whole = by_hand(runs[0], 0.5)
    for name, delta in by_hand(runs[1], 0.5).items():
        whole[name] = whole.get(name, 0) + delta
    if method == "svd":
        lost = sum(
            float((part.delta(f"base_model.model.{name}", torch.device("cpu")) - delta).square().sum())
            for name, delta in whole.items()
        )  # fmt: skip
        norm = sum(float(delta.square().sum()) for delta in whole.values())
        assert said["error"] == pytest.approx((lost / norm) ** 0.5, rel=1e-3)


def test_a_seed_and_the_runs_decide_the_adapter(runs, tmp_path):
    def bytes_of(seed):
        asked = {"method": "dare_ties", "rows": 0, "out": tmp_path, "seed": seed}
        made = combining.combine([run.dir for run in runs], console=QUIET, **asked)
        return (made.adapter / "adapter_model.safetensors").read_bytes()

    assert bytes_of(1) == bytes_of(1) != bytes_of(2)


def test_a_run_and_its_copy_in_halves_are_the_run(runs, tmp_path):
    copy = tmp_path / "copies" / "one" / runs[0].dir.name
    shutil.copytree(runs[0].dir, copy)
    made = combining.combine([runs[0].dir, copy], out=tmp_path, rows=100, console=QUIET)
    for task in made.result["combination"]["tasks"]:
        assert task["kept"] == pytest.approx(1.0, abs=1e-4)
        assert task["verdict"] in ("kept", "no gain")
    (pair,) = made.result["combination"]["pairs"]
    assert (round(pair["cosine"], 5), pair["conflicts"]) == (1.0, 0.0)


def test_a_combination_can_be_combined_again_but_has_no_rows_of_its_own(runs, combined, tmp_path):
    made = combining.combine([runs[1].dir, combined.dir], out=tmp_path, rows=2, console=QUIET)
    scored, not_scored = made.result["combination"]["tasks"]
    assert scored["rows"] == 2
    assert not_scored["rows"] == 0 and "a combination itself" in not_scored["note"]


def test_several_adapters_at_once_leave_the_model_as_it_was(runs):
    found = [trained.find(run.dir) for run in runs]
    model = trained.put_on(trained.load(found[0], name="a"), found[1], "b")
    adapter.use(model, "b")
    before = logits(model)
    with adapter.stacked(model, {"a": 2.0, "b": 0.5}):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    adapter.use(model, "a")
    alone = logits(trained.load(found[0]))
    torch.testing.assert_close(logits(model), alone)


# --- rows of new tokens


@pytest.fixture(scope="module")
def untaught(home):
    folder = save_tiny(home / "untaught")
    weights = load_file(folder / "model.safetensors")
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    for name in ("<|im_start|>", "<|im_end|>"):
        weights["model.embed_tokens.weight"][tok.convert_tokens_to_ids(name)] *= 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_trained_rows_of_one_run_go_along_and_those_of_two_are_refused(home, untaught, tmp_path):
    def train(name, new):
        recipe = recipe_of(home, untaught, name, lora__train_new_tokens=new)
        return trainer.train(recipe, console=QUIET)

    plain, taught, again = train("plain", False), train("taught", True), train("again", True)
    made = combining.combine([plain.dir, taught.dir], out=tmp_path, rows=99, console=QUIET)
    files = [load_file(run.adapter / "adapter_model.safetensors") for run in (taught, made)]
    rows = {name for name in files[0] if "token" in name}
    assert rows and all(torch.equal(files[0][name], files[1][name]) for name in rows)
    assert trained.find(made.dir).recipe.lora.train_new_tokens
    assert made.result["combination"]["proof"]["combined_against_sum"] < 1e-3
    tasks = made.result["combination"]["tasks"]
    for task, run in zip(tasks, (plain, taught), strict=True):
        wanted = run.result["after"]["held_out_loss"]
        assert task["alone"]["held_out_loss"] == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(CheckpointError, match="no sum of two") as caught:
        combining.combine([taught.dir, again.dir], out=tmp_path, console=QUIET)
    assert "lora.train_new_tokens" in str(caught.value)


# --- what came out badly


def task(combined, matches=None, base=5.0, alone=1.0):
    figures = [Figures(base, 0.0), Figures(alone, 0.5), Figures(combined, matches)]
    return Task("r/1", 10, "", *figures)


def test_a_task_worse_than_the_base_is_broken_and_one_that_lost_half_is_weak():
    assert task(1.4).verdict == "kept"
    assert task(1.4).kept == pytest.approx(0.9)
    assert task(3.5).verdict == "weak"
    assert task(1.4, matches=0.2).verdict == "weak"
    assert task(1.4, matches=0.2).kept_matches == pytest.approx(0.4)
    assert task(5.1).verdict == "BROKEN"
    assert task(5.1, alone=5.0).verdict == "no gain"
    assert Task("r/1", note="moved").verdict == ""


def test_a_bad_outcome_is_marked_in_the_table_and_told_below_it():
    console = Console(record=True, width=120, file=io.StringIO())
    tasks = [task(5.1), task(3.5), Task("s/2", note="its recipe holds no rows out")]
    interference.tell(tasks, Screen(console))
    text = console.export_text()
    assert "the combination is worse than the base on its rows" in text
    assert "more than half of what it had learned is lost" in text
    assert "s/2 was not scored: its recipe holds no rows out" in text
    assert "another --method, other --weights" in text


def test_min_kept_writes_nothing_when_a_run_keeps_less(runs, tmp_path):
    asked = {"weights": [-1.0, 0.01], "out": tmp_path / "new", "console": QUIET}
    with pytest.raises(ExportError, match=r"of its gain, and --min-kept asks for 50\.0%: nothing"):
        combining.combine([run.dir for run in runs], min_kept=0.5, **asked)
    assert not list((tmp_path / "new").rglob("*"))
    made = combining.combine([run.dir for run in runs], **asked)
    assert made.result["combination"]["tasks"][0]["verdict"] == "BROKEN"


def test_a_run_whose_data_is_gone_is_combined_and_not_scored(runs, home, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    data = home / "other.jsonl"
    data.rename(home / "moved.jsonl")
    try:
        dirs = [run.dir for run in runs]
        made = combining.combine(dirs, out=tmp_path, rows=2, console=QUIET)
        with pytest.raises(ExportError, match="was not scored"):
            combining.combine(dirs, out=tmp_path, rows=2, min_kept=-9.0, console=QUIET)
    finally:
        (home / "moved.jsonl").rename(data)
    tasks = made.result["combination"]["tasks"]
    assert [task["rows"] for task in tasks] == [2, 0]
    assert "its data cannot be read" in tasks[1]["note"]


# --- what is refused


def test_what_cannot_be_combined_is_refused_before_anything_is_written(runs, home, tiny, tmp_path):
    one, other = (run.dir for run in runs)
    unfinished = tmp_path / "half" / "one" / one.name
    shutil.copytree(one, unfinished)
    (unfinished / "result.json").unlink()
    checkpoint = next((one / "checkpoints").glob("checkpoint-*"))

    def changed(folder, section, **values):
        folder = tmp_path / folder / "one" / one.name
        shutil.copytree(other, folder)
        recipe = trained.find(other).recipe
        new = recipe.model_copy(
            update={section: getattr(recipe, section).model_copy(update=values)}
        )
        (folder / "recipe.yaml").write_text(new.dump())
        return folder

    elsewhere = changed("base", "model", name=str(save_tiny(tmp_path / "base2")))
    packed = changed("quant", "quant", double_quant=False)
    template = tmp_path / "t.jinja"
    shown = trained.find(one).tok.chat_template
    template.write_text(shown + "{# another #}")
    worded = changed("template", "data", chat_template=str(template))
    before = changed("weights", "data")
    kept = json.loads((before / "before.json").read_text())
    kept["of"]["base"] = "0" * 64
    (before / "before.json").write_text(json.dumps(kept))
    plain = changed("plain", "data")
    ledger = json.loads((plain / "data.json").read_text())
    (plain / "data.json").write_text(json.dumps(ledger | {"rendering": "text"}))
    cases = [
        ([one], RecipeError, "1 run was named, and combining takes two or more"),
        ([one, one], CheckpointError, "is named twice"),
        ([one, tmp_path / "nowhere"], CheckpointError, "no such directory"),
        ([one, unfinished], CheckpointError, "the run has not finished"),
        ([one, checkpoint], CheckpointError, "a checkpoint; name a run that has finished"),
        ([one, tiny], CheckpointError, "a model without an adapter"),
        ([one, elsewhere], CheckpointError, "not trained on one base: model.name is"),
        ([one, packed], CheckpointError, "quant.double_quant is True in the first and False"),
        ([one, before], CheckpointError, "had other weights when the second was trained"),
        ([one, worded], CheckpointError, "the chat template differs"),
        ([one, plain], CheckpointError, "through the chat template and as plain text"),
    ]
    for dirs, kind, said in cases:
        with pytest.raises(kind) as caught:
            combining.combine(dirs, out=tmp_path / "new", console=QUIET)
        assert said in str(caught.value)
    for asked, said in (
        ({"name": "../x"}, "--name is '../x'"),
        ({"rows": -1}, "--rows is -1"),
        ({"min_kept": 0.5, "rows": 0}, "score some rows"),
        ({"weights": [1.0, -0.0]}, "Write numbers other than 0"),
    ):
        with pytest.raises(RecipeError) as caught:
            combining.combine([one, other], out=tmp_path / "new", console=QUIET, **asked)
        assert said in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_adapters_that_cancel_each_other_are_refused(runs, tmp_path):
    copy = tmp_path / "copies" / "one" / runs[0].dir.name
    shutil.copytree(runs[0].dir, copy)
    with pytest.raises(CheckpointError, match="cancel each other"):
        combining.combine([runs[0].dir, copy], weights=[1.0, -1.0], out=tmp_path, console=QUIET)


def test_a_combination_that_is_not_the_sum_is_caught_and_not_kept(runs, tmp_path, monkeypatch):
    real = deltas.write

    def wrong(folder, matrices, rank, parts):
        name, (a, b) = next(iter(matrices.items()))
        real(folder, matrices | {name: (a, b * 2)}, rank, parts)

    monkeypatch.setattr(deltas, "write", wrong)
    with pytest.raises(CheckpointError, match="computes something else than its adapters do"):
        combining.combine([run.dir for run in runs], out=tmp_path / "new", console=QUIET)
    assert not list((tmp_path / "new").rglob("*"))


def test_a_full_disk_leaves_nothing_that_looks_like_a_run(runs, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deltas, "save_file", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        combining.combine([run.dir for run in runs], out=tmp_path / "new", console=QUIET)
    assert not list((tmp_path / "new").rglob("*"))


# --- the command line


def test_the_command_combines_and_prints_json(runs, tmp_path, monkeypatch, capsys):
    words = [str(run.dir) for run in runs]
    asked = ["--weights", "0.5, 2", "--rows", "2", "--out", str(tmp_path), "--name", "x", "--json"]
    monkeypatch.setattr(sys, "argv", ["qlora", "combine", *words, *asked])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code in (0, None)
    answer = capsys.readouterr()
    assert json.loads(answer.out)["combination"]["weights"] == [0.5, 2.0]
    assert "Each adapter's own held-out rows" in answer.err


def test_weights_that_are_no_numbers_end_with_exit_code_two(runs, monkeypatch, capsys):
    words = [str(run.dir) for run in runs]
    monkeypatch.setattr(sys, "argv", ["qlora", "combine", *words, "--weights", "a,b"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "Write numbers with commas between them, such as 0.7,0.3." in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_and_ends_with_130(runs, tmp_path, monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(interference, "measure", pressed)
    words = [str(run.dir) for run in runs]
    monkeypatch.setattr(sys, "argv", ["qlora", "combine", *words, "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert "Stopped; nothing was written." in capsys.readouterr().err
    assert not list((tmp_path / "new").rglob("*"))


def test_its_report_tells_what_each_run_has_kept_and_misses_no_curves(runs, combined):
    from qlora.report import dossier, findings

    said = {one.about: one for one in findings.verdicts(dossier.read(combined))}
    assert said["combined"].said.startswith("of several runs by linear")
    tasks = combined.result["combination"]["tasks"]
    for task in tasks:
        one = said[f"of {task['run']}"]
        assert one.said.endswith(task["verdict"]) and "combined: " in one.said
        assert f"{task['alone']['held_out_loss']:.4f} alone" in one.said
    assert len(tasks) == 2 and not any("metrics.jsonl" in one.said for one in said.values())
