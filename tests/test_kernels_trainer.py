"""A run whose layers are fused: what it says, what it learns, and what it does where nothing is proven."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from safetensors.torch import load_file

from qlora import adapter, loader, packing, rehearsal, rundir, sft, trainer
from qlora.attention import BOUNDED, bounded
from qlora.errors import DoesNotFit, Interrupted, RecipeError
from qlora.kernels import attached, ops
from qlora.kernels.layer import FusedLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def run_it(recipe: Any, **settings: Any) -> tuple[Any, str]:
    """A run, and what it said."""
    said = io.StringIO()
    run = trainer.train(recipe, console=Console(file=said, width=400), **settings)
    return run, said.getvalue()


def facts(run: Any) -> dict[str, Any]:
    return json.loads((run.dir / "environment.json").read_text())["base"]  # type: ignore[no-any-return]


def adapter_bytes(run: Any) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()  # type: ignore[no-any-return]


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


def line_of(said: str, label: str) -> str:
    """What was said under a label; once."""
    (found,) = [line for line in said.splitlines() if line.split()[:1] == [label]]
    return found.split(maxsplit=1)[1].strip()


@pytest.fixture
def fused_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The level of every layer that is passed by the fused one."""
    levels: list[int] = []
    real = FusedLayer.forward

    def forward(ctx: Any, parts: Any, *rest: Any) -> Any:
        levels.append(parts.level)
        return real(ctx, parts, *rest)

    monkeypatch.setattr(FusedLayer, "forward", staticmethod(forward))
    return levels


# --- on, and off where they do not apply


def test_a_run_says_and_records_that_its_kernels_are_proven(
    make_recipe: Any, fused_passes: list[int]
) -> None:
    run, said = run_it(make_recipe(train__max_steps=2))
    told = line_of(said, "kernels")
    prefix = "on, proven on this model: "
    assert told.startswith(prefix) and told.removeprefix(prefix) == facts(run)["kernels"]
    assert "of the libraries' own" in told
    assert fused_passes[2:] == [1] * 2 * 2  # after the proof: two layers, two steps
    run, said = run_it(make_recipe(train__max_steps=1, train__kernels="off"))
    assert facts(run)["kernels"] == "off" and " kernels " not in said
    assert fused_passes[6:] == []


def test_a_family_that_they_do_not_know_trains_by_the_libraries(
    make_recipe: Any, tmp_path: Any, fused_passes: list[int]
) -> None:
    folder = str(save_tiny(tmp_path / "granite", "granite"))
    run, said = run_it(make_recipe(model__name=folder, train__max_steps=2))
    assert line_of(said, "kernels") == "off: 'granite' is no family that they know"
    assert (
        facts(run)["kernels"] == "off: 'granite' is no family that they know" and fused_passes == []
    )
    assert run.result["alive"]["largest_b"] > 0


# --- where the proof fails


def wrong(*args: Any, **options: Any) -> Any:
    return REAL(*args, **options) * 1.5


def raising(*args: Any, **options: Any) -> Any:
    raise RuntimeError("no kernel image is available\nand more")


REAL = ops.rms_norm_backward
BROKEN = {
    "wrong": (wrong, "off: they compute something else on this machine (layers): a relative error of"),
    "raising": (
        raising, "off: they fail on this machine: RuntimeError: no kernel image is available"
    ),
}  # fmt: skip
AS_WRITTEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"train__activation_checkpointing": True, "train__mlp_tile": 64},
    "levels": {"train__levels": [1, 0, 0, 0, 1]},
    "padded": {"data__packing": False, "lora__lora_dropout": 0.1},
    "fitted": {"train__fit": "auto", "train__gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [("plain", "raising"), ("recomputed", "wrong"), ("levels", "raising"), ("padded", "wrong"),
     ("fitted", "wrong")],
)  # fmt: skip
def test_what_is_not_proven_trains_by_the_libraries_to_the_same_adapter(
    name: str, how: str, make_recipe: Any, monkeypatch: pytest.MonkeyPatch, fused_passes: list[int]
) -> None:
    settings = {"train__max_steps": 2, **AS_WRITTEN[name]}
    broken, words = BROKEN[how]
    with monkeypatch.context() as patch:
        patch.setattr(ops, "rms_norm_backward", broken)
        run, said = run_it(make_recipe(**settings))
    told = line_of(said, "kernels")
    assert told.startswith(words) and told.endswith("; the libraries' own layers train")
    assert "and more" not in told
    assert facts(run)["kernels"] == told.removesuffix("; the libraries' own layers train")
    # The proof's alone: two levels of one kind of layer, and in tiles the pass that gives it its inputs.
    assert len(fused_passes) <= (4 if "train__mlp_tile" in settings else 2)
    off = {k: v for k, v in settings.items() if k not in ("train__levels", "train__mlp_tile")}
    expected, _ = run_it(make_recipe(**off, train__kernels="off"))
    assert adapter_bytes(run) == adapter_bytes(expected) and losses(run) == losses(expected)
    assert run.result["before"] == expected.result["before"]
    stored, plan = (json.loads((r.dir / "plan.json").read_text()) for r in (run, expected))
    assert stored["terms"] == plan["terms"]  # planned anew, by the libraries' layers
    if name == "fitted":
        assert stored["chosen"] == plan["chosen"] and "every layer keeps all it needs" in said
        # The last one tells the bytes that are free now.
        assert stored["reasons"][:-1] == plan["reasons"][:-1]
        assert stored["chosen"]["levels"] is None


