"""A base assembled a tensor at a time is the one that from_pretrained loads, to the bit."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora import loader, weights
from qlora.errors import ModelError


def everything(model: Any) -> dict[str, Any]:
    """Each tensor and number that decides what a model computes, by name."""
    found: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = tensor.detach()
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            name += "+"
            found |= {f"{name}absmax": state.absmax, f"{name}code": state.code}
            found |= {f"{name}dtype": state.dtype, f"{name}blocksize": state.blocksize}
            found |= {f"{name}shape": state.shape and tuple(state.shape)}
            found[f"{name}offset"] = state.offset
            state = state.state2
    return found


def require_equal(ours: Any, theirs: Any) -> None:
    mine, other = everything(ours), everything(theirs)
    assert mine.keys() == other.keys() and len(mine) > 10
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert mine[name].dtype == value.dtype and mine[name].device == value.device, name
            assert torch.equal(mine[name], value), name
        else:
            assert mine[name] == value, name


def plain(folder: Path, dtype: torch.dtype = torch.float32, *, quantize: bool = True) -> Any:
    """What the library's own way gives."""
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": "cpu"},
        **({"quantization_config": asked} if quantize else {}),
    )  # fmt: skip


def split(folder: Path, to: Path) -> Path:
    """The same checkpoint in several files, in 16 bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(to, max_shard_size="100KB")
    assert len(list(to.glob("*.safetensors"))) >= 3
    return to


def load(recipe: Any, cpu: Any) -> loader.Base:
    return loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen3", {}), ("gemma3_text", {}),
        ("gemma3_text", {"tie_word_embeddings": True}), ("phi3", {}), ("mistral", {}),
    ],
    ids=str,
)  # fmt: skip
def test_the_weights_are_those_of_from_pretrained(
    kind: str, changes: dict[str, Any], dtype: str, make_recipe, cpu, tmp_path
) -> None:
    folder = split(save_tiny(tmp_path / "one", kind, **changes), tmp_path / "many")
    base = load(make_recipe(model__name=str(folder), quant__compute_dtype=dtype), cpu)
    reference = plain(folder, getattr(torch, dtype))
    require_equal(base.model, reference)
    assert type(base.model) is type(reference)
    assert base.model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert base.model.name_or_path == reference.name_or_path == str(folder)
    if changes:
        assert base.model.lm_head.weight is base.model.get_input_embeddings().weight
    ours, theirs = base.model.config.to_dict(), reference.config.to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} == set()


def test_an_already_four_bit_checkpoint_is_that_of_from_pretrained(
    make_recipe, cpu, tmp_path, tiny
) -> None:
    plain(tiny).save_pretrained(tmp_path / "packed")
    base = load(make_recipe(model__name=str(tmp_path / "packed")), cpu)
    require_equal(base.model, plain(tmp_path / "packed", quantize=False))
    require_equal(base.model, plain(tiny))


def test_an_unquantized_base_is_that_of_from_pretrained(make_recipe, cpu, tiny) -> None:
    require_equal(
        load(make_recipe(quant__quant_type="none"), cpu).model, plain(tiny, quantize=False)
    )


def test_of_a_larger_model_the_part_that_writes_is_loaded(make_recipe, cpu, tmp_path) -> None:
    """A Qwen3.5 checkpoint is configured as text and images; its causal model is the text's."""
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_5", text_config=text)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    config.save_pretrained(tmp_path / "text")
    reference = plain(tmp_path / "text")
    read = AutoConfig.from_pretrained(tmp_path / "text")
    files = weights.files(str(tmp_path / "text"), None)
    ours = weights.assemble(
        read, files, "cpu", torch.float32, "sdpa", reference.hf_quantizer.quantization_config
    )
    assert type(ours).__name__ == "Qwen3_5ForCausalLM" == type(reference).__name__
    require_equal(ours, reference)


