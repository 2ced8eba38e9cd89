"""The 8-bit head: what it rounds, that nothing else changes, and a whole run through it."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig

from qlora import (
    adapter,
    chat,
    cli,
    generation,
    loader,
    memory,
    rehearsal,
    rundir,
    trainer,
)
from qlora.cards import Card
from qlora.errors import ModelError, RecipeError
from qlora.generation import Sampling
from qlora.kernels import head as module
from qlora.kernels.attached import head_of
from qlora.kernels.head import PackedHead, pack_head
from qlora.kernels.loss import Dense, linear_cross_entropy
from qlora.records import Turn
from qlora.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS, WIDTH, ROWS = 300, 64, 11
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(dtype: torch.dtype = torch.float32, words: int = WORDS, std: float = 0.02) -> nn.Linear:
    """A head whose rows differ in size by four orders of magnitude at the most."""
    torch.manual_seed(words)
    made = nn.Linear(WIDTH, words, bias=False)
    with torch.no_grad():
        made.weight.normal_(0, std)
        made.weight[1] *= 1e-3
        made.weight[2] *= 10
    return made.requires_grad_(False).to(dtype)


def unpacked(packed: PackedHead) -> torch.Tensor:
    """What it stands for, in fp64."""
    return packed.weight.double() * packed.scale.double()[:, None]


def hidden_states(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


def far(found: torch.Tensor, reference: torch.Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


# One tile; tiles of 100 rows; of 7, which do not divide 300; of one row; less than a row's bytes.
TILES = [2**25, 100 * WIDTH * 4, 7 * WIDTH * 4, WIDTH * 4, 1]


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_TILE_BYTES", request.param)


# --- what is rounded


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_is_rounded_by_a_scale_of_its_own(dtype: torch.dtype, tiles: None) -> None:
    source = linear(dtype)
    packed = PackedHead(source)
    assert packed.weight.dtype == torch.int8 and packed.weight.shape == (WORDS, WIDTH)
    assert packed.scale.dtype == torch.float32 and packed.scale.shape == (WORDS,)
    assert packed.dtype == dtype and packed.width == WORDS
    largest = source.weight.double().abs().amax(1)
    assert torch.allclose(packed.scale.double(), largest / 127, rtol=1e-6)
    assert bool((packed.weight.abs().amax(1) == 127).all())  # each row uses all of its range
    error = (unpacked(packed) - source.weight.double()).abs()
    assert bool((error <= packed.scale.double()[:, None] * (0.5 + 1e-4)).all())
    assert not list(packed.parameters())


def test_a_row_of_zeros_stays_a_row_of_zeros() -> None:
    source = linear()
    source.weight[[0, 7, WORDS - 1]] = 0
    packed = PackedHead(source)
    assert bool(packed.scale.isfinite().all()) and not bool(packed.weight[7].any())
    found = packed(hidden_states())
    assert bool(found.isfinite().all()) and not bool(found[:, [0, 7, WORDS - 1]].any())


# --- its products


def test_in_fp32_its_logits_and_its_way_back_are_those_of_the_unpacked_weight(tiles: None) -> None:
    packed, hidden = PackedHead(linear()), hidden_states()
    assert far(packed.logits(hidden), hidden.double() @ unpacked(packed).T) <= 1e-6
    gradient = torch.randn(ROWS, WORDS)
    expected = gradient.double() @ unpacked(packed)
    assert far(packed.back(gradient.clone()), expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_rounds_hardly_more_than_a_head_in_16_bits(
    dtype: torch.dtype, tiles: None
) -> None:
    packed, hidden = PackedHead(linear(dtype)), hidden_states(dtype)
    dense = Dense(unpacked(packed).to(dtype))
    logits = hidden.double() @ unpacked(packed).T
    # Twice rounded, where the other one rounds its weight and its logits.
    found, own = packed.logits(hidden), dense.logits(hidden)
    assert found.dtype == dtype and far(found, logits) <= 1.5 * far(own, logits)
    gradient = torch.softmax(logits, 1).to(dtype)
    back = gradient.double() @ unpacked(packed)
    found, own = packed.back(gradient.clone()), dense.back(gradient)
    assert found.dtype == dtype and far(found, back) <= 2 * far(own, back)


def test_in_fp16_a_logit_of_a_small_head_overflows_nothing() -> None:
    """Whole numbers up to 127 without their scale would be beyond 65,504 here."""
    source = linear(torch.float16)
    row = source.weight[5].float()
    hidden = (row / row.norm() ** 2 * 60).half()[None]
    packed = PackedHead(source)
    expected = hidden.double() @ unpacked(packed).T
    assert float(expected.max()) / float(packed.scale[5]) > torch.finfo(torch.float16).max
    assert far(packed.logits(hidden), expected) <= 2e-3


def test_in_fp16_probabilities_below_its_numbers_weigh_on_the_way_back() -> None:
    """A scale of a thousandth must not take away what the loss's own factor is there to keep."""
    from qlora.kernels.loss import FP16_SCALE

    packed = PackedHead(linear(torch.float16))
    gradient = torch.full((1, WORDS), 2e-8 * FP16_SCALE, dtype=torch.float16)
    expected = gradient.double() @ unpacked(packed)
    assert far(packed.back(gradient), expected) <= 0.05


