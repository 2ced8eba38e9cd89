"""What every test stands on: no network, no trackers, and small models made here.

Models are random, of width 64 or a multiple (bitsandbytes computes other widths wrongly on some CPUs),
and speak through the embedded base's tokenizer.
"""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = REPOSITORY / "qlora" / "embedded" / "base"
REAL_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_trackers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real data sets and real pretrained weights, where a checkout has them beside it."""
    if not REAL_DATA.is_dir():
        pytest.skip("needs the folder of real data sets beside the checkout")
    return REAL_DATA


def save_tiny(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A random two-layer model of a family, saved as safetensors with the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 2048,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if kind == "phi3":
        del settings["head_dim"]
    config = AutoConfig.for_model(kind, **(settings | changes))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, width 64."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"{a} and {b} make {a + b}."}
    for a in range(1, 9)
    for b in range(1, 6)
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Forty prompt/completion rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def make_recipe(tiny: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """A recipe on the tiny model and the forty rows; keyword arguments are dotted overrides."""
    from qlora.recipe import recipe_from

    def make(**changes: Any) -> Any:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny)},
            "data": {"train": str(rows_file), "max_length": 128, "held_out_fraction": 0.1},
            "lora": {"r": 4},
            "train": {
                "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3, "warmup_steps": 0,
                "activation_checkpointing": False,
            },
            "run": {"dir": str(tmp_path / "runs"), "name": "tiny"},
            "eval": {},
        }  # fmt: skip
        for address, value in changes.items():
            section, _, key = address.partition("__")
            values.setdefault(section, {})[key] = value
        return recipe_from(values)

    return make


@pytest.fixture(scope="session")
def cpu() -> Any:
    """The CPU as a card, so that a test means the same on a machine with a GPU."""
    from qlora.cards import Card

    return Card("CPU", "cpu", 2**34, 2**34)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that a second thread would only be waited for."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def light() -> Iterator[None]:
    """No garbage of other modules is looked through at every start of a training."""
    import gc

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would take is not asked of these tests."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
