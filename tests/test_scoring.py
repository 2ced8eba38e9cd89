"""A row's own loss: that of the trainer when they are summed, whatever shares a pass with it."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from conftest import ROWS, save_tiny
from fused_models import FAMILIES, bare, make
from rich.console import Console
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora import scoring, trained, trainer
from qlora.data import prepare
from qlora.errors import DoesNotFit, ModelError
from qlora.kernels.head import pack_head
from qlora.recipe import recipe_from
from qlora.rendering import IGNORED

pytestmark = pytest.mark.usefixtures("one_thread", "light")
# Families that do something to their logits, or have a bias on the head.
SCALED = {
    "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.0625}, "gemma2": {},
    "phi": {"intermediate_size": 192}, "falcon_h1": {"lm_head_multiplier": 0.03},
}  # fmt: skip


@cache
def rows(vocabulary: int = 512) -> list[dict[str, list[int]]]:
    """Nine rows of 3 to 47 tokens; the loss is on their second half, or on all but the first token."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in (3, 47, 11, 20, 20, 31, 8, 5, 40):
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        start = 1 if length == 31 else max(1, length // 2)
        made.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})
    return made


def alone(model, row) -> torch.Tensor:
    """The reference: one row without padding, all its logits, the loss of each supervised token."""
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    labels = torch.tensor(row["labels"][1:])
    losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return losses[labels != IGNORED].double()


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_row_has_the_loss_it_has_alone_in_every_family(kind):
    model = make(kind).eval()
    for row, found in zip(rows(), scoring.score(model, rows(), 0), strict=True):
        expected = alone(model, row)
        assert found.nll == pytest.approx(float(expected.sum()), rel=2e-5)
        assert found.tokens == len(expected)


@pytest.mark.parametrize("kind", sorted(SCALED))
def test_what_a_family_does_to_its_logits_is_done(kind):
    """And it matters: without it the losses would be others."""
    torch.manual_seed(0)
    values = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    if kind == "falcon_h1":
        values |= {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1}
        values |= {"mamba_d_head": 16}
    config = AutoConfig.for_model(kind, **(values | SCALED[kind]))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
        if (bias := model.get_output_embeddings().bias) is not None:
            bias.normal_()
    chosen = rows()[1:2]
    expected = alone(model, chosen[0])
    (found,) = scoring.score(model, chosen, 0)
    assert found.nll == pytest.approx(float(expected.sum()), rel=2e-5)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([chosen[0]["input_ids"]]))[0][0, :-1]
        bare_logits = hidden @ model.get_output_embeddings().weight.T
    labels = torch.tensor(chosen[0]["labels"][1:])
    other = functional.cross_entropy(bare_logits, labels, ignore_index=IGNORED, reduction="sum")
    assert abs(float(other) - found.nll) > 0.01


def test_pad_token_passes_and_chunks_change_nothing(monkeypatch):
    model = make("llama").eval()
    usual = scoring.score(model, rows(), 0)
    monkeypatch.setattr(scoring, "AT_ONCE", 3 * 4 * 512)  # three tokens' logits
    for other in (
        scoring.score(model, rows(), 0),
        scoring.score(model, rows(), 77),
        scoring.score(model, rows(), 0, batch_tokens=1),
        scoring.score(model, rows(), 511, batch_tokens=10**6),
        scoring.score(model, rows()[::-1], 0)[::-1],
    ):
        for one, same in zip(usual, other, strict=True):
            assert same.nll == pytest.approx(one.nll, rel=1e-5)
            assert same.tokens == one.tokens


def test_logits_exist_for_supervised_tokens_alone_and_a_chunk_at_a_time(monkeypatch):
    model = make("llama").eval()
    widest = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: widest.append(tuple(out.shape)))
    monkeypatch.setattr(scoring, "AT_ONCE", 7 * 4 * 512)
    found = scoring.score(model, rows(), 0)
    assert {shape[2] for shape in widest} == {512}
    assert max(shape[0] * shape[1] for shape in widest) == 7
    assert sum(shape[0] * shape[1] for shape in widest) == sum(one.tokens for one in found)


