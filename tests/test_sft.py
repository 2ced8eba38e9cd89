"""The recipe in TRL's terms: every setting arrives, and TRL's own surprises are put right."""

from __future__ import annotations

import warnings

import pytest
import torch

from qlora import adapter, data, loader, packing, sft, tokenizer
from qlora.errors import RecipeError
from qlora.rundir import Run


@pytest.fixture
def config_of(tmp_path, cpu):
    def config_of(recipe, rows=40):
        return sft.sft_config(recipe, Run(tmp_path), cpu, rows)

    return config_of


CHANGED = {
    "num_train_epochs": 3.0, "max_steps": 17, "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5, "learning_rate": 3e-5, "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1, "weight_decay": 0.01, "max_grad_norm": 0.7, "optim": "adamw_8bit",
    "seed": 5, "logging_steps": 3, "eval_steps": 4, "save_steps": 9, "save_total_limit": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_each_setting_reaches_trl_under_its_own_name(make_recipe, config_of, name):
    was, now = make_recipe(), make_recipe(**{f"train__{name}": CHANGED[name]})
    if name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        # A batch of the Trainer's is a whole step; sft.RowTrainer takes it in parts.
        assert sft.rows_per_step(now) == config_of(now).per_device_train_batch_size
        assert config_of(now).gradient_accumulation_steps == 1
        assert sft.rows_per_step(now) != sft.rows_per_step(was)
    else:
        assert getattr(config_of(now), name) == CHANGED[name] != getattr(config_of(was), name)


def test_every_training_setting_is_covered_by_the_test_above(make_recipe):
    fields = set(type(make_recipe().train).model_fields)
    elsewhere = {
        "activation_checkpointing", "activation_offload", "fit", "rehearse", "sft_config", "kernels",
        "levels", "mlp_tile", "embedding_offload", "spike_factor", "after_bad_steps", "oom_retries",
    }  # fmt: skip
    assert fields == set(CHANGED) | elsewhere


def test_other_fields_of_trl_go_through_the_escape_hatch(make_recipe, config_of):
    changed = make_recipe(train__sft_config={"adam_beta2": 0.95, "neftune_noise_alpha": 5.0})
    assert config_of(changed).adam_beta2 == 0.95
    sft.require_known_fields(changed)
    with pytest.raises(
        RecipeError, match=r"adam_beta_2 is no field of SFTConfig in trl .*'adam_beta2'"
    ):
        sft.require_known_fields(make_recipe(train__sft_config={"adam_beta_2": 0.95}))


def test_nothing_is_prepared_filtered_or_reported_behind_our_back(make_recipe, config_of):
    config = config_of(make_recipe())
    assert config.dataset_kwargs == {"skip_prepare_dataset": True} and config.max_length is None
    assert not config.logging_nan_inf_filter and config.report_to == []
    assert not config.activation_checkpointing and not config.packing


def test_a_run_saves_four_times_unless_told_otherwise(make_recipe, config_of):
    recipe = make_recipe(train__max_steps=None, train__save_steps=None, train__num_train_epochs=4.0)
    assert config_of(recipe, rows=40).save_steps == 10  # 4 epochs of 10 batches of 4
    assert config_of(make_recipe(train__save_steps=None)).save_steps == 2


def build(recipe, cpu, run):
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe)
    prepared = data.prepare(recipe, tok, config.vocab_size)
    model = adapter.attach(loader.load_base(recipe, cpu, config, bars=False).model, recipe)
    layout, _ = packing.choose(recipe, model, prepared.train[:3]["input_ids"], "sdpa")
    return sft.build(recipe, run, cpu, model, tok, prepared, layout, observers=(), callbacks=())


def test_the_adapter_is_fp32_after_trls_constructor_and_again_before_the_optimizer(
    make_recipe, cpu, tmp_path
):
    trainer = build(make_recipe(), cpu, Run(tmp_path))
    adapter.assert_census(trainer.model)
    for parameter in trainer.model.parameters():  # what a resume or an update of trl may do
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    optimizer = trainer.create_optimizer()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in held} == {torch.float32} and len(held) == 28


def test_the_plain_loss_on_a_cpu_equals_trls_fused_loss(make_recipe, cpu, tmp_path):
    trainer = build(make_recipe(), cpu, Run(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    (batch,) = batch["micro_batches"]
    for items in (None, torch.tensor(37)):
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        theirs = super(sft.RowTrainer, trainer).compute_loss(
            trainer.model, dict(batch), num_items_in_batch=items
        )
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)


def test_the_number_of_steps_is_known_before_training(make_recipe, cpu, tmp_path):
    recipe = make_recipe(train__max_steps=None, train__num_train_epochs=2.0)
    trainer = build(recipe, cpu, Run(tmp_path))
    expected = trainer.total_steps
    trainer.train()
    assert trainer.state.global_step == expected == 2 * -(-len(trainer.train_dataset) // 4)


def test_the_held_out_loss_is_the_mean_over_supervised_tokens_whatever_the_batch(
    make_recipe, cpu, tmp_path
):
    """The independent reference: each row alone, its summed loss by transformers' own model loss."""
    found = []
    for rows, packing_asked in ((1, False), (3, False), (8, True)):
        recipe = make_recipe(
            train__per_device_train_batch_size=rows, data__packing=packing_asked,
            data__held_out_fraction=0.4,
        )  # fmt: skip
        trainer = build(recipe, cpu, Run(tmp_path))
        found.append(trainer.evaluate()["eval_loss"])
    total = count = 0.0
    for row in trainer.eval_dataset:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            mean = trainer.model(input_ids=ids, labels=labels).loss
        supervised = int((labels[:, 1:] != -100).sum())
        total, count = total + float(mean) * supervised, count + supervised
    assert found == pytest.approx([total / count] * 3, rel=1e-5)


def test_label_smoothing_changes_the_loss_on_a_cpu_too(make_recipe, cpu, tmp_path):
    found = []
    for factor in (0.0, 0.5):
        recipe = make_recipe(train__sft_config={"label_smoothing_factor": factor})
        with warnings.catch_warnings():  # trl 1.16 deprecates it
            warnings.simplefilter("ignore", FutureWarning)
            trainer = build(recipe, cpu, Run(tmp_path))
        (batch,) = next(iter(trainer.get_train_dataloader()))["micro_batches"]
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(40))
        found.append(float(loss.detach()))
    assert abs(found[0] - found[1]) > 1e-3
