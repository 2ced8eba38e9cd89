"""Packed rows are blind to each other, none is lost or doubled, and the layout changes no number."""

from __future__ import annotations

import math
from functools import cache
from itertools import chain, pairwise

import pytest
import torch
from conftest import save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qlora.errors import ModelError
from qlora.packing import Collator, Layout, Proof, best_fit, choose, prove
from qlora.rendering import IGNORED

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOW = 8  # shorter than the rows, so that it is felt
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW},
}
CASES = [
    (kind, attention)
    for kind in FAMILIES
    for attention in ("eager", "sdpa")
    if (kind, attention) != ("gemma2", "sdpa")  # its soft cap needs eager
]
ROWS = [[5 + (7 * i + 3 * j * j) % 900 for j in range(length)] for i, length in
        enumerate((24, 31, 9, 2, 17))]  # fmt: skip


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Models with weights so large that what one row sees of another cannot hide in a tolerance."""

    @cache
    def saved(kind):
        folder = tmp_path_factory.mktemp(kind)
        return save_tiny(folder, kind, initializer_range=0.2, **FAMILIES[kind])

    @cache
    def load(kind, attention="sdpa", **changes):
        return AutoModelForCausalLM.from_pretrained(
            saved(kind), attn_implementation=attention, dtype=torch.float32, **changes
        ).eval()

    return load


def examples(rows):
    return [
        {"input_ids": ids, "labels": [IGNORED, *ids[1:]], "row": i} for i, ids in enumerate(rows)
    ]


def collated(layout, rows, pad=0, multiple=1):
    return Collator(layout, pad, multiple)(examples(rows))


def run(model, tensors):
    given = {key: value for key, value in tensors.items() if key != "labels"}
    with torch.no_grad():
        return model(**given, use_cache=False).logits


def logits_by_row(model, layout, rows, multiple=1):
    """The logits of every row, out of the layout's batches."""
    batch, found = collated(layout, rows, multiple=multiple), {}
    for tensors, numbers in zip(batch["micro_batches"], batch["rows"], strict=True):
        logits, numbers = run(model, tensors), list(numbers)
        for line in range(len(logits)):
            at = 0
            while numbers and at + len(rows[numbers[0]]) <= logits.shape[1]:
                ids = rows[numbers[0]]
                if tensors["input_ids"][line, at : at + len(ids)].tolist() != ids:
                    break
                found[numbers.pop(0)] = logits[line, at : at + len(ids)]
                at += len(ids)
    assert sorted(found) == list(range(len(rows)))
    return [found[i] for i in range(len(rows))]


# --- on models


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_packed_logits_are_those_of_the_rows_alone(load, kind, attention):
    model = load(kind, attention)
    alone = [run(model, {"input_ids": torch.tensor([ids])})[0] for ids in ROWS]
    scale = max(float(one.abs().max()) for one in alone)
    assert scale > 0.1
    for layout, multiple in (
        (Layout(64, 2, packed=True), 1),
        (Layout(128, 1, packed=True), 64),
        (Layout(64, 3, packed=False), 8),
    ):
        found = logits_by_row(model, layout, ROWS, multiple)
        for packed, expected in zip(found, alone, strict=True):
            assert float((packed - expected).abs().max()) / scale < 1e-4


@pytest.mark.parametrize("kind", [k for k, changes in FAMILIES.items() if changes])
def test_the_windows_of_these_models_are_felt(load, kind):
    """Otherwise the test above would say nothing about sliding windows."""
    windowed = load(kind, "eager")
    whole = load(kind, "eager", sliding_window=512)
    ids = {"input_ids": torch.tensor([ROWS[1]])}
    near, far = run(windowed, ids)[0], run(whole, ids)[0]
    assert torch.allclose(near[: WINDOW - 1], far[: WINDOW - 1], atol=1e-5)
    assert float((near[WINDOW:] - far[WINDOW:]).abs().max()) > 1e-3


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_the_proof_holds_where_rows_are_kept_apart_and_leaves_the_model_as_it_was(
    load, kind, attention
):
    model = load(kind, attention)
    model.train()
    random = torch.get_rng_state()
    proof = prove(model, ROWS)
    assert proof.holds and proof.leak == 0.0 and proof.difference < 1e-4 == proof.tolerance
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), random)


