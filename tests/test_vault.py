"""A quantized base kept on disk is the one that was quantized, or it is not used."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_weights import everything, require_equal
from transformers import LlamaForCausalLM

from qlora import cli, data, loader, nf4, places, rundir, table, tokenizer, trainer, vault
from qlora.cards import Card
from qlora.errors import CacheError, ModelError
from qlora.settings import Recipe

Disk = namedtuple("Disk", "total used free")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bases of these tests are worth keeping."""
    monkeypatch.setattr(loader, "MIN_KEPT_BYTES", 1)


@pytest.fixture
def load(make_recipe, cpu):
    def loaded(**changes: Any) -> loader.Base:
        recipe = make_recipe(**changes)
        return loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False)

    return loaded


@pytest.fixture
def kept(load) -> Path:
    """The folder of a base that is kept."""
    (note,) = load().notes
    assert note.startswith("kept in ")
    (folder,) = bases()
    return folder


def bases() -> list[Path]:
    root = places.cache() / "bases"
    return sorted(p for p in root.iterdir() if p.name[0] != ".") if root.is_dir() else []


# --- what comes back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double", [True, False])
def test_the_second_start_has_the_same_bits_from_the_cache(load, dtype, double) -> None:
    asked = {"quant__compute_dtype": dtype, "quant__double_quant": double}
    first, second = load(**asked), load(**asked)
    require_equal(second.model, first.model)
    assert (first.facts["from_cache"], second.facts["from_cache"]) == (False, True)
    assert second.notes == ()
    same = {name for name in first.facts if first.facts[name] == second.facts[name]}
    assert set(first.facts) - same == {"from_cache"}
    modules = [dict(nf4.linears(base.model)) for base in (first, second)]
    for name, module in modules[1].items():
        assert module.compute_dtype == modules[0][name].compute_dtype
        assert not module.support_avx512bf16_for_cpu
    assert not any(p.requires_grad for p in second.model.parameters())
    assert not second.model.training
    assert second.model.name_or_path == first.model.name_or_path
    stops = [base.model.generation_config.to_dict() for base in (first, second)]
    assert stops[0] == stops[1]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma2", "phi3", "mistral", "smollm3"])
def test_every_family_comes_back_bit_equal(load, tmp_path, kind) -> None:
    name = str(save_tiny(tmp_path / kind, kind, tie_word_embeddings=kind.startswith("gemma")))
    first, second = load(model__name=name), load(model__name=name)
    assert second.facts["from_cache"]
    require_equal(second.model, first.model)


def test_a_kept_base_is_four_bit_and_serves_any_attention(load, kept) -> None:
    assert '"load_in_4bit": true' in (kept / "config.json").read_text()
    assert "attn" not in (kept / "config.json").read_text()
    eager = load(model__attn_implementation="eager")
    assert eager.facts["from_cache"] and eager.facts["attention"] == "eager"
    assert eager.model.config._attn_implementation == "eager"


def test_a_folder_that_was_moved_is_found_again_without_its_weights(
    load, kept, tiny, tmp_path
) -> None:
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))  # copytree keeps the times
    assert load(model__name=str(moved)).facts["from_cache"]
    assert bases() == [kept]


# --- the key


@pytest.fixture
def key(make_recipe, cpu):
    def made(card: Card = cpu, commit: str | None = None, **changes: Any) -> str | None:
        recipe: Recipe = make_recipe(**changes)
        config = loader.BaseConfig(None, {}, commit)
        dtype = getattr(torch, recipe.quant.compute_dtype.replace("auto", "float32"))
        return loader._key(recipe, card, config, dtype)

    return made


def test_each_ingredient_makes_another_key(key, tmp_path, tiny, monkeypatch) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    name, weights = str(folder), folder / "model.safetensors"
    keys = [
        key(model__name=name),
        key(model__name=name, quant__double_quant=False),
        key(model__name=name, quant__compute_dtype="bfloat16"),
        key(model__name=name, card=Card("a card", "cuda", 2**34, 2**34, (8, 0))),
    ]
    for package in ("bitsandbytes", "transformers"):
        with monkeypatch.context() as other:
            other.setattr(loader, "version", lambda one, p=package: "99" if one == p else "1")
            keys.append(key(model__name=name))
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    keys.append(key(model__name=name))
    weights.write_bytes(weights.read_bytes() + b" ")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys.append(key(model__name=name))
    weights.rename(folder / "other.safetensors")
    keys.append(key(model__name=name))
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_text((folder / file).read_text() + "\n")
        keys.append(key(model__name=name))
    for commit in ("a" * 40, "b" * 40):
        keys += [key(commit=commit, model__name=hub) for hub in ("owner/one", "owner/two")]
    assert None not in keys
    assert len(set(keys)) == len(keys) == 15