def test_what_ends_an_answer_comes_with_the_checkpoint(make_recipe, cpu, tmp_path) -> None:
    folder = save_tiny(tmp_path / "stops")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    model = load(make_recipe(model__name=str(folder)), cpu).model
    assert model.generation_config.eos_token_id == [7, 9]
    (folder / "generation_config.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": 11}))
    model = load(make_recipe(model__name=str(folder)), cpu).model
    assert (
        model.generation_config.eos_token_id == plain(folder).generation_config.eos_token_id == 11
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the maps of Linux")
def test_no_checkpoint_file_stays_mapped_when_its_tensors_are_gone(tmp_path) -> None:
    """from_pretrained keeps every file mapped while it loads: the host then holds all 16 bits."""
    folder = split(save_tiny(tmp_path / "one"), tmp_path / "many")

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(folder))

    named = weights.tensors(weights.files(str(folder), None))
    assert len(named) == 21 and mapped() == 0
    one = named["model.norm.weight"][...]
    assert mapped() >= 1 and one.shape == (64,)
    del one
    gc.collect()
    assert mapped() == 0


def test_a_stored_tensor_says_its_dtype_unread(tmp_path) -> None:
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    stored = weights.tensors([tmp_path / "a.safetensors"])["a"]
    assert stored.get_dtype() == "BF16"
    assert torch.equal(stored[...], load_file(tmp_path / "a.safetensors")["a"])