class Leaking(torch.nn.Module):
    """A model whose rows see each other, in one of the ways in which that happens."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, input_ids, position_ids, use_cache):
        if self.how == "mask":  # a mask of ones switches the bounds off
            mask = torch.ones_like(input_ids)
            return self.inner(
                input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
            )
        if self.how == "positions":
            return self.inner(input_ids, use_cache=False)
        return self.inner(input_ids, position_ids=position_ids, use_cache=True)


@pytest.mark.parametrize("how", ["mask", "positions", "cache"])
@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_the_proof_fails_where_rows_see_each_other(load, kind, attention, how):
    model = Leaking(load(kind, attention), how)
    proof = prove(model, ROWS)
    assert not proof.holds and proof.leak > 1e-3
    assert "logits move by" in str(proof) and "when a neighbour changes (must be 0)" in str(proof)


@pytest.mark.parametrize("first", [[7, 7, 7, 7], [7, 9, 8, 9], [0, 0], [7, 9]])
def test_the_proof_also_fails_where_a_row_reads_the_same_both_ways(load, first):
    """The neighbour has to be exchanged for something else, whatever it was."""
    model = Leaking(load("llama"), "mask")
    assert prove(model, [first, [7, 8, 9, 10], [7, 7, 7]]).leak > 1e-3


def test_a_proof_with_numbers_that_are_none_does_not_hold():
    nan = float("nan")
    assert not Proof(nan, 0.0, 1e-4).holds and not Proof(0.0, nan, 1e-4).holds
    assert not Proof(1e-12, 0.0, 1e-4).holds and not Proof(0.0, 2e-4, 1e-4).holds
    assert Proof(0.0, 1e-4, 1e-4).holds


# --- the choice


def test_packing_is_chosen_where_it_is_proven_and_refused_where_it_is_not(load, make_recipe):
    sound = load("llama")
    leaking = Leaking(load("llama"), "mask")

    def chosen(model, packing, attention="sdpa"):
        recipe = make_recipe(data__packing=packing, train__per_device_train_batch_size=3)
        return choose(recipe, model, ROWS, attention)

    for packing in (True, "auto"):
        layout, note = chosen(sound, packing)
        assert layout == Layout(128, 3, packed=True)
        assert note.startswith(
            "on, proven on this model: logits move by 0 when a neighbour changes"
        )
    for model in (sound, leaking, None):  # nothing is tried where nothing is asked
        layout, note = chosen(model, False)
        assert layout == Layout(128, 3, packed=False)
        assert note == "off; rows of like length are padded together"
    layout, note = chosen(leaking, "auto")
    assert layout == Layout(128, 3, packed=False)
    assert note.startswith("off: not proven on this model: logits move by")
    assert note.endswith("; rows of like length are padded together")
    with pytest.raises(ModelError) as refused:
        chosen(leaking, True)
    said = str(refused.value)
    assert said.startswith("data.packing is true, but with this model's sdpa attention packed rows")
    assert "must be 0" in said
    assert said.endswith("Write data.packing: auto or false, or another model.attn_implementation.")


def test_a_single_row_is_enough_to_try_packing_on(load, make_recipe):
    layout, _ = choose(make_recipe(data__packing="auto"), load("llama"), ROWS[:1], "sdpa")
    assert layout.packed


# --- the layout


def test_padded_rows_are_sorted_by_length_and_each_is_there_once():
    lengths = [3, 9, 4, 9, 5, 1, 7]
    batches = Layout(16, 3, packed=False).micro_batches(lengths)
    assert batches == [[[1], [3], [6]], [[4], [2], [0]], [[5]]]


def test_packed_sequences_come_fullest_first():
    batches = Layout(10, 2, packed=True).micro_batches([3, 9, 4, 2, 5])
    assert batches == [[[4, 2], [1]], [[0, 3]]] or batches == [[[1], [4, 2]], [[0, 3]]]


@pytest.mark.parametrize(
    ("layout", "multiple", "expected"),
    [
        # two steps: rows of 6, 4 and 3; then one of 10. Sequences hold 10.
        # packed: [6, 4], [3] in one pass of 2x10; [10] in one of 1x10. 23 of 30; computed 20 + 10.
        (Layout(10, 2, True), 1, {"fill": 0.7667, "useful": 0.7667, "passes": 1.0, "rows": 2.0}),
        # padded: [6], [4] as 2x6 and [3]; [10]. Room 4 x 10; computed 12 + 3 + 10.
        (Layout(10, 2, False), 1, {"fill": 0.575, "useful": 0.92, "passes": 1.5, "rows": 2.0}),
        # the same in multiples of 8: 2x8, 1x8, 1x16.
        (Layout(10, 2, False), 8, {"fill": 0.575, "useful": 0.575, "passes": 1.5, "rows": 2.0}),
        # flat: both sequences in one of 13, rounded up to 16; 10, rounded up to 16.
        (Layout(10, 2, True, True), 8, {"fill": 0.7667, "useful": 0.7188, "passes": 1.0, "rows": 2.0}),
    ],
)  # fmt: skip
def test_the_fill_is_what_one_counts_by_hand(layout, multiple, expected):
    assert layout.fill([[6, 4, 3], [10]], multiple) == expected


def test_the_fill_of_nothing_is_nothing():
    nothing = {"fill": 0.0, "useful": 0.0, "passes": 0.0, "rows": 0.0}
    assert Layout(10, 2, packed=True).fill([]) == nothing


# --- any rows at all

ANY_LENGTHS = st.lists(st.integers(1, 32), min_size=1, max_size=40)


@given(lengths=ANY_LENGTHS, room=st.integers(0, 40))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_best_fit_loses_and_doubles_no_row_and_fills_no_sequence_beyond_its_end(lengths, room):
    capacity = max(lengths) + room
    bins = best_fit(lengths, capacity)
    assert sorted(chain.from_iterable(bins)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= capacity for one in bins)
    slow = []  # best-fit decreasing, as one would write it down
    for length in sorted(lengths, reverse=True):
        fitting = [one for one in slow if sum(one) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            slow.append([length])
    assert sorted(sum(one) for one in slow) == sorted(sum(lengths[i] for i in one) for one in bins)


@given(capacity=st.integers(2, 64), data=st.data())
@settings(max_examples=500, deadline=None, derandomize=True)
def test_best_fit_needs_at_most_eleven_ninths_of_the_fewest_sequences_and_one(capacity, data):
    """Rows that were cut out of full sequences: the fewest are known, for no token is left over."""
    lengths = []
    cuts = st.lists(st.integers(1, capacity - 1), unique=True, max_size=5)
    fewest = data.draw(st.integers(1, 12))
    for _ in range(fewest):
        edges = [0, *sorted(data.draw(cuts)), capacity]
        lengths += [b - a for a, b in pairwise(edges)]
    lengths = data.draw(st.permutations(lengths))
    assert fewest == math.ceil(sum(lengths) / capacity)
    assert fewest <= len(best_fit(lengths, capacity)) <= 11 / 9 * fewest + 1


@given(
    lengths=st.lists(st.integers(2, 24), min_size=1, max_size=12),
    room=st.integers(0, 24),
    sequences=st.integers(1, 4),
    multiple=st.sampled_from([1, 8]),
    how=st.sampled_from(["padded", "packed", "flat"]),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_the_collator_loses_and_doubles_no_token(lengths, room, sequences, multiple, how):
    token, rows = iter(range(1, 10_000)), []
    for i, length in enumerate(lengths):
        ids = [next(token) for _ in range(length)]  # every token of the step is another one
        labels = [token if (token + i) % 3 else IGNORED for token in ids]
        rows.append({"input_ids": ids, "labels": labels, "row": 100 + i})
    layout = Layout(max(lengths) + room, sequences, packed=how != "padded", flat=how == "flat")
    step = Collator(layout, 0, multiple)(rows)
    assert sorted(chain.from_iterable(step["rows"])) == [row["row"] for row in rows]
    learned = [t for row in rows for t in row["labels"][1:] if t != IGNORED]
    assert step["supervised"] == len(learned)
    assert sum(step["tokens"]) == sum(lengths)
    seen, targets = [], []
    for tensors, numbers, count in zip(
        step["micro_batches"], step["rows"], step["tokens"], strict=True
    ):
        ids, labels = tensors["input_ids"], tensors["labels"]
        assert ids.shape[1] % multiple == 0
        assert how == "flat" or len(ids) <= sequences
        assert how == "flat" or ids.shape[1] <= math.ceil(layout.max_length / multiple) * multiple
        assert int((ids != 0).sum()) == count
        assert bool((labels[ids == 0] == IGNORED).all())
        assert bool(((labels == ids) | (labels == IGNORED)).all())
        seen += ids[ids != 0].tolist()
        targets += labels[labels != IGNORED].tolist()
        firsts = {rows[number - 100]["input_ids"][0] for number in numbers}
        for line in range(len(ids)):
            for at, one in enumerate(ids[line].tolist()):
                if one in firsts:
                    assert labels[line, at] == IGNORED
        if how == "padded":
            assert "position_ids" not in tensors
            assert torch.equal(tensors["attention_mask"], (ids != 0).long())
            continue
        assert "attention_mask" not in tensors
        for line in range(len(ids)):
            expected, padded = 0, False
            for one, position in zip(
                ids[line].tolist(), tensors["position_ids"][line], strict=True
            ):
                begins = one in firsts or (one == 0 and not padded)
                padded = one == 0
                expected = 0 if begins else expected + 1
                assert int(position) == expected
    assert sorted(seen) == [t for row in rows for t in row["input_ids"]]
    assert sorted(targets) == learned


@pytest.mark.parametrize("packed", [True, False])
def test_padding_with_the_end_of_text_masks_no_end_of_text_that_is_learned(packed):
    eos = 2
    rows = [[5, 6, eos], [7, 8, 9, 10, eos]]
    (tensors,) = collated(Layout(16, 2, packed), rows, pad=eos, multiple=16)["micro_batches"]
    learned = tensors["labels"] == eos
    assert int(learned.sum()) == 2 < int((tensors["input_ids"] == eos).sum())
    assert int((tensors["labels"] != IGNORED).sum()) == 6