def test_what_does_not_change_the_weights_changes_no_key(key) -> None:
    assert key() == key(model__attn_implementation="eager") == key(lora__r=8, data__max_length=64)


def test_plain_lora_no_commit_and_a_wish_make_no_key(key) -> None:
    assert key(quant__quant_type="none") is None
    assert key(quant__cache=False) is None
    assert key(model__name="owner/name") is None


# --- what is not kept


def test_small_plain_prequantized_and_unwanted_bases_are_not_kept(
    load, tmp_path, monkeypatch
) -> None:
    first = load(quant__cache=False)
    first.model.save_pretrained(tmp_path / "packed")
    others = [load(quant__quant_type="none"), load(model__name=str(tmp_path / "packed"))]
    monkeypatch.setattr(loader, "MIN_KEPT_BYTES", 256 * 2**20)
    for base in (first, *others, load()):
        assert base.notes == () and not base.facts["from_cache"]
    assert not places.cache().exists()


def test_a_disk_without_room_is_told_and_the_base_is_loaded(load, monkeypatch) -> None:
    free = vault.SPARE_BYTES + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2**40, 2**40 - free, free))
    base = load()
    (note,) = base.notes
    assert "not kept in the cache: it takes" in note and "1.0 GiB free" in note
    assert "QLORA_CACHE" in note
    assert bases() == [] and len(everything(base.model)) > 10


