"""A quantized base kept on disk is the one that was quantized, or it is not used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from test_weights import everything, require_equal

from qlora import cli, data, loader, nf4, places, rundir, table, tokenizer, trainer, vault
from qlora.cards import Card
from qlora.errors import CacheError
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
    from transformers import LlamaForCausalLM

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
    busy = kept.with_name(f".{kept.name}.{os.getppid()}.part")
    busy.mkdir()
    assert load().notes == () and busy.is_dir()
    assert [entry.folder for entry in vault.entries()] == [kept]


def test_two_starts_at_once_keep_one_whole_base(load, kept, tmp_path) -> None:
    """Another process was faster: its folder is there when ours wants the name."""
    note = vault.keep(kept.name, "tiny", "", 1, lambda folder: None)
    assert note.startswith("kept in ")
    assert rundir.defect(kept) is None
    assert list(kept.parent.iterdir()) == [kept]


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
    assert qlora("verify") == (0, "", "")
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
    assert qlora("verify") == (0, "", "")


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
