"""SDPA for cards older than Ampere: the numbers of SDPA, without asking PyTorch to share key heads."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from conftest import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from qlora import loader
from qlora.attention import BOUNDED, WITHOUT_GQA, sdpa_on
from qlora.cards import Card
from qlora.errors import ModelError
from qlora.loader import BaseConfig
from qlora.packing import prove

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 8  # shorter than the rows, so that it is felt
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
    "smollm3": {},
}
ROWS = [[5 + (7 * i + 3 * j * j) % 900 for j in range(24)] for i in range(3)]
T4 = Card("Tesla T4", "cuda", 2**34, 2**34, (7, 5))
every_family = pytest.mark.parametrize("kind", FAMILIES)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A family's model of four query heads over two key heads, under both implementations."""
    sdpa_on(T4)

    @cache
    def saved(kind):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        if kind != "phi3":
            heads["head_dim"] = 32
        folder = tmp_path_factory.mktemp(kind)
        return save_tiny(folder, kind, initializer_range=0.2, **heads, **FAMILIES[kind])

    @cache
    def load(kind, attention):
        return AutoModelForCausalLM.from_pretrained(
            saved(kind), attn_implementation=attention, dtype=torch.float32
        ).eval()

    return load


@pytest.fixture
def calls(monkeypatch):
    """Every call of scaled_dot_product_attention: (heads of query and key, its keyword arguments)."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        assert key.shape[1] == value.shape[1]
        seen.append((query.shape[1], key.shape[1], options))
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def passes():
    """What a model is given: bare, padded on either side, and packed."""
    ids = torch.tensor(ROWS[:2])
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    positions = torch.tensor([[*range(10), *range(14)], [*range(20), *range(4)]])
    return {
        "bare": {"input_ids": ids},
        "padded right": {"input_ids": ids, "attention_mask": mask},
        "padded left": {"input_ids": ids, "attention_mask": mask.flip(1)},
        "packed": {"input_ids": ids, "position_ids": positions, "use_cache": False},
    }


@every_family
def test_logits_and_gradients_are_those_of_sdpa(load, kind):
    for inputs in passes().values():
        found = []
        for attention in ("sdpa", WITHOUT_GQA):
            model = load(kind, attention)
            seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            logits = model(**inputs).logits[seen]
            model.zero_grad()
            logits.float().logsumexp(-1).sum().backward()
            grads = [p.grad for n, p in model.named_parameters() if ".self_attn." in n]
            assert len(grads) >= 4
            found.append([logits.detach(), *grads])
        for expected, ours in zip(*found, strict=True):
            assert float(expected.abs().max()) > 0
            assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@every_family
def test_no_pass_asks_for_shared_heads_while_sdpa_does(load, calls, kind):
    for inputs in passes().values():
        calls.clear()
        with torch.no_grad():
            load(kind, WITHOUT_GQA)(**inputs)
        assert len(calls) == 2  # layers
        assert all(heads == keys == 4 for heads, keys, _ in calls)
        assert not any(options.get("enable_gqa") for *_, options in calls)
    calls.clear()
    with torch.no_grad():  # otherwise the above would say nothing
        load("llama", "sdpa")(**passes()["bare"])
    assert [(heads, keys, options["enable_gqa"]) for heads, keys, options in calls] == [
        (4, 2, True)
    ] * 2


@every_family
def test_packed_rows_are_proven_to_be_blind_to_each_other(load, kind):
    proof = prove(load(kind, WITHOUT_GQA), ROWS)
    assert proof.holds and proof.leak == 0.0


@every_family
def test_generation_with_a_cache_goes_on_as_sdpa_does_and_as_the_whole_row_would(load, calls, kind):
    inputs = passes()["padded left"]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = load(kind, "sdpa").generate(**inputs, **settings)
    calls.clear()
    found = load(kind, WITHOUT_GQA).generate(**inputs, **settings)
    assert torch.equal(found, expected) and found.shape == (2, 36)
    assert all(heads == keys for heads, keys, _ in calls) and len(calls) == 2 * 12
    assert not any(options.get("enable_gqa") for *_, options in calls)
    whole = torch.cat([inputs["attention_mask"], torch.ones(2, 11, dtype=torch.long)], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = load(kind, WITHOUT_GQA)(
            found[:, :-1], attention_mask=whole, position_ids=positions, use_cache=False
        ).logits
    assert torch.equal(logits[:, -12:].argmax(-1), found[:, -12:])


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 0), WITHOUT_GQA), ((7, 0), WITHOUT_GQA), ((7, 5), WITHOUT_GQA), ((8, 0), "sdpa"),
     ((8, 6), "sdpa"), ((12, 0), "sdpa"), (None, "sdpa")],
)  # fmt: skip
def test_the_capability_decides(capability, expected):
    assert sdpa_on(Card("a card", "cuda", 2**34, 2**34, capability)) == expected


def test_nothing_is_registered_before_a_card_needs_it_and_sdpa_stays_what_it_was():
    code = """
