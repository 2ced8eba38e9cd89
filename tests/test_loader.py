"""The base is really NF4, really frozen, and an evaluation does not change what training computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny
from torch import nn

from qlora import adapter, loader, nf4
from qlora.bnb import bnb
from qlora.cards import Card
from qlora.errors import HardwareError, ModelError

NF4 = np.array([
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1,
])  # fmt: skip


def load(recipe, cpu):
    return loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False)


def test_every_linear_but_the_head_is_four_bits_and_nothing_trains(make_recipe, cpu):
    base = load(make_recipe(), cpu)
    linears = {n: m for n, m in base.model.named_modules() if isinstance(m, nn.Linear)}
    packed = {n for n, m in linears.items() if isinstance(m, bnb.nn.Linear4bit)}
    assert set(linears) - packed == {"lm_head"}
    assert len(packed) == 14 == base.facts["quantized_linears"]
    assert not any(p.requires_grad for p in base.model.parameters())
    assert all(m.weight.quant_state.nested for n, m in linears.items() if n in packed)


def test_a_quantized_layer_computes_what_the_papers_sixteen_values_say(make_recipe, cpu, tiny):
    """An NF4 round trip written from the paper (blocks of 64, absmax) against the loaded layer."""
    recipe = make_recipe(quant__double_quant=False)
    layer = load(recipe, cpu).model.model.layers[0].mlp.down_proj
    from safetensors.torch import load_file

    weight = load_file(tiny / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].numpy()
    blocks = weight.reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = NF4[np.abs(blocks[..., None] / scale[..., None] - NF4).argmin(-1)]
    expected = (nearest * scale).reshape(weight.shape)
    with torch.no_grad():
        got = layer(torch.eye(weight.shape[1])).T.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def gradients(recipe, cpu, *, evaluate: bool, packing: bool = False) -> dict[str, torch.Tensor]:
    model = adapter.attach(load(recipe, cpu).model, recipe)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.manual_seed(parameter.numel())
            parameter.data.normal_(std=0.02)
    if packing:
        for _, module in nf4.linears(model):
            module.support_avx512bf16_for_cpu = True
    tokens = torch.arange(5, 45).view(2, 20)
    if evaluate:
        model.eval()
        with torch.no_grad():
            model(tokens)
            model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_bit_equal_with_and_without_an_evaluation_in_between(make_recipe, cpu, dtype):
    recipe = make_recipe(quant__compute_dtype=dtype)
    plain = gradients(recipe, cpu, evaluate=False)
    after_eval = gradients(recipe, cpu, evaluate=True)
    assert plain.keys() == after_eval.keys() and len(plain) == 28
    for name in plain:
        assert torch.equal(plain[name], after_eval[name]), name


@pytest.mark.skipif(
    not bnb.nn.modules.has_avx512bf16(), reason="only AVX512-BF16 CPUs repack in place"
)
def test_the_library_alone_corrupts_gradients_after_an_evaluation(make_recipe, cpu):
    """The control: if this fails, bitsandbytes was mended and the workaround can go."""
    recipe = make_recipe(quant__compute_dtype="bfloat16")
    plain = gradients(recipe, cpu, evaluate=False)
    with pytest.warns(UserWarning):
        broken = gradients(recipe, cpu, evaluate=True, packing=True)
    assert any(not torch.equal(plain[name], broken[name]) for name in plain)


def test_a_prequantized_checkpoint_loads_to_the_same_logits_with_this_cards_dtype(
    make_recipe, cpu, tmp_path, tiny
):
    first = load(make_recipe(quant__compute_dtype="bfloat16"), cpu)
    folder = tmp_path / "prequantized"
    first.model.save_pretrained(folder)
    again = load(make_recipe(model__name=str(folder)), cpu)
    assert again.facts["prequantized"]
    assert {m.compute_dtype for _, m in nf4.linears(again.model)} == {torch.float32}
    reference = load(make_recipe(model__name=str(folder), quant__compute_dtype="bfloat16"), cpu)
    tokens = torch.arange(1, 20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(reference.model(tokens).logits, first.model(tokens).logits)


def test_a_checkpoint_quantized_by_another_method_is_refused(make_recipe, cpu, tmp_path, tiny):
    folder = save_tiny(tmp_path / "gptq")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"quantized as 'gptq'.*16-bit original"):
        load(make_recipe(model__name=str(folder)), cpu)


def test_mixture_of_experts_weights_that_stay_sixteen_bit_are_refused_with_their_size(
    make_recipe, cpu, tmp_path
):
    folder = save_tiny(tmp_path / "moe", "mixtral", num_local_experts=2)
    with pytest.raises(ModelError, match=r"keeps these weights in 16 bits: .*Experts.*MiB.*dense"):
        load(make_recipe(model__name=str(folder)), cpu)


def test_plain_lora_keeps_the_base_in_full_precision(make_recipe, cpu):
    base = load(make_recipe(quant__quant_type="none"), cpu)
    assert base.facts["quantized_linears"] == 0
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_the_compute_dtype_is_the_one_asked_for(make_recipe, cpu):
    base = load(make_recipe(quant__compute_dtype="bfloat16"), cpu)
    assert base.model.lm_head.weight.dtype == torch.bfloat16
    assert {m.compute_dtype for _, m in nf4.linears(base.model)} == {torch.bfloat16}
    assert load(make_recipe(), cpu).model.lm_head.weight.dtype == torch.float32


def test_weights_that_are_not_finite_are_refused_by_name(make_recipe, cpu, tmp_path):
    from safetensors.torch import load_file, save_file

    bad = {"model.norm.weight": "nan", "model.layers.1.self_attn.q_proj.weight": "inf"}
    for target, value in bad.items():  # a NaN among 64 packed weights is quantized to a number
        folder = save_tiny(tmp_path / target)
        tensors = load_file(folder / "model.safetensors")
        tensors[target].view(-1)[3] = float(value)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ModelError, match=rf"{target} of the base holds values that are not finite"
        ):
            load(make_recipe(model__name=str(folder)), cpu)


def test_pickled_weights_are_not_opened(make_recipe, cpu, tmp_path):
    folder = save_tiny(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no safetensors weights.*save_pretrained"):
        load(make_recipe(model__name=str(folder)), cpu)


def test_a_repository_that_wants_to_run_its_own_code_is_refused(make_recipe, cpu, tmp_path):
    folder = save_tiny(tmp_path / "remote")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ModelError, match="never run here"):
        load(make_recipe(model__name=str(folder)), cpu)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 250, "num_attention_heads": 3}, r"\(250\) is not a multiple of .* \(3\)"),
        ({"hidden_size": "many"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0, "head_dim": None}, "modulo by zero"),
    ],
    ids=str,
)
def test_a_configuration_that_no_model_can_have_is_refused_in_words(
    make_recipe, tmp_path, changes, said
):
    folder = save_tiny(tmp_path / "odd")
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ModelError, match=rf"its config.json is refused: .*{said}.*Correct that"):
        loader.read_config(make_recipe(model__name=str(folder)))


def test_a_folder_that_is_no_model_says_what_it_holds(make_recipe, cpu, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(ModelError, match=r"no config.json in it \(found: todo.txt\)"):
        load(make_recipe(model__name=str(tmp_path / "notes")), cpu)


def test_a_hub_model_that_cannot_be_reached_is_named_at_once(make_recipe, cpu):
    with pytest.raises(ModelError, match=r"'nobody/nothing-7b'.*not a folder here.*HF_HUB_OFFLINE"):
        loader.read_config(make_recipe(model__name="nobody/nothing-7b"))


def test_flash_attention_is_refused_where_it_cannot_run(make_recipe, cpu):
    with pytest.raises(HardwareError, match=r"flash_attn.*Write 'auto' or 'sdpa'"):
        load(make_recipe(model__attn_implementation="flash_attention_2"), cpu)


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_is_sdpa_unless_the_architecture_cannot(
    make_recipe, cpu, tmp_path, kind, attention
):
    folder = save_tiny(tmp_path / kind, kind)
    assert load(make_recipe(model__name=str(folder)), cpu).facts["attention"] == attention


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3"])
def test_the_families_load_and_train_a_step(make_recipe, cpu, tmp_path, kind):
    recipe = make_recipe(model__name=str(save_tiny(tmp_path / kind, kind)))
    model = adapter.attach(load(recipe, cpu).model, recipe)
    tokens = torch.arange(5, 25).view(1, -1)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    grads = [p.grad.abs().sum() for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == (8 if kind == "phi3" else 14)
    assert all(grad > 0 for grad in grads)


def test_widths_that_this_machines_kernel_computes_wrongly_are_refused(make_recipe, cpu, tmp_path):
    wrong = nf4.error(48, torch.device("cpu")) > nf4.MAX_ERROR
    folder = save_tiny(tmp_path / "narrow", intermediate_size=48)
    recipe = make_recipe(model__name=str(folder))
    if wrong:
        with pytest.raises(HardwareError, match=r"layers of 48 inputs wrongly.*multiples of 64"):
            load(recipe, cpu)
    else:  # this CPU's kernel is right for every width
        assert load(recipe, cpu).facts["quantized_linears"] == 14


def test_nf4_loses_what_the_paper_says(cpu):
    assert nf4.error(256, torch.device("cpu")) == pytest.approx(0.0085, abs=0.001)


def test_bf16_on_a_card_without_it_is_refused_before_loading(make_recipe, tiny):
    t4 = Card("Tesla T4", "cuda", 2**34, 2**34, (7, 5))
    recipe = make_recipe(quant__compute_dtype="bfloat16")
    with pytest.raises(HardwareError, match="T4"):
        loader.load_base(recipe, t4, loader.read_config(recipe), bars=False)


def test_loading_a_file_path_names_the_folder_it_expected(make_recipe, cpu, tmp_path):
    with pytest.raises(ModelError, match="a folder written by save_pretrained"):
        load(make_recipe(model__name=str(Path(__file__).resolve())), cpu)
