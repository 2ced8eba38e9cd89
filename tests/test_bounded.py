"""Rows that are packed by their bounds: what a pass is told, and that no pass goes without it.

The kernels that take bounds need a card. Here one stands in for them that takes the rows apart and
computes each alone, so that all around it is what runs on a card.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from qlora import attention, packing
from qlora.attention import BOUNDED, attend_within_bounds, bounded, mask_unless_packed
from qlora.errors import ModelError
from qlora.kernels.attention import Bounds, Scores, bounds_in, in_options
from qlora.packing import Collator, Layout
from qlora.rendering import IGNORED

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [[5 + (7 * i + 3 * j * j) % 900 for j in range(length)] for i, length in
        enumerate((24, 31, 9, 2, 17))]  # fmt: skip


class RowByRow:
    """In the place of a card's kernels: each row by itself, causally."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def forward(self, q: Any, k: Any, v: Any, scores: Scores) -> Any:
        assert scores.bounds is not None and scores.mask is None
        edges = scores.bounds.offsets.tolist()
        self.rows.append(edges)
        assert edges[0] == 0 and edges[-1] == q.shape[1] and len(q) == 1
        assert scores.bounds.longest == max(b - a for a, b in pairwise(edges))
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
        found = [
            functional.scaled_dot_product_attention(
                *(x[:, a:b].transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scores.scale
            ).transpose(1, 2)
            for a, b in pairwise(edges)
        ]
        return torch.cat(found, 1), ()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> RowByRow:
    made = RowByRow()
    monkeypatch.setattr(attention, "kernel_on", lambda *_: made)
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bounded")
    save_tiny(
        folder, initializer_range=0.2, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    return {
        name: AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=name, dtype=torch.float32
        ).eval()
        for name in ("sdpa", bounded())
    }


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits  # type: ignore[no-any-return]


def collated(layout: Layout, rows: list[list[int]], multiple: int = 1) -> dict[str, Any]:
    examples = [{"input_ids": ids, "labels": ids, "row": i} for i, ids in enumerate(rows)]
    (batch,) = Collator(layout, 0, multiple)(examples)["micro_batches"]
    return packing.for_model(batch)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


# --- passes through a model


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_packed_rows_come_to_the_kernel_by_their_bounds_and_compute_as_if_alone(
    multiple: int, models: Any, kernel: RowByRow
) -> None:
    layout = Layout(100, 1, packed=True, **packing.of(BOUNDED))
    batch = collated(layout, ROWS, multiple)
    found = logits(models[BOUNDED], batch)[0]
    edges = kernel.rows[0]
    assert len(kernel.rows) == 2 and kernel.rows[1] == edges  # both layers
    width = sum(map(len, ROWS))
    assert edges[len(ROWS)] == width  # then, if there is any, the padding as a row of its own
    assert edges[len(ROWS) + 1 :] == (
        [-(-width // multiple) * multiple] if width % multiple else []
    )
    ids = batch["input_ids"][0]
    for a, b in pairwise(edges[: len(ROWS) + 1]):
        assert close(found[a:b], logits(models["sdpa"], {"input_ids": ids[None, a:b]})[0])


def test_bounded_packing_is_proven_on_the_model_as_any_other(models: Any, kernel: RowByRow) -> None:
    proof = packing.prove(models[BOUNDED], ROWS, BOUNDED)
    assert proof.holds and len(kernel.rows) > 0


def test_a_kernel_that_ignores_the_bounds_is_found_out(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind(RowByRow):
        def forward(self, q: Any, k: Any, v: Any, scores: Scores) -> Any:
            whole = Bounds(torch.tensor([0, q.shape[1]]), q.shape[1])
            return super().forward(q, k, v, Scores(scores.scale, bounds=whole))

    monkeypatch.setattr(attention, "kernel_on", lambda *_: Blind())
    assert packing.prove(models[BOUNDED], ROWS, BOUNDED).leak > 1e-3


PADDED = {
    "right": [[1] * 12, [1] * 7 + [0] * 5],
    "left": [[1] * 12, [0] * 5 + [1] * 7],
    "none": None,
}


@pytest.mark.parametrize("pads", PADDED)
def test_what_is_not_packed_is_sdpas_to_the_bit(
    pads: str, models: Any, kernel: RowByRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []
    spy = lambda *a, **k: masks.append(sdpa_mask(*a, **k)) or masks[-1]  # noqa: E731
    monkeypatch.setattr(attention, "sdpa_mask", spy)
    batch = {"input_ids": torch.tensor([row[:12] for row in (ROWS[0], ROWS[1])])}
    if PADDED[pads] is not None:
        batch["attention_mask"] = torch.tensor(PADDED[pads])
    assert torch.equal(logits(models[BOUNDED], batch), logits(models["sdpa"], batch))
    assert kernel.rows == [] and len(masks) == 1
    assert masks[0] is None if pads == "none" else masks[0].shape == (2, 1, 12, 12)


def test_generation_is_sdpas(models: Any, kernel: RowByRow) -> None:
    ids = torch.tensor([ROWS[0][:9], [0, 0, *ROWS[1][:7]]])
    mask = (ids != 0).long()
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = [m.generate(input_ids=ids, attention_mask=mask, **asked) for m in models.values()]
    assert torch.equal(*found) and found[0].shape == (2, 15) and kernel.rows == []


def test_packed_rows_without_their_bounds_are_refused_in_words(models: Any) -> None:
    layout = Layout(100, 1, packed=True, flat=True)
    batch = collated(layout, ROWS)
    told = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids")}
    with pytest.raises(ModelError) as refused:
        logits(models[BOUNDED], told)
    assert str(refused.value) == (
        "packed rows came to attention without their bounds (cu_seq_lens_q, max_length_q). Pass what "
        "qlora.packing.Collator gives, or load the model with attn_implementation 'sdpa'."
    )


# --- its two functions by themselves


def asked_for(**changes: Any) -> dict[str, Any]:
    options = {
        "batch_size": 1, "q_length": 6, "kv_length": 6, "attention_mask": None,
        "allow_is_causal_skip": False, "device": torch.device("cpu"),
    }  # fmt: skip
    return options | changes


def test_the_empty_mask_is_for_packed_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_mask", lambda *_, **options: ("of SDPA", options))
    packed = mask_unless_packed(**asked_for())
    assert isinstance(packed, torch.Tensor) and packed.shape == (0,) and packed.dtype == torch.bool
    for changes in (
        {"attention_mask": torch.ones(1, 6)}, {"allow_is_causal_skip": True}, {"kv_length": 9},
    ):  # fmt: skip
        assert mask_unless_packed(**asked_for(**changes)) == ("of SDPA", asked_for(**changes))
    options = asked_for()
    del options["allow_is_causal_skip"]  # transformers' default allows it
    assert mask_unless_packed(**options) == ("of SDPA", options)


def test_scale_window_and_bounds_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(attention, "kernel_on", lambda *_: "the kernel")
    monkeypatch.setattr(
        attention, "attend_with", lambda kernel, q, k, v, scores: seen.append((kernel, scores)) or q
    )
    q, k = torch.zeros(1, 4, 6, 32), torch.zeros(1, 2, 6, 32)
    bounds = Bounds(torch.tensor([0, 4, 6], dtype=torch.int32), 4)
    assert bounds_in(in_options(bounds)) == bounds and bounds_in({}) is None
    given = {"scaling": 0.25, "sliding_window": 3, "dropout": 0.0, **in_options(bounds)}
    out, weights = attend_within_bounds(torch.nn.Module(), q, k, k, None, **given)
    assert out.shape == (1, 6, 4, 32) and weights is None
    assert seen[0] == ("the kernel", Scores(0.25, 3, None, bounds))
    attend_within_bounds(torch.nn.Module(), q, k, k, None, **in_options(bounds))
    assert seen[1] == ("the kernel", Scores(32**-0.5, None, None, bounds))


# --- what the collator says, counted in another way


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    room=st.integers(0, 12),
    sequences=st.integers(1, 3),
    multiple=st.sampled_from([1, 8]),
    how=st.sampled_from(["padded", "packed", "flat", BOUNDED]),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_supervised_places_and_bounds_are_right_in_every_layout(
    lengths: list[int], room: int, sequences: int, multiple: int, how: str, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    token, rows = iter(range(1, 10_000)), []
    for i, length in enumerate(lengths):
        ids = [next(token) for _ in range(length)]  # every token of the step is another one
        labels = [t if draw.random() < 0.6 else IGNORED for t in ids]
        rows.append({"input_ids": ids, "labels": labels, "row": i})
    flat = {"flat": True} if how == "flat" else packing.of(how)
    layout = Layout(max(lengths) + room, sequences, packed=how != "padded", **flat)
    step = Collator(layout, 0, multiple)(rows)
    after = {
        a: b for row in rows for a, b in zip(row["input_ids"], row["labels"][1:], strict=False)
    }
    found = []
    for batch, numbers in zip(step["micro_batches"], step["rows"], strict=True):
        ids, at = batch["input_ids"].flatten(), batch["supervised_at"]
        assert at.dtype == torch.int64 and at.tolist() == sorted(set(at.tolist()))
        for place in at.tolist():
            # The token there has a next one in its row, that one stands beside it, and it trains.
            assert after[int(ids[place])] == int(ids[place + 1]) != IGNORED
            assert int(batch["labels"].flatten()[place + 1]) == int(ids[place + 1])
            found.append(int(ids[place]))
        if not layout.flat:
            assert "cu_seq_lens_q" not in batch
            continue
        bounds = batch["cu_seq_lens_q"]
        assert bounds is batch["cu_seq_lens_k"] and bounds.dtype == torch.int32
        width = sum(lengths[n] for n in numbers)
        edges = np.cumsum([0, *(lengths[n] for n in numbers)]).tolist()
        padded = -(-width // multiple) * multiple
        assert bounds.tolist() == edges + ([padded] if padded > width else [])
        longest = int(bounds.diff().max())
        assert batch["max_length_q"] == batch["max_length_k"] == longest
        for number, (a, b) in zip(numbers, pairwise(edges), strict=True):
            assert ids[a:b].tolist() == rows[number]["input_ids"]
    expected = [a for a, b in after.items() if b != IGNORED]
    assert sorted(found) == expected and len(found) == step["supervised"]


def test_a_sample_is_laid_out_as_the_attention_wants_it() -> None:
    cpu = torch.device("cpu")
    plain = packing.sample(ROWS[:3], "sdpa", cpu)
    assert set(plain) == {"input_ids", "position_ids"}
    told = packing.sample(ROWS[:3], BOUNDED, cpu)
    assert told["cu_seq_lens_q"].tolist() == [0, 24, 55, 64] and told["max_length_q"] == 31
    assert torch.equal(told["input_ids"], plain["input_ids"]) and "labels" not in told
    long = packing.sample([list(range(1, 90))] * 2, BOUNDED, cpu)
    assert long["cu_seq_lens_q"].tolist() == [0, 32, 64]  # a short batch, however long the rows
