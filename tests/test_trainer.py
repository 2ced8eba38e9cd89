"""The main story on a tiny model: what a run leaves, what it proves, and how it fails."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BASE
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

import qlora
from qlora import (
    adapter,
    answering,
    cards,
    data,
    fitting,
    generation,
    hardware,
    loader,
    nf4,
    rehearsal,
    rundir,
    sft,
    speed,
    store,
    tokenizer,
    tracking,
    trainer,
)
from qlora.data import Example
from qlora.errors import (
    CheckpointError,
    DataError,
    DoesNotFit,
    Interrupted,
    RecipeError,
    TrainingDiverged,
)
from qlora.packing import Layout
from qlora.recipe import load_recipe
from qlora.records import Record, Turn
from qlora.rendering import Renderer
from qlora.shape import Shape


def run_it(recipe, **settings):
    return trainer.train(recipe, console=Console(quiet=True), **settings)


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


def test_a_run_leaves_what_was_asked_predicted_installed_fed_and_learned(make_recipe):
    recipe = make_recipe(eval__generate=4)
    run = run_it(recipe)
    assert {p.name for p in run.dir.iterdir()} == {
        "recipe.yaml", "plan.json", "environment.json", "data.json", "metrics.jsonl",
        "checkpoints", "adapter", "result.json", "before.json", "after.json", "report.html", ".lock",
    }  # fmt: skip
    assert qlora.load_recipe(run.recipe_file) == recipe
    result = run.result
    assert result["steps"] == 6 and result["base_unchanged"] and result["alive"]["largest_b"] > 0
    assert result["after"]["held_out_loss"] < result["before"]["held_out_loss"]
    held_out = json.loads((run.dir / "data.json").read_text())["held_out"]["rows"]
    assert result["before"]["answered"] == result["after"]["answered"] == min(4, held_out)
    environment = json.loads((run.dir / "environment.json").read_text())
    assert environment["base"]["quantized_linears"] == 14 and "torch" in environment["packages"]
    assert json.loads((run.dir / "plan.json").read_text())["predicted"] is True
    steps = [line["step"] for line in run.metrics() if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(line["tokens_per_second"] > 0 for line in run.metrics() if "loss" in line)
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        assert store.defect(checkpoint) is None
        assert {p.suffix for p in checkpoint.iterdir()} == {".json", ".safetensors"}
    assert {t.dtype for t in weights(run).values()} == {torch.float32}


def test_two_runs_of_one_recipe_are_bit_identical_and_another_seed_is_not(make_recipe):
    first, second = run_it(make_recipe()), run_it(make_recipe())
    assert first.dir != second.dir
    assert losses(first) == losses(second)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(run_it(make_recipe(train__seed=7))))


def test_the_losses_are_those_of_a_loop_written_by_hand(make_recipe, cpu):
    """The independent reference: forward, backward and torch's AdamW, without TRL or the Trainer."""
    recipe = make_recipe(train__max_grad_norm=1e9, train__max_steps=4, data__held_out_fraction=0.0)
    run = run_it(recipe)
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe)
    prepared = data.prepare(recipe, tok, config.vocab_size)
    model = adapter.attach(loader.load_base(recipe, cpu, config, bars=False).model, recipe)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.train.learning_rate, weight_decay=0.0)
    layout = Layout(128, 4, packed=False)  # the run itself packed its rows
    built = sft.build(
        recipe, run, cpu, model, tok, prepared, layout, observers=(), callbacks=()
    )  # only for its order of rows
    expected = []
    for step in list(built.get_train_dataloader())[:4]:
        (batch,) = step["micro_batches"]
        ids, labels = batch["input_ids"], batch["labels"]
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        )
        expected.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses(run) == pytest.approx(expected, rel=1e-5)


