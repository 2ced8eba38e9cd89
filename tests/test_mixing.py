"""Adapters as what they add: summed exactly, or chosen entry by entry as the papers say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.combining import deltas, mixing
from qlora.errors import CheckpointError, RecipeError

CPU = torch.device("cpu")
LINEAR = "base_model.model.model.layers.0.mlp.up_proj"
pytestmark = pytest.mark.usefixtures("one_thread")


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(r: int, seed: int, out: int = 10, inside: int = 7):
    return some(r, inside, seed=seed), some(out, r, seed=seed + 100)


def a_saved_adapter(folder, r=2, alpha=8.0, rslora=False, seed=0, linears=(LINEAR,), **changes):
    folder.mkdir()
    tensors = {}
    for number, linear in enumerate(linears):
        a, b = factors(r, seed + 10 * number)
        tensors |= {f"{linear}.lora_A.weight": a, f"{linear}.lora_B.weight": b}
    config = {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "use_rslora": rslora,
        "target_modules": ["up_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- linear and svd


def test_linear_is_the_weighted_sum_of_the_deltas_of_different_ranks():
    parts, weights = [factors(2, 1), factors(5, 2), factors(1, 3)], [0.7, -0.2, 1.5]
    mixed = mixing.add_up(parts, weights)
    whole = sum(
        w * b.double().numpy() @ a.double().numpy()
        for (a, b), w in zip(parts, weights, strict=True)
    )
    np.testing.assert_allclose((mixed.b @ mixed.a).numpy(), whole, atol=1e-5)
    assert mixed.a.shape == (8, 7)
    assert mixed.lost == 0 == mixed.error
    assert mixed.whole == pytest.approx((whole**2).sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_sum_cut_down_is_the_nearest_of_its_rank_and_says_what_it_lost(rank):
    parts, weights = [factors(3, 1), factors(3, 2)], [0.5, 0.5]
    mixed = mixing.add_up(parts, weights, rank)
    whole = sum(w * (b @ a).double().numpy() for (a, b), w in zip(parts, weights, strict=True))
    u, s, vh = np.linalg.svd(whole)
    nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
    found = (mixed.b @ mixed.a).numpy()
    np.testing.assert_allclose(found, nearest, atol=1e-4)
    error = np.linalg.norm(found - whole) / np.linalg.norm(whole)
    assert mixed.error == pytest.approx(error, abs=1e-5)


# --- ties and dare


def ties_of_the_paper(taus, weights, density):
    """Algorithm 1 of arXiv:2306.01708, an entry at a time, with weights in the two means."""
    trimmed = []
    for tau in taus:
        order = sorted(range(tau.size), key=lambda i: -abs(tau.flat[i]))
        kept = set(order[: max(1, round(density * tau.size))])
        trimmed.append(np.array([x if i in kept else 0 for i, x in enumerate(tau.flat)]))
    merged = []
    for values in zip(*trimmed, strict=True):
        mass = sum(w * v for w, v in zip(weights, values, strict=True))
        agreeing = [
            (w, v) for w, v in zip(weights, values, strict=True) if v != 0 and (v > 0) == (mass > 0)
        ]
        total = sum(w for w, _ in agreeing)
        merged.append(sum(w * v for w, v in agreeing) / total if total else 0.0)
    return np.array(merged).reshape(taus[0].shape)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (3.0, 1.0, 0.5)])
def test_ties_is_the_algorithm_of_its_paper(weights, density):
    taus = [some(9, 11, seed=seed) * (seed + 1) for seed in range(3)]
    found = mixing.ties(taus, weights, density).numpy()
    wanted = ties_of_the_paper([tau.double().numpy() for tau in taus], weights, density)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (wanted == 0).any() == (density < 1)


def test_dare_drops_by_chance_and_scales_the_rest_up_before_signs_are_elected():
    taus, weights = [some(8, 5, seed=1), some(8, 5, seed=2)], [0.5, 0.5]
    found = mixing.dare_ties(taus, weights, 0.25, torch.Generator().manual_seed(7))
    again = torch.Generator().manual_seed(7)
    kept = [tau * (torch.rand(tau.shape, generator=again) < 0.25) / 0.25 for tau in taus]
    wanted = ties_of_the_paper([tau.double().numpy() for tau in kept], weights, 1.0)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    other = mixing.dare_ties(taus, weights, 0.25, torch.Generator().manual_seed(8))
    assert not torch.equal(found, other)


def test_what_dare_keeps_of_one_adapter_is_in_the_mean_the_adapter():
    tau, generator = some(4, 4), torch.Generator().manual_seed(0)
    draws = [mixing.dare_ties([tau], [1.0], 0.5, generator) for _ in range(4000)]
    assert torch.stack(draws).mean(0).sub(tau).abs().max() < 0.1 * tau.abs().max()


@pytest.mark.parametrize("method", mixing.METHODS)
def test_an_adapter_combined_with_itself_in_halves_is_itself(method):
    one = factors(3, 5)
    density = 1.0 if method in mixing.DENSITIES else None
    asked = mixing.ask([3, 3], method=method, density=density)
    mixed = mixing.mix(asked, [one, one], asked.weights, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.b @ mixed.a, one[1] @ one[0], atol=1e-4, rtol=1e-4)


def test_of_ties_only_the_ratio_of_the_weights_counts_and_a_negative_one_turns_an_adapter():
    taus = [some(6, 6, seed=1), some(6, 6, seed=2)]
    halves = mixing.ties(taus, [0.5, 0.25], 0.5)
    torch.testing.assert_close(mixing.ties(taus, [2.0, 1.0], 0.5), halves)
    turned = mixing.ties([taus[0], -taus[1]], [0.5, -0.25], 0.5)
    torch.testing.assert_close(turned, halves)


def test_scale_multiplies_the_whole_of_every_method():
    parts = [factors(2, 1), factors(2, 2)]
    for method in mixing.METHODS:
        whole = [
            mixing.mix(asked, parts, asked.weights, torch.Generator().manual_seed(0))
            for asked in (mixing.ask([2, 2], method=method, scale=scale) for scale in (1.0, 3.0))
        ]
        once, thrice = (mixed.b @ mixed.a for mixed in whole)
        torch.testing.assert_close(thrice, 3 * once, atol=1e-4, rtol=1e-4)


def test_a_large_matrix_is_cut_down_nearly_as_well_as_by_a_whole_decomposition(monkeypatch):
    decay = torch.linspace(0, -4, 64).exp()
    delta = torch.linalg.qr(some(90, 64, seed=1)).Q * decay @ torch.linalg.qr(some(80, 64)).Q.T
    best = mixing.factored(delta, 8, torch.Generator())
    assert best.error == pytest.approx(float(decay[8:].norm() / decay.norm()), rel=1e-4)
    monkeypatch.setattr(mixing, "EXACT_SVD", 32)
    near = mixing.factored(delta, 8, torch.Generator().manual_seed(0))
    lost = (delta - near.b @ near.a).norm() / delta.norm()
    assert near.error == pytest.approx(float(lost), rel=1e-4)
    assert best.error <= near.error * 1.0001 <= best.error * 1.01


# --- what is asked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "mean"}, "--method is 'mean'. Write one of linear, ties, dare_ties, svd."),
        ({"weights": [1.0]}, "--weights has 1 numbers for 2 runs"),
        ({"weights": [1.0, math.nan]}, "--weights has nan"),
        ({"weights": [math.inf, 1.0]}, "--weights has inf"),
        ({"weights": [1.0, 0.0]}, "to leave a run out, do not name it"),
        ({"scale": 0.0}, "--scale is 0."),
        ({"density": 0.5}, "which keeps every entry"),
        ({"method": "ties", "density": 0.0}, "--density is 0. Write a share above 0, at most 1."),
        ({"method": "ties", "density": 1.5}, "--density is 1.5"),
        ({"method": "dare_ties", "density": math.nan}, "--density is nan"),
        ({"method": "svd", "rank": 0}, "--rank is 0. Write a rank from 1 to 1,024."),
        ({"rank": 2000}, "--rank is 2000"),
    ],
)
def test_a_setting_without_sense_is_refused_with_what_to_write(asked, said):
    with pytest.raises(RecipeError, match=None) as caught:
        mixing.ask([4, 8], **asked)
    assert said in str(caught.value)


def test_what_is_left_open_is_filled_in_for_each_method():
    assert mixing.ask([4, 8]) == mixing.Asked("linear", (0.5, 0.5), None, 12, 1.0, 42)
    assert mixing.ask([4, 8], rank=99).rank == 12
    assert mixing.ask([4, 8], method="svd").rank == 8
    assert mixing.ask([4, 8], method="ties").density == 0.2
    assert mixing.ask([4, 8], method="dare_ties", rank=99).rank == 99
    with pytest.raises(RecipeError, match="add up to 1,200, and an adapter may have 1,024"):
        mixing.ask([600, 600])
    assert mixing.ask([600, 600], method="svd").rank == 600


# --- adapters on disk


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_scaling_of_an_adapter_is_part_of_what_it_adds(tmp_path, rslora, scaling):
    part = deltas.read(a_saved_adapter(tmp_path / "a", r=4, alpha=8.0, rslora=rslora), "a")
    a, b = factors(4, 0)
    torch.testing.assert_close(part.delta(LINEAR, CPU), scaling * (b @ a))
    assert part.shapes == {LINEAR: (10, 7)}


def test_cosine_and_opposite_signs_are_those_of_the_full_matrices(tmp_path, monkeypatch):
    other = LINEAR.replace("up", "down")
    one = deltas.read(a_saved_adapter(tmp_path / "a", linears=(LINEAR, other)), "a")
    two = deltas.read(a_saved_adapter(tmp_path / "b", r=3, seed=3, alpha=1.0), "b")
    shared = [part.delta(LINEAR, CPU).double().numpy() for part in (one, two)]
    more = one.delta(other, CPU).double().numpy()
    lengths = math.sqrt(((shared[0] ** 2).sum() + (more**2).sum()) * (shared[1] ** 2).sum())
    found = deltas.agreement(one, two, CPU)
    assert found.cosine == pytest.approx((shared[0] * shared[1]).sum() / lengths)
    assert found.conflicts == (np.sign(shared[0]) != np.sign(shared[1])).mean()
    strong = np.ones(shared[0].shape, bool)
    for delta in shared:
        strong &= np.abs(delta) >= np.sort(np.abs(delta), axis=None)[-round(0.2 * delta.size)]
    wanted = (np.sign(shared[0]) != np.sign(shared[1]))[strong].mean()
    assert strong.any()
    assert found.strong == pytest.approx(wanted)
    itself = deltas.agreement(one, one, CPU)
    assert (round(itself.cosine, 6), itself.conflicts, itself.strong) == (1.0, 0.0, 0.0)
    monkeypatch.setattr(deltas, "SAMPLED", 35)  # of 70 entries: every second row
    half = deltas.agreement(one, two, CPU).conflicts
    assert half == (np.sign(shared[0]) != np.sign(shared[1]))[::2].mean()


def test_an_adapter_that_is_no_plain_lora_is_refused_by_what_makes_it_another(tmp_path):
    folder = a_saved_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match="made with use_dora, and only plain LoRA"):
        deltas.read(folder, "dora")
    folder = a_saved_adapter(tmp_path / "ia3", peft_type="IA3")
    with pytest.raises(CheckpointError, match="made with peft_type IA3"):
        deltas.read(folder, "ia3")


def test_a_damaged_adapter_is_refused_by_what_is_wrong_with_it(tmp_path):
    def with_tensors(name, change):
        folder = a_saved_adapter(tmp_path / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    cases = {
        "nan": (
            lambda t: t[f"{LINEAR}.lora_B.weight"].fill_(math.nan),
            "lora_B.weight is not finite",
        ),
        "half": (lambda t: t.pop(f"{LINEAR}.lora_B.weight"), "a lora_A or lora_B is missing"),
        "more": (lambda t: t.update(x=torch.ones(1)), "x is no LoRA matrix"),
        "rank": (
            lambda t: t.update({f"{LINEAR}.lora_A.weight": torch.ones(3, 7)}),
            "has rank 3 and 2, and adapter_config.json says 2",
        ),
    }
    for name, (change, said) in cases.items():
        with pytest.raises(CheckpointError) as caught:
            deltas.read(with_tensors(name, change), name)
        assert said in str(caught.value), name
    torn = a_saved_adapter(tmp_path / "torn")
    file = torn / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="the adapter is damaged"):
        deltas.read(torn, "torn")
