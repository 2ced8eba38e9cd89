"""What was merged is what was trained: proven, and what is not is caught and not kept."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny
from peft import PeftModel
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora import adapter, chat, cli, folded, loader, merging, rundir, shards, trained, trainer
from qlora.agreement import compare
from qlora.errors import CheckpointError, ExportError
from qlora.folded import Folded
from qlora.generation import Sampling
from qlora.recipe import load_recipe, recipe_from
from qlora.records import Turn
from qlora.rundir import Run

QUIET = Console(quiet=True)
pytestmark = pytest.mark.usefixtures("one_thread", "light")


def train(folder, model, **changes):
    """A run whose adapter does a lot: a high rate on thirty rows."""
    rows = [{"prompt": f"Say {n}.", "completion": f"{n} and {n}"} for n in range(1, 31)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"name": str(model)},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64, "held_out_fraction": 0.2},
        "lora": {"r": 4},
        "quant": {},
        "train": {
            "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-2,
            "gradient_accumulation_steps": 1, "warmup_steps": 0, "activation_checkpointing": False,
        },
        "run": {"dir": str(folder / "runs"), "name": "tiny.v1"},
    }  # fmt: skip
    for address, value in changes.items():
        section, _, key = address.partition("__")
        values[section][key] = value
    return trainer.train(recipe_from(values), console=QUIET)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Its logits differ more from token to token than those of a usual random model."""
    folder = tmp_path_factory.mktemp("merging") / "base"
    return save_tiny(folder, dtype="float32", initializer_range=0.1)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), base)


def logits(model, rows):
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


def nothing_left(folder):
    return {path.name for path in folder.iterdir()} <= {"cache"}  # of tokenized rows


ROWS = [[5, 9, 300, 41, 7, 8], [1000, 2, 77], [44, 45, 46, 47, 48]]


def test_a_merge_in_fp32_computes_what_was_trained(run, tmp_path):
    merged = merging.merge(run.dir, tmp_path / "out", dtype="float32", console=QUIET)
    assert merged.verdict.max_logit <= 1e-4 and merged.verdict.kl <= 1e-9
    assert merged.verdict.top1 == 1.0 and merged.verdict.positions >= 40
    assert merged.learned.kl > 0.1, "the adapter did nothing: nothing could have gone wrong"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = trained.load(trained.find(run.dir))
    assert compare(logits(ours, ROWS), logits(again, ROWS)).max_logit <= 1e-4


def test_each_tensor_is_what_peft_merges_into_the_unpacked_base(run, tmp_path):
    """The independent reference: dequantize, then merge_and_unload, both by the libraries."""
    found = trained.find(run.dir)
    base = trained.load_base(found).dequantize().float()
    with adapter.quiet_peft():
        reference = PeftModel.from_pretrained(base, found.source).merge_and_unload()
    wanted = reference.state_dict()
    ours = Folded(trained.load(found))
    assert set(ours.shapes) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.allclose(ours.tensor(name, torch.float32), tensor, atol=1e-6), name


