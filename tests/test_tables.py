"""An embedding table that stays with the host, and a model that computes elsewhere.

The device elsewhere is ``meta``, which has no contents and, like a card, is not the host.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora import adapter, generation, loader, memory, packing, trainer
from qlora.cards import Card
from qlora.errors import RecipeError
from qlora.generation import Sampling
from qlora.kernels.head import PackedHead
from qlora.offload import EmbeddingOnHost, leave_embedding_with_host
from qlora.shape import Shape

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 19).view(2, 8)


def base(kind: str = "llama", **changes: Any) -> Any:
    settings = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 128, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(settings | changes))
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_outputs_names_and_contents_stay_what_they_were(kind: str) -> None:
    """Gemma scales its embedding: Gemma 2 after the table, Gemma 3 within its module."""
    model = base(kind)
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    table = model.get_input_embeddings().weight
    leave_embedding_with_host(model)
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.get_input_embeddings().weight.data_ptr() == table.data_ptr()


def test_a_gradient_that_reaches_the_rows_passes_through() -> None:
    model = base()
    leave_embedding_with_host(model)
    table = model.get_input_embeddings().weight.requires_grad_()
    model(input_ids=IDS).logits.sum().backward()
    assert set(table.grad.abs().sum(1).nonzero().flatten().tolist()) == set(IDS.flatten().tolist())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("change", ["dtype", "device", "both", "half"])
def test_wherever_the_model_goes_the_table_stays(change: str, kind: str) -> None:
    model = base(kind)
    leave_embedding_with_host(model)
    table = model.get_input_embeddings()
    kept = table.weight.clone()
    moves = {
        "dtype": lambda: model.to(torch.bfloat16), "device": lambda: model.to("meta"),
        "both": lambda: model.to("meta", torch.float16), "half": lambda: model.half(),
    }  # fmt: skip
    moves[change]()
    assert torch.equal(table.weight, kept) and table.weight.dtype == torch.float32
    assert {b.device.type for b in table.buffers()} <= {"cpu"}
    others = {p.device.type for p in model.parameters() if p is not table.weight}
    assert others == ({"cpu"} if change in ("dtype", "half") else {"meta"})


def test_the_rows_go_to_where_the_ids_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base()
    leave_embedding_with_host(model)
    module = model.get_input_embeddings()
    sent: list[Any] = []

    class Rows:
        def pin_memory(self) -> Rows:
            sent.append("pinned")
            return self

        def to(self, device: Any, *, non_blocking: bool) -> str:
            sent.append((device, non_blocking))
            return "rows on the card"

    class Ids:
        device = torch.device("cuda", 0)

        def to(self, device: str) -> str:
            sent.append(device)
            return "ids on the host"

    monkeypatch.setattr(
        nn.Embedding, "forward", lambda self, ids: sent.append((self, ids)) or Rows()
    )
    assert module.forward(Ids()) == "rows on the card"
    # Pinned, or the copy would not be one that runs beside the arithmetic.
    card = torch.device("cuda", 0)
    assert sent == ["cpu", (module, "ids on the host"), "pinned", (card, True)]


def test_a_table_that_the_head_needs_is_not_spared() -> None:
    with pytest.raises(AssertionError, match="the head needs the table"):
        leave_embedding_with_host(base(tie_word_embeddings=True))


# --- who asks a model where it is


@pytest.fixture
def split() -> Any:
    """A table with the host and the rest on another device, as on a card."""
    model = base()
    leave_embedding_with_host(model)
    model.to("meta")
    return model


def test_a_model_is_where_it_computes(split: Any) -> None:
    assert split.device.type == "meta"  # or generate() would take its inputs to the host
    split.set_output_embeddings(PackedHead(split.get_output_embeddings()))
    assert split.device.type == "meta"
    assert base().device.type == "cpu"


def test_questions_are_asked_where_the_model_computes(
    split: Any, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    asked: list[str] = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append(input_ids.device.type)
        return torch.zeros(len(input_ids), 9, dtype=torch.long)

    monkeypatch.setattr(split, "generate", generate)
    tok = AutoTokenizer.from_pretrained(tiny)
    generation.answer_all(split, tok, [[5, 6], [7]], Sampling(max_new_tokens=2), 2)
    generation.stream(split, tok, [5, 6], Sampling(max_new_tokens=2), lambda piece: None)
    assert asked == ["meta", "meta"]


def test_packing_is_tried_where_the_model_computes(
    split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def on(device: torch.device, batch: Any) -> Any:
        asked.append(device.type)
        raise InterruptedError

    monkeypatch.setattr(packing, "on", on)
    with pytest.raises(InterruptedError):
        packing.prove(split, [[5, 6, 7]] * 3)
    assert asked == ["meta"]


# --- a run


def test_a_run_is_bit_identical_to_one_whose_table_is_on_the_card(
    make_recipe: Any, cpu: Any
) -> None:
    console, found = Console(quiet=True), []
    for away in (False, True):
        recipe = make_recipe(train__embedding_offload=away, eval__generate=2)
        run = trainer.train(recipe, console=console)
        lines = [{k: v for k, v in line.items() if "loss" in k} for line in run.metrics()]
        weights = (run.adapter / "adapter_model.safetensors").read_bytes()
        found.append((weights, lines, run.result["after"]))
    assert found[0] == found[1]
    model = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    assert isinstance(model.get_input_embeddings().__dict__["forward"], EmbeddingOnHost)


def test_both_tables_may_be_spared_at_once(make_recipe: Any, cpu: Any) -> None:
    both = {"train__embedding_offload": True, "quant__head": "8bit"}
    digests = []
    for changes in ({"quant__head": "8bit"}, both):
        recipe = make_recipe(**changes, train__max_steps=2)
        run = trainer.train(recipe, console=Console(quiet=True))
        assert run.result["base_unchanged"]
        digests.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert digests[0] == digests[1]


def test_a_table_of_which_rows_train_cannot_stay_with_the_host(make_recipe: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"train\.embedding_offload .*lora\.train_new_tokens.*Leave one of the two"
    ):  # fmt: skip
        make_recipe(train__embedding_offload=True, lora__train_new_tokens=True)


def test_on_a_card_the_plan_moves_the_tables_bytes_to_the_host(make_recipe: Any) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=32768, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    shape = Shape.from_config(config.to_dict())
    for kind, moved in (("cuda", 2 * shape.vocab * shape.hidden), ("cpu", 0)):
        card = Card("a card", kind, 2**36, 2**36, (8, 0) if kind == "cuda" else None)
        plans = [
            memory.predict(
                make_recipe(quant__compute_dtype="bfloat16", train__embedding_offload=away),
                shape, card,
            )
            for away in (False, True)
        ]  # fmt: skip
        assert plans[0].terms["unquantized"] - plans[1].terms["unquantized"] == moved
        assert plans[1].host_bytes - plans[0].host_bytes == moved


def test_the_adapter_of_a_spared_base_is_saved_as_any_other(
    make_recipe: Any, cpu: Any, tmp_path: Any
) -> None:
    saved = []
    for away in (False, True):
        recipe = make_recipe(
            model__name=str(save_tiny(tmp_path / "m")), train__embedding_offload=away
        )
        loaded = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False)
        model = adapter.attach(loaded.model, recipe)
        adapter.save(model, tmp_path / f"{away}", "owner/base")
        saved.append([(p.name, p.read_bytes()) for p in sorted((tmp_path / f"{away}").iterdir())])
    assert saved[0] == saved[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_on_a_card_it_computes_the_same_and_takes_the_table_away() -> None:
    found, held = [], []
    for away in (False, True):
        before = torch.cuda.memory_allocated()
        model = base("gemma3_text", vocab_size=8192)
        if away:
            leave_embedding_with_host(model)
        model.to("cuda")
        held.append(torch.cuda.memory_allocated() - before)
        with torch.no_grad():
            found.append(model(input_ids=IDS.cuda()).logits.cpu())
        del model
    assert torch.equal(*found)
    assert held[0] - held[1] >= 8192 * 64 * 4