def test_the_tokens_that_end_an_answer_are_told_apart():
    model = make("llama").eval()
    row = {
        "input_ids": [5, 6, 9, 7, 8, 9, 9],
        "labels": [IGNORED, IGNORED, 9, IGNORED, 8, 9, IGNORED],
    }
    every = alone(model, row).tolist()
    (found,) = scoring.score(model, [row], 0, closing=9)
    assert found.closing_tokens == 2 and found.tokens == 3
    assert found.closing_nll == pytest.approx(every[0] + every[2], rel=1e-5)
    (both,) = scoring.score(model, [row], 0, closing=(8, 9))
    assert both.closing_nll == pytest.approx(both.nll) and both.closing_tokens == 3
    (none,) = scoring.score(model, [row], 0, closing=3)
    assert (none.closing_nll, none.closing_tokens) == (0.0, 0)
    assert scoring.closing_mean([none]) is None


def test_a_head_in_eight_bits_is_scored_as_it_computes():
    base = bare("llama").eval()
    usual = [float(alone(base, row).sum()) for row in rows()]
    pack_head(base)
    packed = [float(alone(base, row).sum()) for row in rows()]
    found = [one.nll for one in scoring.score(base, rows(), 0)]
    assert found == pytest.approx(packed, rel=1e-5)
    assert found != pytest.approx(usual, rel=1e-5)


def test_mode_forward_and_random_state_are_left_as_they_were():
    model = make("llama").train()
    trunk = model.get_base_model().base_model
    state = torch.get_rng_state()
    scoring.score(model, rows(), 0)
    assert model.training and "forward" not in trunk.__dict__
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_while_a_training_model_is_scored():
    model = make("llama", lora_dropout=0.5).train()
    one, again = (scoring.score(model, rows(), 0) for _ in range(2))
    assert one == again


def test_a_pass_that_runs_out_of_memory_is_taken_row_by_row(monkeypatch):
    model = make("llama").eval()
    expected = [one.nll for one in scoring.score(model, rows(), 0)]
    own = scoring._losses

    def small(base, ids, *args):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return own(base, ids, *args)

    monkeypatch.setattr(scoring, "_losses", small)
    assert [one.nll for one in scoring.score(model, rows(), 0)] == pytest.approx(expected, rel=1e-5)

    def none(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(scoring, "_losses", none)
    with pytest.raises(DoesNotFit, match=r"A row of 47 tokens needs more memory than is free"):
        scoring.score(model, rows(), 0)


def test_a_loss_that_is_no_number_is_refused_with_its_row():
    model = make("llama").eval()
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[rows()[2]["input_ids"][0]] = torch.inf
    with pytest.raises(ModelError, match=r"the loss of row 3 is (nan|inf), not a finite number"):
        scoring.score(model, rows()[:3], 0)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("rendering", ["chat", "plain"])
def test_the_mean_is_the_held_out_loss_of_the_trainer(tmp_path, kind, rendering):
    """A real run of six steps; its result.json has the losses of base and tuned."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    changes = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma2" else {}
    recipe = recipe_from(
        {
            "model": {"name": str(save_tiny(tmp_path / kind, kind, **changes))},
            "data": {
                "train": str(data), "rendering": rendering, "held_out_fraction": 0.2,
                "max_length": 128,
            },
            "lora": {"r": 4},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2, "warmup_steps": 0, "activation_checkpointing": False,
            },
            "run": {"dir": str(tmp_path / "runs"), "name": "tiny"},
        }
    )  # fmt: skip
    run = trainer.train(recipe, console=Console(quiet=True))
    found = trained.find(run.dir)
    held_out = prepare(recipe, found.tok, found.config.vocab_size).held_out
    asked = (list(held_out), found.tok.pad_token_id, found.renderer.closing)
    base = scoring.score(trained.load_base(found), *asked)
    tuned = scoring.score(trained.load(found), *asked)
    assert scoring.mean(base) == pytest.approx(run.result["before"]["held_out_loss"], rel=1e-6)
    assert scoring.mean(tuned) == pytest.approx(run.result["after"]["held_out_loss"], rel=1e-6)
    assert all(one.closing_tokens == 1 for one in tuned)
    assert scoring.closing_mean(tuned) < scoring.closing_mean(base)