def test_auto_keeps_the_base_that_is_nearer_to_what_was_trained(run, tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    merged = merging.merge(run.dir, tmp_path / "auto", dtype="float32", console=console)
    assert merged.onto == "nf4"
    assert 0 <= merged.measured["nf4"].kl < merged.measured["16bit"].kl
    said = console.export_text()
    assert (
        "onto nf4: KL" in said and "onto 16bit: KL" in said and "the original 16-bit base" in said
    )
    told = rundir.read_json(tmp_path / "auto" / "merge.json")
    assert told["onto"] == "nf4" and told["measured"]["16bit"]["kl"] == merged.measured["16bit"].kl
    assert told["verdict"] == merged.verdict.to_json() and set(told["to_checkpoint"]) == {
        "nf4",
        "16bit",
    }


def test_onto_the_checkpoint_is_off_by_the_error_of_quantization_and_says_so(run, base, tmp_path):
    merged = merging.merge(run.dir, tmp_path / "out", onto="16bit", dtype="float32", console=QUIET)
    found = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    model = trained.load(trained.find(run.dir))
    name = "model.layers.0.mlp.up_proj"
    wanted = original[f"{name}.weight"] + adapter.delta(model, name)
    assert torch.allclose(found[f"{name}.weight"], wanted, atol=1e-6)
    assert torch.equal(found["model.norm.weight"], original["model.norm.weight"])
    assert merged.verdict.kl > 1e-5  # the quantization's, which unpacking the base does not have


def test_a_checkpoint_that_is_another_one_by_now_is_caught(run, base, tmp_path, monkeypatch):
    other = save_tiny(tmp_path / "other", dtype="float32", initializer_range=0.05)
    files = [other / "model.safetensors"]
    monkeypatch.setattr(merging.loader, "weight_files", lambda recipe, config: files)
    monkeypatch.setattr(trained.loader, "load_base", from_its_own_files(base, loader.load_base))
    with pytest.raises(ExportError, match="not what was trained"):
        merging.merge(run.dir, tmp_path / "out", onto="16bit", console=QUIET)
    assert not (tmp_path / "out").exists()
    auto = merging.merge(run.dir, tmp_path / "auto", console=QUIET)
    assert auto.onto == "nf4" and auto.measured["16bit"].kl > 0.1


def from_its_own_files(base, load):
    """Loading a base, with the checkpoint's files as they were."""

    def loaded(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                loader, "weight_files", lambda recipe, config: [base / "model.safetensors"]
            )
            return load(*args, **kwargs)

    return loaded


def wrong(monkeypatch, how):
    true = adapter.delta

    def twice(model, name):
        return 2 * true(model, name)

    def transposed(model, name):
        lora = adapter.bare(model).get_submodule(name)
        a, b = (lora.lora_A["default"].weight, lora.lora_B["default"].weight)
        return (b.T.reshape(b.shape) @ a).detach() * lora.scaling["default"]

    def absent(model, name):
        return 0 * true(model, name)

    monkeypatch.setattr(
        adapter, "delta", {"twice": twice, "transposed": transposed, "none": absent}[how]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["twice", "transposed", "none"])
@pytest.mark.parametrize("onto", ["auto", "16bit"])
def test_a_wrong_merge_is_caught_and_not_kept(run, tmp_path, monkeypatch, how, dtype, onto):
    wrong(monkeypatch, how)
    with pytest.raises(ExportError) as told:
        merging.merge(run.dir, tmp_path / "out", onto=onto, dtype=dtype, console=QUIET)
    assert "the merged model is not what was trained: model.layers.0." in str(told.value)
    assert "adds something else than the adapter does there" in str(told.value)
    assert nothing_left(tmp_path)


def test_what_is_wrong_in_the_sum_alone_is_caught_by_the_verdict(run, tmp_path, monkeypatch):
    true = Folded.tensor

    def twice(self, name, dtype):
        bare = Folded(self.model, with_adapter=False)
        return 2 * true(self, name, dtype) - true(bare, name, dtype)

    monkeypatch.setattr(Folded, "tensor", twice)
    with pytest.raises(ExportError) as told:
        merging.merge(run.dir, tmp_path / "out", onto="nf4", dtype="float32", console=QUIET)
    said = str(told.value)
    assert "the merged model is not what was trained: KL" in said and "At most 1e-06 nats" in said
    assert "Try --dtype float32, or allow more with --max-kl" in said
    assert nothing_left(tmp_path)


@pytest.fixture(scope="module")
def in_bf16(base, tmp_path_factory):
    """As a card computes."""
    folder = tmp_path_factory.mktemp("bf16")
    return train(folder, base, quant__compute_dtype="bfloat16", train__max_steps=4)


@pytest.mark.parametrize("share", [1.0, 0.01, 1e-4])
def test_an_adapter_that_does_little_in_16_bits_is_no_wrong_merge(in_bf16, share, monkeypatch):
    """Added to a base's answer in bf16, an effect of a thousandth of it is rounded away."""
    model = trained.load(trained.find(in_bf16.dir))
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data.mul_(share)
    assert model.dtype == torch.bfloat16 and Folded(model).prove() <= 0.01
    wrong(monkeypatch, "twice")
    with pytest.raises(ExportError, match="adds something else"):
        Folded(model).prove()


def test_a_base_without_what_little_was_learned_is_not_near_enough(in_bf16, tmp_path, monkeypatch):
    little = Run(shutil.copytree(in_bf16.dir, tmp_path / "runs" / in_bf16.dir.name))
    file, true, write = little.adapter / "adapter_model.safetensors", trained.load, shards.write
    weights = load_file(file)
    save_file({n: t * (0.01 if "lora_B" in n else 1) for n, t in weights.items()}, file)
    merged = merging.merge(little.dir, tmp_path / "right", onto="nf4", console=QUIET)
    assert 1e-5 < merged.learned.kl < merging.ROUNDING[torch.bfloat16]
    loaded = []

    def load(found, **more):
        loaded.append(true(found, **more))
        return loaded[-1]

    def without(folder, slots, make, watch):
        bare = Folded(loaded[0], with_adapter=False)
        return write(folder, slots, lambda name: bare.tensor(name, slots[name].dtype), watch)

    monkeypatch.setattr(trained, "load", load)
    monkeypatch.setattr(shards, "write", without)
    with pytest.raises(ExportError, match="not what was trained"):
        merging.merge(little.dir, tmp_path / "wrong", onto="nf4", console=QUIET)


def test_weights_finer_than_the_arithmetic_are_held_to_what_it_rounds(in_bf16, tmp_path):
    merged = merging.merge(in_bf16.dir, tmp_path / "out", dtype="float32", console=QUIET)
    assert merged.dtype == "float32" and merged.verdict.kl <= merging.ROUNDING[torch.bfloat16]


def test_a_checkpoint_that_cannot_be_had_any_more_leaves_the_nf4_base(run, tmp_path, monkeypatch):
    """The NF4 base is kept in the cache; the hub may be out of reach by now."""
    found = trained.find(run.dir)
    model, true = trained.load(found), trained.load

    def gone(recipe, config):
        raise OSError("the hub cannot be reached\nand more")

    monkeypatch.setattr(
        trained, "load", lambda one, **more: model if one.run else true(one, **more)
    )
    monkeypatch.setattr(loader, "weight_files", gone)
    with pytest.raises(
        ExportError, match=r"cannot be merged onto 16bit: the hub cannot be reached$"
    ):
        merging.merge(run.dir, tmp_path / "other", onto="16bit", console=QUIET)
    assert merging.merge(run.dir, tmp_path / "out", console=QUIET).onto == "nf4"


def test_a_file_that_does_not_hold_what_was_measured_is_caught(run, tmp_path, monkeypatch):
    """What counts is what is on disk, not what was computed before it was written."""
    write, layers = shards.write, [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)]
    other = dict(zip(layers, reversed(layers), strict=True))

    def swapped(folder, slots, make, watch):
        return write(folder, slots, lambda name: make(other.get(name, name)), watch)

    monkeypatch.setattr(shards, "write", swapped)
    with pytest.raises(ExportError, match="not what was trained"):
        merging.merge(run.dir, tmp_path / "out", console=QUIET)
    assert nothing_left(tmp_path)