def test_it_takes_hidden_states_of_any_shape_and_dtype_as_the_head_did() -> None:
    source = linear(torch.bfloat16)
    packed = PackedHead(source)
    hidden = torch.randn(2, 5, WIDTH)
    found = packed(hidden)
    assert found.shape == (2, 5, WORDS) and found.dtype == torch.bfloat16
    assert torch.equal(found[1, 3], packed.logits(hidden[1, 3:4].bfloat16())[0])
    assert packed(hidden[:, :0]).shape == (2, 0, WORDS)
    assert far(found, source(hidden.bfloat16())) < 0.02


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_fused_loss_through_it_is_that_of_the_unpacked_head(
    softcap: float, tiles: None
) -> None:
    packed, labels = PackedHead(linear(std=1)), torch.arange(ROWS) * 27
    mine, exact = hidden_states().requires_grad_(), hidden_states().double().requires_grad_()
    found = linear_cross_entropy(mine, labels, packed, softcap=softcap)
    logits = exact @ unpacked(packed).T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    (found / 3).backward()
    (expected / 3).backward()
    assert mine.grad is not None and exact.grad is not None
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert far(mine.grad, exact.grad) <= 1e-6


# --- in a base


def load(recipe: Any, cpu: Any) -> Any:
    return loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model


def eight(make_recipe: Any, **changes: Any) -> Any:
    return make_recipe(**({"quant__head": "8bit"} | changes))


def test_a_base_answers_by_it_as_by_the_unpacked_head(make_recipe: Any, cpu: Any) -> None:
    packed, dense = load(eight(make_recipe), cpu), load(make_recipe(), cpu)
    head = packed.get_output_embeddings()
    assert isinstance(head, PackedHead) and not head.training and head_of(
        adapter.attach(packed, make_recipe())
    ) is head  # fmt: skip
    dense.get_output_embeddings().weight.data = unpacked(head).float()
    ids = torch.arange(4, 24).view(2, 10)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    found, expected = packed.generate(**asked, **settings), dense.generate(**asked, **settings)
    assert torch.equal(found, expected) and found.shape == (2, 19)
    with torch.no_grad():
        assert far(packed(**asked).logits, dense(**asked).logits) <= 1e-6


def test_the_digest_of_the_base_covers_it(make_recipe: Any, cpu: Any) -> None:
    model = adapter.attach(load(eight(make_recipe), cpu), eight(make_recipe))
    head = model.get_base_model().get_output_embeddings()
    before = adapter.base_digest(model)
    assert adapter.base_digest(model) == before
    for tensor in (head.weight, head.scale):
        kept = tensor.clone()
        tensor[3] *= 2
        assert adapter.base_digest(model) != before
        tensor.copy_(kept)
        assert adapter.base_digest(model) == before


def test_its_weights_are_counted_as_parameters(make_recipe: Any, cpu: Any) -> None:
    counts = [
        adapter.count(adapter.attach(load(recipe, cpu), recipe))
        for recipe in (make_recipe(), eight(make_recipe))
    ]
    assert counts[0] == counts[1]