import json
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
import qlora.loader
from qlora.attention import sdpa_on
from qlora.cards import Card
def known():
    both = AttentionInterface(), AttentionMaskInterface()
    assert both[0]["sdpa"] is sdpa_attention_forward and both[1]["sdpa"] is sdpa_mask
    return [sorted(one.valid_keys()) for one in both]
before = known()
sdpa_on(Card("RTX 3060", "cuda", 1, 1, (8, 6)))
assert known() == before
sdpa_on(Card("T4", "cuda", 1, 1, (7, 5)))
once = known()
sdpa_on(Card("T4", "cuda", 1, 1, (7, 5)))
assert known() == once
print(json.dumps([sorted(set(now) - set(was)) for was, now in zip(before, once)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[WITHOUT_GQA]] * 2


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [("llama", "auto", WITHOUT_GQA), ("llama", "sdpa", WITHOUT_GQA), ("llama", "eager", "eager"),
     ("gemma2", "auto", "eager"), ("falcon", "auto", "sdpa")],
)  # fmt: skip
def test_the_loader_takes_it_where_it_would_have_taken_sdpa(make_recipe, kind, asked, expected):
    recipe = make_recipe(model__attn_implementation=asked, train__kernels="off")
    config = BaseConfig(AutoConfig.for_model(kind), {}, None)
    assert loader.attention_on(T4, recipe, config) == expected
    newer = Card("RTX 3060", "cuda", 2**34, 2**34, (8, 6))
    assert loader.attention_on(newer, recipe, config) == (
        "sdpa" if expected == WITHOUT_GQA else expected
    )


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [("llama", "auto", BOUNDED), ("qwen3", "sdpa", BOUNDED), ("llama", "eager", "eager"),
     ("gemma2", "auto", "eager"), ("falcon", "auto", "sdpa"), ("granite", "auto", WITHOUT_GQA)],
)  # fmt: skip
def test_fused_layers_on_a_card_are_told_the_bounds_of_packed_rows(
    make_recipe, kind, asked, expected
):
    recipe = make_recipe(model__attn_implementation=asked)
    config = BaseConfig(AutoConfig.for_model(kind), {}, None)
    assert loader.attention_on(T4, recipe, config) == expected
    on_a_cpu = Card("CPU", "cpu", 2**34, 2**34)
    assert loader.attention_on(on_a_cpu, recipe, config) in ("sdpa", "eager")


def test_a_model_without_sdpa_is_refused_under_this_name_too(make_recipe, tmp_path):
    recipe = make_recipe(
        model__name=str(save_tiny(tmp_path / "gemma2", "gemma2")), model__attn_implementation="sdpa"
    )
    card = Card("T4 on a CPU", "cpu", 2**34, 2**34, (7, 5))
    with pytest.raises(ModelError, match="does not support an attention implementation"):
        loader.load_base(recipe, card, loader.read_config(recipe), bars=False)