def test_a_file_that_lacks_a_tensor_is_caught(run, tmp_path, monkeypatch):
    write = shards.write

    def lacking(folder, slots, make, watch):
        del slots["model.layers.1.self_attn.k_proj.weight"]
        return write(folder, slots, make, watch)

    monkeypatch.setattr(shards, "write", lacking)
    with pytest.raises(ExportError, match="does not load again: 1 of its tensors is missing"):
        merging.merge(run.dir, tmp_path / "out", console=QUIET)
    assert nothing_left(tmp_path)


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_merge_within_fp32(kind, tmp_path):
    model = save_tiny(tmp_path / "base", kind, dtype="float32")
    done = train(tmp_path, model, train__max_steps=4)
    merged = merging.merge(done.dir, tmp_path / "out", dtype="float32", console=QUIET)
    assert merged.verdict.max_logit <= 1e-4 and merged.learned.kl > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__target_modules": ["q_proj", "v_proj"]},
        {"lora__use_rslora": True, "lora__lora_alpha": 5.0},
        {"quant__quant_type": "none"},
        {"quant__double_quant": False},
        {"quant__head": "8bit"},
        {"train__embedding_offload": True},
        {"data__rendering": "plain"},
    ],
    ids=lambda changes: "-".join(f"{k}" for k in changes),
)
def test_each_kind_of_run_merges(base, tmp_path, changes):
    done = train(tmp_path, base, train__max_steps=4, **changes)
    merged = merging.merge(done.dir, tmp_path / "out", dtype="float32", console=QUIET)
    assert merged.verdict.max_logit <= 1e-4
    assert merged.onto == ("16bit" if changes == {"quant__quant_type": "none"} else "nf4")


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_of_new_tokens_are_in_the_merged_tables(tmp_path, tied):
    model = save_tiny(tmp_path / "base", tie_word_embeddings=tied, dtype="float32")
    weights = load_file(model / "model.safetensors")
    for row in (0, 1, 2):
        weights["model.embed_tokens.weight"][row] *= 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = train(tmp_path, model, lora__train_new_tokens=True)
    saved = load_file(done.adapter / "adapter_model.safetensors")
    rows = next(t for n, t in saved.items() if "embed" in n and "trainable_tokens" in n)
    merged = merging.merge(done.dir, tmp_path / "out", dtype="float32", console=QUIET)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in found) is not tied
    moved = (found["model.embed_tokens.weight"] != weights["model.embed_tokens.weight"]).any(1)
    assert torch.allclose(found["model.embed_tokens.weight"][moved], rows)
    assert merged.verdict.max_logit <= 1e-4