def test_a_torn_file_is_named(make_recipe, cpu, tmp_path) -> None:
    folder = split(save_tiny(tmp_path / "one"), tmp_path / "many")
    torn = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(torn, torn.stat().st_size // 2)
    with pytest.raises(SafetensorError, match=torn.name):
        weights.tensors([torn])
    with pytest.raises(ModelError, match=rf"cannot be loaded: {torn.name} is damaged"):
        load(make_recipe(model__name=str(folder)), cpu)


def test_a_file_that_the_index_names_and_nobody_copied_is_named(make_recipe, cpu, tmp_path) -> None:
    folder = split(save_tiny(tmp_path / "one"), tmp_path / "many")
    gone = sorted(folder.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"{gone.name} is missing from it.*Fetch it again"):
        load(make_recipe(model__name=str(folder)), cpu)


DOWN = "model.layers.1.mlp.down_proj.weight"


def changed(folder: Path, edit: Any) -> Path:
    """A checkpoint after something was done to its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize(
    "names",
    [
        ["model.norm.weight"], ["model.embed_tokens.weight"], ["lm_head.weight"], [DOWN],
        [DOWN, "lm_head.weight", "model.norm.weight"],
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_are_missing_are_named_and_never_made_up(
    make_recipe, cpu, tmp_path, names, quant_type
) -> None:
    folder = changed(save_tiny(tmp_path / "m"), lambda t: [t.pop(name) for name in names])
    with pytest.raises(ModelError) as refused:
        load(make_recipe(model__name=str(folder), quant__quant_type=quant_type), cpu)
    said = str(refused.value)
    count = f"{len(names)} of its tensors {'is' if len(names) == 1 else 'are'} missing"
    assert f"model.name is {str(folder)!r}, but {count} from its files" in said
    assert f"random numbers: {', '.join(sorted(names))}. Fetch it again" in said


def test_of_many_missing_tensors_the_first_few_are_named(make_recipe, cpu, tmp_path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors.pop(name)

    folder = changed(save_tiny(tmp_path / "m"), edit)
    with pytest.raises(ModelError, match=r"9 of its tensors are .*, and 5 more\. Fetch") as refused:
        load(make_recipe(model__name=str(folder)), cpu)
    assert str(refused.value).count("model.layers.1.") == 4


def test_a_head_that_is_the_embedding_and_what_no_model_has_a_place_for_are_no_loss(
    make_recipe, cpu, tmp_path
) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["score.weight"] = torch.ones(2, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    reference = plain(folder)
    require_equal(load(make_recipe(model__name=str(changed(folder, edit))), cpu).model, reference)


def test_rotary_frequencies_follow_from_the_configuration_and_cannot_be_missing() -> None:
    weights._require_all({"model.layers.0.self_attn.rotary_emb.inv_freq"}, set())
    with pytest.raises(weights.Incomplete, match=r"1 of .*: model\.norm\.weight$"):
        weights._require_all({"model.rotary_emb.inv_freq", "model.norm.weight"}, set())


@pytest.mark.parametrize("shape", [(64, 256), (128, 64), (8192,)])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_a_matrix_of_another_shape_is_refused_with_both(
    make_recipe, cpu, tmp_path, shape, quant_type
) -> None:
    """from_pretrained packs a matrix of any shape and says nothing."""
    folder = changed(save_tiny(tmp_path / "m"), lambda t: t.update({DOWN: torch.ones(shape)}))
    with pytest.raises(ModelError) as refused:
        load(make_recipe(model__name=str(folder), quant__quant_type=quant_type), cpu)
    said = str(refused.value)
    assert f"but {DOWN} is {shape} in its files where the model has (64, 128). Fetch" in said


def test_a_norm_of_another_length_is_refused_with_both(make_recipe, cpu, tmp_path) -> None:
    name = "model.norm.weight"
    folder = changed(save_tiny(tmp_path / "m"), lambda t: t.update({name: torch.ones(65)}))
    with pytest.raises(ModelError, match=r"norm.weight is \(65,\) in .* model has \(64,\)"):
        load(make_recipe(model__name=str(folder)), cpu)


PARTS = [
    "absmax",
    "nested_absmax",
    "quant_map",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
]
TORN = {
    **{part: ([part], "do not hold all parts of") for part in PARTS},
    "nested_absmax": (["nested_absmax"], "a part of it is missing"),
    "weight": ([""], "do not hold all parts of"),
    "everything but the weight": (PARTS, "its scales are missing"),
    "everything": (["", *PARTS], "1 of its tensors is missing"),
}


@pytest.mark.parametrize("what", TORN)
def test_a_packed_weight_without_one_of_its_parts_is_named(
    make_recipe, cpu, tmp_path, tiny, what
) -> None:
    parts, words = TORN[what]
    plain(tiny).save_pretrained(tmp_path / "packed")
    names = [f"{DOWN}.{part}".rstrip(".") for part in parts]
    folder = changed(tmp_path / "packed", lambda t: [t.pop(name) for name in names])
    with pytest.raises(ModelError) as refused:
        load(make_recipe(model__name=str(folder)), cpu)
    assert words in str(refused.value) and DOWN in str(refused.value)


@pytest.mark.parametrize(
    ("part", "keep"), [("", 0), ("", 4095), (".absmax", 0), (".absmax", 127), (".nested_absmax", 0)]
)
def test_a_packed_weight_that_is_too_short_is_named(
    make_recipe, cpu, tmp_path, tiny, part, keep
) -> None:
    """The kernel would read past its end."""
    plain(tiny).save_pretrained(tmp_path / "packed")
    name = DOWN + part
    whole = load_file(tmp_path / "packed" / "model.safetensors")[name]
    assert len(whole) > keep
    folder = changed(tmp_path / "packed", lambda t: t.update({name: whole[:keep].clone()}))
    with pytest.raises(ModelError, match=f"{DOWN} is packed, and a part of it is missing"):
        load(make_recipe(model__name=str(folder)), cpu)


def test_a_model_that_cannot_write_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no causal language model for ViTConfig"):
        weights.assemble(AutoConfig.for_model("vit"), [], "cpu", torch.float32, "sdpa")


def test_an_adapter_beside_the_weights_is_not_loaded_into_the_base(
    make_recipe, cpu, tmp_path, tiny
) -> None:
    folder = save_tiny(tmp_path / "beside")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    require_equal(load(make_recipe(model__name=str(folder)), cpu).model, plain(tiny))