def test_an_8_bit_head_without_proven_kernels_is_refused(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(ops, "rms_norm_backward", raising)
    with pytest.raises(RecipeError) as refused:
        run_it(make_recipe(quant__head="8bit"))
    assert str(refused.value) == (
        "quant.head is 8bit, which the loss of qlora.kernels alone can read, and the kernels are off: they "
        "fail on this machine: RuntimeError: no kernel image is available. Write quant.head=16bit."
    )
    assert not list((tmp_path / "runs").glob("*/*"))


def test_where_only_fused_layers_would_have_fitted_the_run_is_refused(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    real = rehearsal.fit

    def fit(recipe: Any, *rest: Any) -> Any:
        if recipe.train.kernels == "off":
            raise DoesNotFit("This recipe needs more.")
        return real(recipe, *rest)

    monkeypatch.setattr(rehearsal, "fit", fit)
    monkeypatch.setattr(ops, "rms_norm_backward", wrong)
    with pytest.raises(DoesNotFit, match="needs more"):
        run_it(make_recipe())
    assert not list((tmp_path / "runs").glob("*/*"))


def test_packed_rows_are_given_back_to_sdpa_with_the_layers(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, where fused layers are loaded with an attention of their own."""
    asked: list[Any] = []

    def prove(model: Any, modules: Any, head: Any, batch: Any) -> Any:
        asked.append(batch)
        raise attached.NotFused("they need a card")  # and so do the kernels that take bounds

    with monkeypatch.context() as patch:
        patch.setattr(loader, "attention_on", lambda *_: bounded())
        patch.setattr(attached, "prove", prove)
        run, said = run_it(make_recipe(train__max_steps=2))
    assert asked[0]["cu_seq_lens_q"].tolist() == [0, 32, 64, 96]
    assert f"{BOUNDED} attention" in line_of(said, "base") and facts(run)["attention"] == "sdpa"
    expected, _ = run_it(make_recipe(train__max_steps=2, train__kernels="off"))
    assert adapter_bytes(run) == adapter_bytes(expected)


# --- the same losses


SAME: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"data__packing": False},
    "recomputed": {"train__activation_checkpointing": True},
    "one layer recomputed": {"train__activation_checkpointing": 1, "data__packing": False},
    "levels": {"train__levels": [0, 1, 0, 1, 0]},
    "tiled": {"train__activation_checkpointing": True, "train__mlp_tile": 64},
    "accumulated": {
        "train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 4,
        "train__activation_offload": True, "train__activation_checkpointing": True,
    },
    "one matrix": {"lora__target_modules": ["q_proj"], "lora__use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_losses_are_those_without_kernels(name: str, make_recipe: Any) -> None:
    settings = {"train__max_steps": 3, **SAME[name]}
    fused, said = run_it(make_recipe(**settings))
    assert line_of(said, "kernels").startswith("on, ")
    off = {k: v for k, v in settings.items() if k not in ("train__levels", "train__mlp_tile")}
    plain, _ = run_it(make_recipe(**off, train__kernels="off"))
    assert len(losses(fused)) == 3 and losses(fused)[-1] < losses(fused)[0]
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
    norms = [
        [line["grad_norm"] for line in run.metrics() if "loss" in line] for run in (fused, plain)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_which_layer_is_at_which_level_is_what_the_recipe_says(
    make_recipe: Any, fused_passes: list[int]
) -> None:
    run_it(make_recipe(train__max_steps=1, train__levels=[0, 1, 0, 1, 0]))
    assert fused_passes == [1, 2, 4, 5, 4, 2]  # the proof's, then the higher level first


# --- resumed


def test_a_resumed_run_is_bit_identical_with_dropout_and_layers_recomputed_in_tiles(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(
        lora__lora_dropout=0.1, train__activation_checkpointing=True, train__mlp_tile=64,
        data__packing=False,
    )  # fmt: skip
    whole, _ = run_it(recipe)
    original = sft.RowTrainer.compute_loss

    def interrupted(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sft.RowTrainer, "compute_loss", interrupted)
        with pytest.raises(Interrupted):
            run_it(recipe)
    resumed, said = run_it(recipe, resume=rundir.open_run(recipe.run.dir).dir)
    assert line_of(said, "kernels").startswith("on, ")
    assert adapter_bytes(resumed) == adapter_bytes(whole) and losses(resumed) == losses(whole)


# --- evaluation


def test_the_same_adapter_is_evaluated_to_the_same_bits(make_recipe: Any, cpu: Any) -> None:
    """The layers' own code runs in evaluation: hidden states and answers do not depend on the kernels."""
    on, off = make_recipe(eval__generate=2), make_recipe(eval__generate=2, train__kernels="off")
    fused, _ = run_it(on)
    plain, _ = run_it(off)
    before = [run.result["before"] for run in (fused, plain)]
    # The loss takes supervised rows alone to the head, and so sums in another order.
    assert before[0].pop("held_out_loss") == pytest.approx(before[1].pop("held_out_loss"), rel=1e-6)
    assert before[0] == before[1]

    base = loader.load_base(on, cpu, loader.read_config(on), bars=False)
    model = adapter.attach(base.model, on)
    saved = load_file(fused.adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.copy_(saved[name.replace(".default", "")])
    batch = packing.sample([list(range(5, 30)), list(range(40, 60))], "sdpa", torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        attached.attach(model, cpu, levels=[1, 5])
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