def test_many_files_are_named_by_an_index_and_hold_the_same(run, tmp_path, monkeypatch):
    whole = merging.merge(run.dir, tmp_path / "whole", console=QUIET)
    monkeypatch.setattr(shards, "LIMIT_BYTES", 2**16)
    merging.merge(run.dir, tmp_path / "parts", console=QUIET)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = rundir.read_json(tmp_path / "parts" / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(files)
    one = load_file(whole.dir / "model.safetensors")
    many = {k: v for file in files for k, v in load_file(tmp_path / "parts" / file).items()}
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    config = json.loads((whole.dir / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"


def test_each_tensor_is_written_before_the_next_is_made(run, tmp_path):
    """Memory is bounded by a tensor, not by a file or the model."""
    one, sizes = Folded(trained.load(trained.find(run.dir))), []

    def make(name):
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")))
        return one.tensor(name, torch.float32)

    slots = one.slots(torch.float32)
    shards.write(tmp_path, slots, make, limit_bytes=2**17)
    before = 0
    for slot, there in zip(slots.values(), sizes, strict=True):
        assert there >= before - 2**14  # what Python itself holds back
        before += slot.nbytes


def test_the_files_are_as_the_library_reads_and_writes_them(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.randn(2, 2).half(),
        "ü": torch.arange(4), "empty": torch.zeros(0, 3), "t": torch.randn(4, 6).T,
        "yes": torch.tensor(True),
    }  # fmt: skip
    slots = {name: shards.Slot(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    total = shards.write(tmp_path, slots, tensors.__getitem__)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys() and total == sum(t.nbytes for t in tensors.values())
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_merged_model_is_asked_and_answers_as_the_run(run, tmp_path):
    merged = merging.merge(run.dir, tmp_path / "out", dtype="float32", console=QUIET)
    turns, sampling = [Turn("user", "Say 7.")], Sampling(max_new_tokens=12)
    ours, theirs = chat.load_speaker(run.dir), chat.load_speaker(merged.dir)
    assert theirs.found.prompt_ids(turns) == ours.found.prompt_ids(turns)
    assert theirs.answer(turns, sampling, lambda _: None) == ours.answer(
        turns, sampling, lambda _: None
    )
    assert not theirs.has_base and theirs.found.name == "out"
    ends = json.loads((merged.dir / "generation_config.json").read_text())["eos_token_id"]
    assert ours.found.renderer.closing in ends


def test_what_is_given_away_names_no_place_of_this_machine(run, tmp_path):
    out = merging.merge(run.dir, tmp_path / "out", console=QUIET).dir
    texts = {
        path.name: path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md")
    }
    assert {"config.json", "merge.json", "README.md", "tokenizer.json"} <= set(texts)
    for name, text in texts.items():
        assert str(tmp_path) not in text and "rows.jsonl" not in text, name
        assert str(run.dir.parent.parent) not in text, name
        assert "Say 3." not in text, name
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.iterdir())


@pytest.mark.parametrize("name", ["~/secret/base", "../secret/base", "/secret/base"])
def test_a_base_or_held_out_rows_in_a_folder_are_not_named(run, name):
    found = trained.find(run.dir)
    data = found.recipe.data.model_copy(
        update={"train": ("hub:owner/rows",), "held_out": "secret/rows.jsonl"}
    )
    model = found.recipe.model.model_copy(update={"name": name})
    recipe = found.recipe.model_copy(update={"data": data, "model": model})
    told = merging._facts(replace(found, recipe=recipe))
    assert "secret" not in json.dumps(told)


def test_a_damaged_word_of_what_was_merged_is_told(run, tmp_path):
    out = merging.merge(run.dir, tmp_path / "out", console=QUIET).dir
    told = rundir.read_json(out / "merge.json")
    rundir.write_json(out / "merge.json", told | {"eval": {"generate": "many"}})
    with pytest.raises(CheckpointError, match="is damaged or of another version"):
        trained.find(out)


# --- what is refused


def refused(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qlora", "merge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_folder_that_exists_is_not_touched(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    said = refused(run.dir, "--out", tmp_path / "out", monkeypatch=monkeypatch, capsys=capsys)
    assert "exists already. Name another folder with --out, or remove it first." in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def copy_of(run, tmp_path):
    return Run(shutil.copytree(run.dir, tmp_path / run.dir.parent.name / run.dir.name))


def test_a_run_without_a_result_is_refused(run, tmp_path):
    copy = copy_of(run, tmp_path)
    (copy.dir / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"has not finished: there is no result\.json"):
        merging.merge(copy.dir, tmp_path / "out", console=QUIET)


def test_a_damaged_adapter_is_refused(run, tmp_path):
    copy = copy_of(run, tmp_path)
    file = copy.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="the adapter is damaged"):
        merging.merge(copy.dir, tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 128}, "hidden_size 64, and .* has 128 now"),
        ({"vocab_size": 2176}, "vocab_size 2048, and .* has 2176 now"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2, and .* has 3 now"),
        ({"initializer_range": 0.03}, "has the shape of the run's base, but other weights"),
    ],
)
def test_an_adapter_of_another_base_is_refused_and_what_differs_is_named(tmp_path, changes, told):
    model = save_tiny(tmp_path / "base", dtype="float32")
    done = train(tmp_path, model, train__max_steps=2)
    shutil.rmtree(model)
    save_tiny(model, dtype="float32", **changes)
    with pytest.raises(CheckpointError, match=told) as error:
        merging.merge(done.dir, tmp_path / "out", console=QUIET)
    assert "If another model lies there by now" in str(error.value)


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: real(path)._replace(free=2**20))
    with pytest.raises(ExportError, match=r"takes .* GiB, and 0\.0 GiB are free"):
        merging.merge(run.dir, tmp_path / "out", console=QUIET)
    assert nothing_left(tmp_path)


def test_a_disk_that_fills_in_the_middle_leaves_nothing(run, tmp_path, monkeypatch):
    calls, header = [], shards._header

    def full(slots):
        calls.append(slots)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return header(slots)

    monkeypatch.setattr(shards, "_header", full)
    monkeypatch.setattr(shards, "LIMIT_BYTES", 2**16)
    with pytest.raises(ExportError, match="cannot be written: No space left on device"):
        merging.merge(run.dir, tmp_path / "out", console=QUIET)
    assert nothing_left(tmp_path)


def test_an_interrupted_merge_leaves_nothing(run, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_verdict", stop)
    with pytest.raises(KeyboardInterrupt):
        merging.merge(run.dir, tmp_path / "out", console=QUIET)
    assert nothing_left(tmp_path)


def test_a_base_without_16_bit_weights_is_merged_onto_what_it_is(run, base, tmp_path):
    """Such as the checkpoints that are published as bitsandbytes 4-bit."""
    recipe = load_recipe("quickstart", [f"model.name={base}", "quant.compute_dtype=float32"])
    config = loader.read_config(recipe)
    packed = loader.load_base(recipe, trained.find(run.dir).card, config, bars=False).model
    packed.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, tmp_path / "packed" / name)
    done = train(tmp_path, tmp_path / "packed", train__max_steps=4)
    console = Console(record=True, width=250, file=io.StringIO())
    merged = merging.merge(done.dir, tmp_path / "out", dtype="float32", console=console)
    assert merged.onto == "nf4" and merged.verdict.max_logit <= 1e-4
    assert (
        "onto 16bit cannot be tried: the base's checkpoint has no 16-bit tensor"
        in console.export_text()
    )
    with pytest.raises(ExportError, match="Merge with --onto nf4"):
        merging.merge(done.dir, tmp_path / "again", onto="16bit", console=QUIET)


def test_a_merged_model_is_not_merged_again(run, tmp_path):
    merging.merge(run.dir, tmp_path / "out", console=QUIET)
    with pytest.raises(ExportError, match="there is nothing to merge"):
        merging.merge(tmp_path / "out", tmp_path / "again", console=QUIET)


def test_a_tower_keeps_its_language_model_one_level_down():
    class Tensor:
        def __init__(self, *shape):
            self.shape = shape

    name, shape = "model.layers.0.mlp.up_proj.weight", torch.Size([4, 2])
    mine, tower = Tensor(4, 2), Tensor(4, 2)
    below = {f"model.language_model.{name[6:]}": mine, f"vision_tower.{name[6:]}": tower}
    assert folded._original(name, shape, below) is mine
    assert folded._original(name, shape, {f"language_model.{name}": mine}) is mine
    assert folded._original(name, shape, {name: mine} | below) is mine
    with pytest.raises(
        ExportError, match=r"no 16-bit tensor model\.layers\.0\.mlp\.up_proj\.weight of"
    ):
        folded._original(name, shape, {name: Tensor(8, 1)})


def test_the_command_line_merges_and_says_what_next(run, tmp_path, monkeypatch, capsys):
    copy = copy_of(run, tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora", "merge", str(copy.dir)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "proof     read back from disk" in said
    assert said.rstrip().splitlines()[-1] == f"next      qlora chat {copy.dir / 'merged'}"
    assert trained.find(copy.dir / "merged").form == "prompt_completion"
    assert "folded into the NF4 base, it is" in (copy.dir / "report.html").read_text()
    monkeypatch.chdir(copy.dir)
    assert trained.find(".").name == f"tiny.v1/{copy.dir.name}"