SETTINGS = {"quant.head: 8bit": {"quant__head": "8bit"},
            "train.embedding_offload: true": {"train__embedding_offload": True}}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_head_that_is_the_embedding_is_refused(
    setting: str, make_recipe: Any, cpu: Any, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    tied = str(save_tiny(tmp_path / "tied", tie_word_embeddings=True))
    recipe = make_recipe(model__name=tied, **SETTINGS[setting])
    with pytest.raises(ModelError) as refused:
        load(recipe, cpu)
    assert str(refused.value) == (
        f"{setting} needs a model whose head is a matrix of its own, and in LlamaForCausalLM it is the "
        "embedding. Leave that setting out."
    )
    (tmp_path / "tied.yaml").write_text(recipe.dump())
    monkeypatch.setattr(sys, "argv", ["qlora", "train", str(tmp_path / "tied.yaml")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and setting.partition(":")[0] in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.parametrize(
    ("other", "said"),
    [({"train__kernels": "off"}, "train.kernels: off"),
     ({"lora__train_new_tokens": True}, "lora.train_new_tokens: true")],
)  # fmt: skip
def test_without_the_loss_that_reads_it_the_recipe_is_refused(
    other: Any, said: str, make_recipe: Any
) -> None:
    with pytest.raises(RecipeError, match=rf"quant.head is 8bit.*{said} does.*quant.head: 16bit"):
        eight(make_recipe, **other)


def test_a_family_without_fused_layers_is_refused(make_recipe: Any, tmp_path: Any) -> None:
    folder = save_tiny(tmp_path / "granite", "granite")
    recipe = eight(make_recipe, model__name=str(folder))
    with pytest.raises(RecipeError) as refused:
        trainer.train(recipe, console=Console(quiet=True))
    assert str(refused.value) == (
        "quant.head: 8bit is about qlora.kernels, which do not know this model's family ('granite'). Leave "
        "that setting out."
    )
    assert not (tmp_path / "runs").exists()


def test_pack_head_asks_for_a_head_of_its_own(make_recipe: Any, cpu: Any, tmp_path: Any) -> None:
    tied = str(save_tiny(tmp_path / "tied", tie_word_embeddings=True))
    with pytest.raises(AssertionError, match="the head is the embedding"):
        pack_head(load(make_recipe(model__name=tied), cpu))


# --- a run


def trained(recipe: Any, **settings: Any) -> Any:
    return trainer.train(recipe, console=Console(quiet=True), **settings)


def test_a_run_through_it_trains_resumes_and_answers(make_recipe: Any) -> None:
    run = trained(eight(make_recipe, eval__generate=2, train__eval_steps=2))
    result = run.result
    assert result["after"]["held_out_loss"] < result["before"]["held_out_loss"]
    assert result["base_unchanged"] and result["alive"]["disk_against_memory"] == 0.0
    file = run.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    assert not any("head" in name for name in load_file(file))
    speaker = chat.load_speaker(run.dir)
    assert isinstance(speaker.model.get_base_model().get_output_embeddings(), PackedHead)
    said: list[str] = []
    spoken = speaker.answer([Turn("user", "What?")], Sampling(max_new_tokens=5), said.append)
    prompts = [[5, 6, 7], [9, 8]]
    batch = generation.answer_all(
        speaker.model, speaker.found.renderer.tok, prompts, Sampling(max_new_tokens=3), 2
    )
    assert len(batch) == 2 and "".join(said).strip() == spoken.text

    (run.dir / "result.json").unlink()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    resumed = trained(eight(make_recipe, eval__generate=2, train__eval_steps=2), resume=run.dir)
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == whole
    assert rundir.open_run(run.dir).is_complete


def test_a_run_in_bf16_keeps_its_scales_in_fp32(make_recipe: Any, monkeypatch: Any) -> None:
    seen = []
    build = trainer.sft.build

    def spy(*args: Any, **settings: Any) -> Any:
        seen.append(settings["head"])
        return build(*args, **settings)

    monkeypatch.setattr(trainer.sft, "build", spy)
    run = trained(eight(make_recipe, quant__compute_dtype="bfloat16", train__max_steps=2))
    (head,) = seen
    assert head.scale.dtype == torch.float32 and head.weight.dtype == torch.int8
    facts = json.loads((run.dir / "environment.json").read_text())["base"]
    assert facts["compute_dtype"] == "bfloat16" and "of the libraries' own" in facts["kernels"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plan_counts_the_bytes_that_a_trace_finds(dtype: str, make_recipe: Any) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32768, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    card = Card("a card", "cpu", 2**36, 2**36)
    shape, found = Shape.from_config(config.to_dict()), {}
    for head in ("16bit", "8bit"):
        recipe = make_recipe(quant__head=head, quant__compute_dtype=dtype)
        traced = rehearsal.trace(recipe, config, card)
        plan = memory.predict(recipe, shape, card)
        buffers = 4 * shape.head_dim  # inv_freq and its original
        assert traced.peak["unquantized"] == pytest.approx(
            plan.terms["unquantized"], abs=2 * buffers
        )
        found[head] = traced.peak["unquantized"], plan.terms["unquantized"]
    element = 4 if dtype == "float32" else 2
    spared = (element - 1) * shape.vocab * shape.hidden - 4 * shape.vocab
    assert [a - b for a, b in zip(found["16bit"], found["8bit"], strict=True)] == [spared, spared]