@pytest.mark.parametrize("kind", ["OSError", "SafetensorError", "RuntimeError"])
def test_a_disk_that_fills_up_while_writing_is_told_and_nothing_is_left(
    load, monkeypatch, kind
) -> None:
    from safetensors import SafetensorError

    errors = {
        "OSError": OSError(28, "No space left on device"),
        "SafetensorError": SafetensorError("I/O error: No space left on device (os error 28)"),
        "RuntimeError": RuntimeError("No space left on device"),
    }

    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model-00001.safetensors").write_bytes(b"x" * 100)
        raise errors[kind]

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    base = load()
    (note,) = base.notes
    assert "cannot be written" in note and "No space left on device" in note
    assert list((places.cache() / "bases").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_told(load, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    (note,) = load().notes
    assert "cannot be written (Not a directory)" in note


def test_the_least_recently_used_base_goes_when_there_are_too_many(load, monkeypatch) -> None:
    monkeypatch.setattr(vault, "KEPT_BASES", 2)
    load()
    (first,) = bases()
    load(quant__double_quant=False)
    (second,) = set(bases()) - {first}
    os.utime(first, (2e9, 2e9))
    os.utime(second, (1e9, 1e9))
    (note,) = load(quant__compute_dtype="bfloat16").notes
    assert f"tiny0-{second.name[:8]} went for it" in note
    assert first in bases() and second not in bases() and len(bases()) == 2


# --- damage


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "model.safetensors is damaged": flip,
    "config.json is damaged": lambda folder: os.truncate(folder / "config.json", 10),
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "it has no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "its manifest is damaged": lambda folder: os.truncate(folder / "manifest.json", 20),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_base_is_told_removed_and_made_again(load, kept, said) -> None:
    reference = load().model
    DAMAGE[said](kept)
    base = load()
    told, again = base.notes
    assert said in told and "removed and made again" in told and again.startswith("kept in ")
    assert not base.facts["from_cache"]
    require_equal(base.model, reference)
    assert load().facts["from_cache"] and bases() == [kept]


def test_a_base_that_is_whole_and_yet_no_model_is_made_again(load, kept) -> None:
    (kept / "config.json").write_text('{"model_type": "mystery"}')
    (kept / "manifest.json").unlink()
    rundir.seal(kept)
    base = load()
    assert "mystery" in base.notes[0] and "made again" in base.notes[0]
    assert load().facts["from_cache"]


def change(folder: Path, edit: Any) -> None:
    """Another content for the weights of a kept base, sealed again: no hash tells."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "manifest.json").unlink()
    rundir.seal(folder)


DOWN = "model.layers.1.mlp.down_proj.weight"


def without(*names: str) -> Any:
    return lambda tensors: [tensors.pop(name) for name in names]


def cut(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][:8].clone()})


WRONG = {
    "missing from its files and would start as random numbers: model.norm.weight": without(
        "model.norm.weight"
    ),
    f"missing from its files and would start as random numbers: {DOWN}": lambda tensors: [
        tensors.pop(name) for name in list(tensors) if name.startswith(DOWN)
    ],
    f"its files do not hold all parts of {DOWN}": without(f"{DOWN}.absmax"),
    "lm_head.weight is (8, 64) in its files where the model has (2048, 64)": cut("lm_head.weight"),
    f"{DOWN} is packed, and a part of it is missing": cut(DOWN),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_base_that_is_whole_and_yet_not_the_model_is_told_and_made_again(
    load, kept, said
) -> None:
    reference = load().model
    change(kept, WRONG[said])
    base = load()
    told, again = base.notes
    assert said in told and "removed and made again" in told and again.startswith("kept in ")
    assert not base.facts["from_cache"]
    require_equal(base.model, reference)
    assert load().facts["from_cache"]


@pytest.mark.parametrize("said", WRONG)
def test_a_base_that_cannot_be_used_leaves_the_memory_before_the_original_comes(
    load, kept, monkeypatch, said
) -> None:
    """Half a model that lingers would take a small card's room."""
    change(kept, WRONG[said])
    assemble = loader.weights.assemble
    gc.collect()
    alive = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(type(one) is LlamaForCausalLM for one in gc.get_objects()))
        return assemble(*args, **kwargs)

    monkeypatch.setattr(loader.weights, "assemble", watched)
    gc.disable()
    try:
        load()
    finally:
        gc.enable()
    assert len(alive) == 2 and alive[0] == alive[1]


def test_a_file_that_cannot_be_read_is_told_and_no_fault_of_the_model(
    load, kept, monkeypatch
) -> None:
    real = rundir.sha256

    def refuse(path: Path) -> str:
        if path == kept / "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "sha256", refuse)
        (entry,) = vault.entries()
        assert entry.defect() == "model.safetensors cannot be read: Permission denied"
        base = load()
    assert "(model.safetensors cannot be read: Permission denied); it is removed" in base.notes[0]
    assert not base.facts["from_cache"]


def test_a_base_that_another_process_removes_while_it_is_read_is_told(
    load, kept, monkeypatch
) -> None:
    find = vault.find

    def found(key: str) -> Any:
        answer = find(key)
        shutil.rmtree(kept)
        return answer

    monkeypatch.setattr(vault, "find", found)
    base = load()
    assert base.notes[0].startswith("the copy in the cache is not used (")
    assert base.notes[1].startswith("kept in ") and not base.facts["from_cache"]


def test_a_cache_that_cannot_be_looked_at_is_told(load, kept, monkeypatch) -> None:
    real = Path.is_dir

    def refuse(path: Path) -> bool:
        if path == kept:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    first, *_ = load().notes
    assert first.startswith("the cache is not used: ") and "(Permission denied)" in first


def test_a_card_without_memory_for_a_kept_base_does_not_cost_the_base(
    load, kept, monkeypatch
) -> None:
    """The libraries keep the words of any error while unpacking, and raise another one."""
    from qlora.bnb import bnb

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(bnb.nn.Params4bit, "from_prequantized", full)
        with pytest.raises(torch.OutOfMemoryError):
            load()
    assert load().facts["from_cache"]


def test_a_damaged_base_that_cannot_be_removed_is_not_said_to_be_gone_nor_kept(
    load, kept, monkeypatch
) -> None:
    flip(kept)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        base = load()
    told, again = base.notes
    assert "model.safetensors is damaged" in told and "cannot be removed" in told
    assert "it is removed" not in told
    assert again.startswith("not kept in the cache: ") and "(Directory not empty)" in again
    assert not base.facts["from_cache"]


def test_an_old_base_that_cannot_be_removed_did_not_go_for_another(load, monkeypatch) -> None:
    monkeypatch.setattr(vault, "KEPT_BASES", 1)
    load()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        (note,) = load(quant__double_quant=False).notes
    assert note.startswith("kept in ") and "went for it" not in note
    assert len(bases()) == 2


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a day has to pass")
def test_what_a_killed_writer_left_is_told_removed_and_made_again(load, kept) -> None:
    """Killed in the middle of writing: a folder that never got its name."""
    shutil.rmtree(kept)
    code = f"""
import os, signal
from pathlib import Path
from qlora import rundir
with rundir.writing_aside(Path({str(kept)!r})) as aside:
    (aside / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    (left,) = kept.parent.iterdir()
    assert left.name.endswith(".part")
    (entry,) = vault.entries()
    assert entry.is_unfinished and entry.name.startswith("unfinished-")
    told, again = load().notes
    assert "half-written" in told and "removed" in told and again.startswith("kept in ")
    assert list(kept.parent.iterdir()) == [kept]


def test_a_writer_that_still_runs_is_left_alone(load, kept) -> None:
    busy = kept.with_name(f".{kept.name}.{rundir.host()}.{os.getppid()}.part")
    busy.mkdir()
    assert load().notes == () and busy.is_dir()
    assert [entry.folder for entry in vault.entries()] == [kept]


@pytest.fixture
def gone_pid() -> int:
    """Of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("host", ["another-machine.", ""])
def test_a_writer_on_another_machine_is_left_alone_for_a_day(load, kept, gone_pid, host) -> None:
    """Its process id says nothing here. An older version did not write down the machine."""
    part = kept.with_name(f".{kept.name}.{host}{gone_pid}.part")
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    day = time.time() - vault.ABANDONED_SECONDS - 60
    os.utime(part, (day, day))
    assert load().notes == () and part.is_dir()  # the file is young
    assert [entry.folder for entry in vault.entries()] == [kept]
    os.utime(part / "model.safetensors", (day, day))
    assert [entry.is_unfinished for entry in vault.entries()] == [False, True]
    (note,) = load().notes
    assert "half-written" in note and not part.exists()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a day has to pass")
def test_what_a_killed_writer_left_and_nobody_may_remove_is_told(
    load, kept, gone_pid, monkeypatch
) -> None:
    part = kept.with_name(f".{kept.name}.{rundir.host()}.{gone_pid}.part")
    part.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        base = load()
    (note,) = base.notes
    assert "half-written copy in the cache cannot be removed" in note and base.facts["from_cache"]


# --- several processes


def keeping(key: str, before: str = "", after: str = "") -> list[str]:
    """A process that keeps thirty files under a key, says the note, and does what else it is told."""
    code = f"""
import shutil, time
from qlora import places, vault
def write(folder):
    for number in range(30):
        (folder / f"{{number}}.bin").write_bytes(b"x" * 2000)
{before}
print(vault.keep({key!r}, "tiny", "", 1, write))
{after}
"""
    return [sys.executable, "-c", code]


def test_of_two_starts_at_once_the_slower_keeps_the_base_of_the_faster(load) -> None:
    """The other process begins and ends while ours is in the middle of writing."""
    key = "a" * 32

    def write(folder: Path) -> None:
        (folder / "half").write_bytes(b"ours")
        other = subprocess.run(keeping(key), capture_output=True, text=True, check=True)
        assert other.stdout.startswith("kept in ") and folder.is_dir()
        assert [entry.folder for entry in vault.entries()] == bases()
        (folder / "other half").write_bytes(b"ours")

    note = vault.keep(key, "tiny", "", 1, write)
    (kept,) = bases()
    assert note.startswith("kept in ") and rundir.defect(kept) is None
    assert list(kept.parent.iterdir()) == [kept]
    assert (kept / "29.bin").is_file() and not (kept / "half").exists()


def test_many_starts_at_once_keep_one_whole_base() -> None:
    begin = time.time() + 2  # when all of them have been imported
    wait = f"while time.time() < {begin}: pass"
    starts = [
        subprocess.Popen(keeping("a" * 32, wait), stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    notes = [start.communicate()[0] for start in starts]
    assert [note.startswith("kept in ") for note in notes] == [True] * 4
    (kept,) = bases()
    assert rundir.defect(kept) is None and list(kept.parent.iterdir()) == [kept]


def test_what_others_rename_and_remove_meanwhile_ends_no_look_at_the_cache() -> None:
    key = "a" * 32
    folder = places.cache() / "bases" / key
    again = f"""
end = time.time() + 2
while time.time() < end:
    shutil.rmtree({str(folder)!r}, ignore_errors=True)
    vault.keep({key!r}, "tiny", "", 1, write)
"""
    looks = 0
    with subprocess.Popen(keeping(key, after=again), stdout=subprocess.DEVNULL) as other:
        while other.poll() is None:
            vault.find(key)
            assert {entry.name for entry in vault.entries()} <= {"tiny-aaaaaaaa", "base-aaaaaaaa"}
            looks += 1
    assert other.returncode == 0 and looks > 100


def vanishing(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    """Have a folder renamed away at the moment when somebody looks at a file of it."""
    real = Path.stat

    def stat(path: Path, **how: Any) -> os.stat_result:
        if path.name == name and folder.is_dir():
            folder.rename(folder.with_name("elsewhere"))
        return real(path, **how)

    monkeypatch.setattr(Path, "stat", stat)


def test_a_part_that_gets_its_name_while_it_is_looked_at_is_not_abandoned(
    load, kept, monkeypatch
) -> None:
    busy = kept.with_name(f".{kept.name}.{rundir.host()}.{os.getppid()}.part")
    busy.mkdir()
    (busy / "weights").write_bytes(b"x")
    with monkeypatch.context() as patch:
        vanishing(patch, "weights", busy)
        assert load().notes == ()
    assert not busy.exists()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a day has to pass")
def test_a_part_whose_writer_ends_by_giving_it_its_name_is_not_said_to_be_removed(
    load, kept, monkeypatch
) -> None:
    busy = kept.with_name(f".{kept.name}.{rundir.host()}.{os.getppid()}.part")
    busy.mkdir()

    def ends(pid: int, signal: int) -> None:
        busy.rmdir()
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", ends)
    assert load().notes == ()


def test_an_entry_that_vanishes_while_it_is_looked_at_is_none(kept, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        vanishing(patch, "model.safetensors", kept)
        assert vault.entries() == []
    assert not kept.exists()


def test_a_base_is_kept_though_the_others_cannot_be_counted(load, monkeypatch) -> None:
    def refuse(*_: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(vault, "entries", refuse)
    (note,) = load().notes
    assert note.startswith("kept in ") and note.endswith("older ones stay (Permission denied)")
    assert len(bases()) == 1


def test_weights_that_cannot_be_looked_at_are_the_models_fault(load, monkeypatch) -> None:
    """The key of a local folder is made from what lies in it."""

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(rundir, "sha256", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        load()


# --- the story


def test_a_run_says_that_its_base_was_kept_and_then_found(make_recipe) -> None:
    said = []
    for _ in range(2):
        console = Console(file=StringIO(), width=200)
        recipe = make_recipe(train__max_steps=1, train__save_steps=1, data__held_out_fraction=0)
        run = trainer.train(recipe, console=console)
        said.append(console.file.getvalue())
        facts = rundir.read_json(run.dir / "environment.json")["base"]
        assert facts["from_cache"] is (len(said) == 2)
    assert "the next start reads that" in said[0] and "quantized before" not in said[0]
    assert "(quantized before, from the cache)" in said[1] and "next start" not in said[1]


# --- the command line


@pytest.fixture
def qlora(monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["qlora", "cache", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def rows(make_recipe, tiny) -> Path:
    """The folder of tokenized rows that are kept."""
    recipe = make_recipe()
    tok, _ = tokenizer.load(recipe, None)
    prepared = data.prepare(recipe, tok, 2048)
    assert not prepared.from_cache and data.prepare(recipe, tok, 2048).from_cache
    (folder,) = (places.cache() / "data").iterdir()
    return folder


def test_the_list_shows_each_kept_thing_with_its_size_and_age(qlora, kept, rows) -> None:
    code, out, err = qlora("list")
    assert (code, err) == (0, "")
    head, base, table_row, total = out.splitlines()
    assert head.split() == ["kind", "name", "settings", "size", "made", "used"]
    assert base.split()[:2] == ["base", f"tiny0-{kept.name[:8]}"]
    assert "nf4, double quant, float32, cpu" in base and base.endswith("now")
    assert table_row.split()[:2] == ["rows", f"rows.jsonl-{rows.name[:8]}"]
    assert "up to 128 tokens, loss on completions" in table_row
    size = sum(p.stat().st_size for p in [*kept.iterdir(), *rows.iterdir()])
    assert total == f"{vault.human(size)} in {places.shown(places.cache())}"
    os.utime(kept, (kept.stat().st_mtime - 7200,) * 2)
    assert qlora("list")[1].splitlines()[1].endswith("2 h")


def test_an_empty_cache_is_said_to_be_empty_and_is_whole(qlora) -> None:
    assert qlora("list") == (0, f"nothing is kept in {places.shown(places.cache())}\n", "")
    assert qlora("verify") == (0, f"nothing is kept in {places.shown(places.cache())}\n", "")
    assert qlora("remove", "--all") == (0, "0.0 MiB freed\n", "")


def test_verify_reads_every_byte_and_says_what_to_do(qlora, kept, rows) -> None:
    names = [f"tiny0-{kept.name[:8]}", f"rows.jsonl-{rows.name[:8]}"]
    assert qlora("verify") == (0, f"ok       {names[0]}\nok       {names[1]}\n", "")
    flip(kept)
    os.truncate(rows / "train.arrow", 100)
    code, out, err = qlora("verify")
    assert code == 2
    assert out == (
        f"damaged  {names[0]}: model.safetensors is damaged\n"
        f"damaged  {names[1]}: train.arrow is damaged\n"
    )
    assert f"qlora cache remove {names[0]} {names[1]}\n" in err and "made again" in err
    assert kept.is_dir()  # to look is not to remove
    assert qlora("remove", *names)[0] == 0
    assert qlora("verify") == (0, f"nothing is kept in {places.shown(places.cache())}\n", "")


def test_remove_takes_what_is_named_or_everything(qlora, kept, rows) -> None:
    name = f"tiny0-{kept.name[:8]}"
    size = vault.human(sum(p.stat().st_size for p in kept.iterdir()))
    assert qlora("remove", name) == (0, f"removed {name}\n{size} freed\n", "")
    assert not kept.exists() and rows.is_dir()
    assert qlora("remove", "--all")[0] == 0
    assert not rows.exists() and vault.entries() == []


def test_a_name_that_is_not_kept_gets_the_near_ones(qlora, kept) -> None:
    name = f"tiny0-{kept.name[:8]}"
    code, out, err = qlora("remove", f"tiny-{kept.name[:8]}")
    assert (code, out) == (2, "")
    assert f"Did you mean '{name}'?" in err and "qlora cache list" in err and len(err) < 400
    code, _, err = qlora("remove", name, "nothing-like-it")
    assert code == 2 and "'nothing-like-it'" in err and "Did you mean" not in err
    assert kept.is_dir()  # all names or none


@pytest.mark.parametrize("words", [["remove"], ["remove", "x", "--all"]])
def test_remove_wants_names_or_all(qlora, words) -> None:
    code, out, err = qlora(*words)
    assert (code, out) == (2, "") and "--all" in err


def test_an_entry_that_cannot_be_removed_is_told(kept, monkeypatch) -> None:
    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (entry,) = vault.entries()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(CacheError, match=r"Permission denied.*by hand"):
        vault.remove(entry)


def test_the_verbs_of_the_cache_never_load_torch(kept) -> None:
    code = """
import sys
from qlora import cli
for words in (["list"], ["verify"], ["remove", "--all"]):
    sys.argv = ["qlora", "cache", *words]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
assert not {"torch", "transformers", "datasets", "safetensors"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not kept.exists()


def test_rows_that_are_kept_are_sealed(rows) -> None:
    assert rundir.defect(rows) is None
    assert {"about.json", "manifest.json", "train.arrow"} <= {p.name for p in rows.iterdir()}
    assert table.VERSION >= 1