def test_accumulated_micro_batches_equal_one_batch(make_recipe):
    whole = run_it(make_recipe(train__max_steps=3))
    parts = run_it(
        make_recipe(
            train__max_steps=3,
            train__per_device_train_batch_size=2,
            train__gradient_accumulation_steps=2,
        )
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_checks_during_training_do_not_change_what_is_learned(make_recipe):
    quiet = run_it(make_recipe(train__save_steps=100, lora__lora_dropout=0.1))
    checked = run_it(
        make_recipe(
            train__save_steps=2, train__eval_steps=2, eval__generate=3, lora__lora_dropout=0.1
        )
    )
    assert len([line for line in checked.metrics() if "eval_loss" in line]) == 5
    assert losses(quiet) == losses(checked)
    assert same(weights(quiet), weights(checked))


def test_three_nans_in_a_row_stop_the_run_and_name_the_rows(make_recipe, monkeypatch):
    original = sft.RowTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if model.training and self.state.global_step > 2 else loss

    monkeypatch.setattr(sft.RowTrainer, "compute_loss", poisoned)
    recipe = make_recipe()
    with pytest.raises(TrainingDiverged, match=r"step 6: the loss is not a finite number") as error:
        run_it(recipe)
    named = str(error.value).split("rows: ")[1].splitlines()[0].split("), ")
    assert len(named) == 4 and all(name.startswith("rows.jsonl:") for name in named)
    run = rundir.open_run(recipe.run.dir)
    assert not run.is_complete and not run.adapter.exists()
    saved = load_file(store.newest(run.checkpoints) / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_a_gradient_that_is_not_finite_stops_the_run_too(make_recipe, monkeypatch):
    original = sft.RowTrainer.training_step

    def poisoned(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        next(p for p in model.parameters() if p.requires_grad).grad.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(sft.RowTrainer, "training_step", poisoned)
    with pytest.raises(
        TrainingDiverged,
        match=r"step 3: the gradient is not a finite number, first in the gradient of .*layers\.0.*lora_A",
    ):
        run_it(make_recipe())


def stopped_at(step: int):
    """A compute_loss that is interrupted, as by Ctrl-C, in the middle of a step."""
    original = sft.RowTrainer.compute_loss

    def interrupted(self, model, *args, **kwargs):
        if model.training and self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, model, *args, **kwargs)

    return interrupted


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_interrupted_run_names_its_checkpoint_and_resumes_bit_identically(
    make_recipe, monkeypatch, dropout
):
    recipe = make_recipe(lora__lora_dropout=dropout)
    straight = run_it(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", stopped_at(4))
        with pytest.raises(
            Interrupted, match=r"checkpoint-3\.\n  Go on from it: .*--resume"
        ) as error:
            run_it(recipe)
    assert error.value.exit_code == 130
    broken = rundir.open_run(recipe.run.dir)
    assert broken.dir != straight.dir and not broken.is_complete
    resumed = run_it(recipe, resume=broken.dir)
    assert resumed.dir == broken.dir and resumed.is_complete
    assert same(weights(resumed), weights(straight))
    assert losses(resumed) == losses(straight)
    assert [line["step"] for line in resumed.metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_stopped_before_the_first_checkpoint_it_says_so(make_recipe, monkeypatch):
    monkeypatch.setattr(sft.RowTrainer, "compute_loss", stopped_at(1))
    with pytest.raises(Interrupted, match="before the first checkpoint"):
        run_it(make_recipe())


def test_a_run_is_not_resumed_with_another_recipe_or_when_it_is_done(make_recipe, monkeypatch):
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", stopped_at(4))
        with pytest.raises(Interrupted):
            run_it(recipe)
    run = rundir.open_run(recipe.run.dir)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)started otherwise.*train.learning_rate: 0.01 -> 0.001\nGo on as it was: qlora train "
        r".*--allow-change train.learning_rate",
    ):
        run_it(make_recipe(train__learning_rate=1e-3), resume=run.dir)
    (store.newest(run.checkpoints) / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*state.safetensors is damaged"):
        run_it(recipe, resume=run.dir)
    rundir.write_json(run.dir / "result.json", {})
    with pytest.raises(CheckpointError, match="has finished"):
        run_it(recipe, resume=run.dir)


def test_a_dead_adapter_stops_the_run_at_its_first_save(make_recipe, monkeypatch):
    original = sft.RowTrainer.training_step

    def unlearning(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.grad = None
        return loss

    monkeypatch.setattr(sft.RowTrainer, "training_step", unlearning)
    recipe = make_recipe()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3: the adapter is dead: B is still zero"
    ):
        run_it(recipe)
    assert not rundir.open_run(recipe.run.dir).is_complete


def test_the_first_step_of_a_warmup_is_not_mistaken_for_a_dead_adapter(make_recipe):
    run = run_it(make_recipe(train__warmup_steps=2, train__save_steps=1, train__max_steps=3))
    assert run.result["alive"]["largest_b"] > 0
    with pytest.raises(CheckpointError, match=r"dead.*warmup"):
        run_it(make_recipe(train__warmup_steps=2, train__max_steps=1))


def test_bad_data_leaves_no_run_directory_behind(make_recipe, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": ""}\n')
    recipe = make_recipe(data__train=str(bad))
    with pytest.raises(DataError, match="completion is empty"):
        run_it(recipe)
    assert not list(Path(recipe.run.dir).glob("*/*"))


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything(make_recipe, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(RecipeError, match=r"run.dir is .*occupied.*run.dir=DIR"):
        run_it(make_recipe(run__dir=str(tmp_path / "occupied")))


def test_running_out_of_memory_is_told_with_ways_down(make_recipe, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(sft.RowTrainer, "training_step", full)
    with pytest.raises(
        DoesNotFit, match=r"(?s)ran out of memory.*predicted.*per_device_train_batch_size"
    ):
        run_it(make_recipe())


def test_a_changed_base_would_be_noticed(make_recipe, monkeypatch):
    original = sft.RowTrainer.training_step

    def meddling(self, model, *args, **kwargs):
        _, module = next(iter(nf4.linears(model)))
        module.weight.data.view(-1)[0] ^= 1
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(sft.RowTrainer, "training_step", meddling)
    with pytest.raises(CheckpointError, match="base changed during training"):
        run_it(make_recipe(train__max_steps=1, train__save_steps=100))


def test_a_row_that_is_too_long_does_not_shift_the_addresses(make_recipe, tmp_path, monkeypatch):
    rows = [{"prompt": "Why? " * 90, "completion": "x"}] + [
        {"prompt": f"{n}?", "completion": f"{n}!"} for n in range(30)
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(
        data__train=str(file), data__held_out_fraction=0.0, data__max_lost_fraction=0.1
    )
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe)
    prepared = data.prepare(recipe, tok, config.vocab_size)
    for row, address in zip(prepared.train, prepared.addresses, strict=True):
        assert f"{int(address.split(':')[1]) - 2}?" in tok.decode(row["input_ids"])


def test_a_run_can_be_opened_and_its_parts_deleted_afterwards(make_recipe):
    run = run_it(make_recipe(train__max_steps=1))
    assert qlora.open_run(run.dir.parent).dir == run.dir
    shutil.rmtree(run.dir)
    with pytest.raises(CheckpointError):
        qlora.open_run(run.dir)


def test_the_plan_refuses_a_card_that_is_too_small_before_reading_weights(make_recipe, monkeypatch):
    small = cards.Card("tiny card", "cuda", 2**28, 2**28, (8, 6))
    monkeypatch.setattr(hardware, "card", lambda: small)
    monkeypatch.setattr(loader, "load_base", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(
        qlora.QLoRAError, match=r"needs .* GiB \(predicted\); the tiny card has 0.2 GiB"
    ):
        run_it(make_recipe())


def test_how_answers_are_asked_and_scored_is_up_to_the_recipe(make_recipe, monkeypatch):
    asked = []

    def answer_all(model, tok, prompts, sampling, batch_size, progress):
        asked.append((len(prompts), sampling.max_new_tokens, batch_size))
        return [generation.Answer('{"a": 1, "b": 2}', True) for _ in prompts]

    monkeypatch.setattr(generation, "answer_all", answer_all)
    wanted = Example("x", Record((Turn("user", "?"), Turn("assistant", '{"a": 1, "b": 3}'))))
    renderer = Renderer(AutoTokenizer.from_pretrained(BASE), chat=True)
    for fields, score in ((["a"], 1.0), (["a", "b"], 0.0), ([], 0.0)):
        recipe = make_recipe(
            eval__generate=2, eval__max_new_tokens=7, eval__batch_size=3, eval__exact_match=fields
        )
        assert answering.answer(None, renderer, [wanted] * 5, recipe).exact_match == score
    assert asked == [(2, 7, 3)] * 3


def test_metrics_go_to_wandb_when_asked_and_only_then(make_recipe, monkeypatch):
    started, logged = [], []

    class Fake:
        note = "wandb offline (a test)"

        def __init__(self, project, name, folder, config):
            started.append((project, name, config["train"]["learning_rate"]))

        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    monkeypatch.setattr(tracking, "Wandb", Fake)
    run = run_it(make_recipe(run__report_to="wandb", run__project="mine"))
    assert started == [("mine", f"tiny-{run.dir.name}", 0.01)]
    assert logged[-1] == "finished" and [s for s, v in logged[:-1] if "loss" in v] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    run_it(make_recipe())
    assert len(started) == 1


def test_settings_chosen_for_the_card_train_and_are_recorded(make_recipe, monkeypatch):
    """train.fit: auto: the same rows a step, what was chosen in plan.json, the recipe as written."""
    said = io.StringIO()
    recipe = make_recipe(
        train__fit="auto", train__per_device_train_batch_size=1,
        train__gradient_accumulation_steps=4, train__activation_checkpointing=True,
    )  # fmt: skip
    run = trainer.train(recipe, console=Console(file=said, width=200))
    stored = json.loads((run.dir / "plan.json").read_text())
    assert stored["chosen"]["per_device_train_batch_size"] == 4
    assert stored["chosen"]["activation_checkpointing"] is False
    assert stored["chosen"]["levels"] == [2, 0, 0, 0, 0]
    assert stored["reasons"] and "every layer keeps all it needs" in said.getvalue()
    assert "kernels   on, proven on this model" in said.getvalue()
    assert load_recipe(run.recipe_file) == recipe
    by_hand = trainer.train(make_recipe(), console=Console(quiet=True))
    assert run.result["train_loss"] == by_hand.result["train_loss"]


def test_a_resumed_run_goes_on_with_what_was_chosen_at_first(make_recipe, monkeypatch):
    recipe = make_recipe(train__fit="auto", train__gradient_accumulation_steps=2)
    run = trainer.train(recipe, console=Console(quiet=True))
    whole = (run.adapter / "adapter_model.safetensors").read_bytes()
    (run.dir / "result.json").unlink()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    stored = json.loads((run.dir / "plan.json").read_text())
    seen = []
    again = fitting.again
    monkeypatch.setattr(fitting, "again", lambda *a: seen.append(a[-1]) or again(*a))
    resumed = trainer.train(recipe, resume=run.dir, console=Console(quiet=True))
    assert seen == [stored]
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == whole
    kept = json.loads((run.dir / "plan.json").read_text())
    assert kept["chosen"] == stored["chosen"]


def test_a_run_of_five_steps_teaches_the_planner_how_fast_this_machine_is(make_recipe):
    card = hardware.card()
    trainer.train(make_recipe(train__max_steps=4), console=Console(quiet=True))
    assert speed.recall(card, "float32") is None
    recipe = make_recipe(train__max_steps=5)
    trainer.train(recipe, console=Console(quiet=True))
    measured = speed.recall(card, "float32")
    assert measured is not None and measured.tokens_per_second > 0
    shape = Shape.from_config(loader.read_config(recipe).values)
    predicted = speed.tokens_per_second(recipe, shape, measured)
    assert predicted == pytest.approx(measured.tokens_per_second)


def test_a_base_that_cannot_fit_at_any_setting_is_refused_with_a_sibling_that_would(
    make_recipe, monkeypatch, tmp_path
):
    from shapes import CONFIGS

    folder = tmp_path / "large"
    folder.mkdir()
    config = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    four = cards.named_card("4GB")
    monkeypatch.setattr(hardware, "card", lambda: four)
    with pytest.raises(
        DoesNotFit, match=r"The largest sibling that would fit: meta-llama/Llama-3\.2-"
    ):
        run_it(make_recipe(model__name=str(folder)))
    assert not (tmp_path / "runs").exists()


def test_a_family_that_the_quick_plan_does_not_know_is_traced_before_it_trains_on_a_card(
    make_recipe, monkeypatch, tmp_path
):
    folder = tmp_path / "novel"
    folder.mkdir()
    config = {
        "model_type": "stablelm", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tiny = cards.Card("a stamp", "cuda", 2**27, 2**27, (8, 6))
    monkeypatch.setattr(hardware, "card", lambda: tiny)
    traced = []
    exact = rehearsal.exact
    monkeypatch.setattr(rehearsal, "exact", lambda *a: traced.append(a) or exact(*a))
    with pytest.raises(DoesNotFit, match="This recipe needs"):
        run_it(make_recipe(model__name=str(folder)))
    assert len(traced) == 1


def test_an_offload_that_the_host_has_no_room_for_is_refused(make_recipe, monkeypatch, tmp_path):
    from shapes import CONFIGS

    folder = tmp_path / "large"
    folder.mkdir()
    config = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    monkeypatch.setattr(hardware, "card", lambda: cards.named_card("12GB"))
    monkeypatch.setattr(hardware, "ram_bytes", lambda: (2**30, 2**29))
    with pytest.raises(DoesNotFit, match=r"keep 0\.9 GiB in the host's memory .* 0\.5 GiB are"):
        run_it(
            make_recipe(
                model__name=str(folder), data__max_length=4096, train__activation_checkpointing=True,
                train__activation_offload=True, train__per_device_train_batch_size=1,
            )
        )  # fmt: skip
