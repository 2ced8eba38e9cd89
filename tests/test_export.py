"""A run handed to another program: what is written, what is refused, and from the shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from rich.console import Console
from typer.testing import CliRunner

from qlora import export, llama, merging, trainer
from qlora.cli.app import app
from qlora.cli.export import export as _verb
from qlora.errors import CheckpointError, ExportError
from qlora.export import converter, gguf, vllm
from qlora.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("one_thread", "light")
assert _verb  # the verb is registered when its module is imported


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("exported")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = recipe_from(
        {
            "model": {"name": str(tiny)},
            "data": {"train": str(rows), "max_length": 128, "held_out_fraction": 0.1},
            "lora": {"r": 12},
            "train": {"max_steps": 2, "activation_checkpointing": False},
            "run": {"dir": str(folder / "runs"), "name": "tiny"},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        return trainer.train(recipe, console=Console(quiet=True)).dir


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path, str]]:
    """Each GGUF file that is asked for: the model's folder, the file, the type."""
    asked: list[tuple[Path, Path, str]] = []

    def write(
        found: Any, folder: Path, target: Path, quant: str, *rest: Any, **named: Any
    ) -> gguf.Written:
        asked.append((folder, target, quant))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"GGUF")
        return gguf.Written(target, quant, None, 0, (0, 0), None, "gpt-2", ())

    monkeypatch.setattr(gguf, "write", write)
    monkeypatch.setattr(llama, "is_here", lambda: True)
    return asked


def quiet(where: Path, to: Any, **settings: Any) -> export.Exported:
    return export.export(where, to, console=Console(quiet=True), **settings)


def test_a_run_is_merged_once_and_each_type_gets_its_file(
    run: Path, writes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = []
    merge = merging.merge
    monkeypatch.setattr(merging, "merge", lambda *a, **k: merges.append(a) or merge(*a, **k))
    quiet(run, "gguf", quants=("f16", "q4_k_m"), out=tmp_path / "a")
    quiet(run, "gguf", out=tmp_path / "b" / "mine.gguf")
    assert len(merges) == 1
    assert [
        (folder, target.relative_to(tmp_path).as_posix(), quant) for folder, target, quant in writes
    ] == [
        (run / "merged", "a/tiny-f16.gguf", "f16"),
        (run / "merged", "a/tiny-q4_k_m.gguf", "q4_k_m"),
        (run / "merged", "b/mine.gguf", "q8_0"),
    ]


def test_a_merged_model_is_exported_beside_itself(run: Path, writes: Any) -> None:
    quiet(run, "gguf", quants=("f32",))
    assert writes[-1][1] == run / "gguf" / "tiny-f32.gguf"
    quiet(run / "merged", "gguf", quants=("f32",))
    assert writes[-1][1] == run / "merged-gguf" / "merged-f32.gguf"


def test_ollama_gets_a_modelfile_beside_the_file_and_not_twice(
    run: Path, writes: Any, tmp_path: Path
) -> None:
    made = quiet(run, "ollama", out=tmp_path / "o")
    assert made.where == str(tmp_path / "o")
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert "FROM ./tiny-q8_0.gguf" in text and 'PARAMETER stop "<|im_end|>"' in text
    (tmp_path / "o" / "tiny-q8_0.gguf").unlink()
    with pytest.raises(ExportError, match="holds a Modelfile already"):
        quiet(run, "ollama", out=tmp_path / "o")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"to": "ollama", "quants": ("f16", "q8_0")}, "a Modelfile is of one file"),
        (
            {"to": "gguf", "quants": ("f16", "q8_0"), "out": "x.gguf"},
            "one file for f16, q8_0. Name a folder",
        ),
        ({"to": "ollama", "out": "x.gguf"}, "one folder for Ollama"),
        ({"to": "gguf", "quants": ("q3",)}, "--quant is 'q3'"),
        ({"to": "hub"}, "--repo owner/name"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_written(
    settings: dict[str, Any], why: str, run: Path, writes: Any
) -> None:
    with pytest.raises(ExportError, match=why):
        quiet(run, **settings)
    assert writes == []


def test_a_run_that_has_not_finished_is_not_exported(run: Path, tmp_path: Path) -> None:
    import shutil

    torn = tmp_path / "runs" / "tiny" / run.name
    shutil.copytree(run, torn)
    (torn / "result.json").unlink()
    for to in ("gguf", "vllm", "hub"):
        with pytest.raises(
            CheckpointError, match=r"no result.json|has not finished|no whole checkpoint"
        ):
            quiet(torn, to, repo="a/b")


# --- vLLM


def test_vllm_gets_the_adapter_the_template_and_a_command_with_a_rank_it_takes(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "v"
    quiet(run, "vllm", out=folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md", "serve.sh", "chat_template.jinja", "adapters/tiny/adapter_config.json",
        "adapters/tiny/adapter_model.safetensors",
    }  # fmt: skip
    line = (folder / "serve.sh").read_text().splitlines()[-1]
    words = shlex.split(line.removeprefix("exec "))
    assert words[:3] == ["vllm", "serve", str(tiny)]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert words[3] == "--enable-lora" and options["--lora-modules"] == "tiny=adapters/tiny"
    assert options["--max-lora-rank"] == "16"  # the least that is not below 12
    assert options["--max-model-len"] == "512"
    readme = (folder / "README.md").read_text()
    assert "Nothing of this was run" in readme and "4 bits (NF4)" in readme
    with pytest.raises(ExportError, match="exists already"):
        quiet(run, "vllm", out=folder)


def test_the_base_that_vllm_shall_load_can_be_named(run: Path, tmp_path: Path) -> None:
    command = " ".join(vllm.write(_found(run), tmp_path / "v", base="some/base"))
    assert command.startswith("vllm serve some/base ") and "--revision" not in command
    config = json.loads((tmp_path / "v/adapters/tiny/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, r"DoRA \(use_dora\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "train_new_tokens"),
        ({"r": 1024}, "a rank above 512"),
    ],
)
def test_an_adapter_that_vllm_does_not_serve_is_refused_by_its_kind(
    change: dict[str, Any], why: str, run: Path, tmp_path: Path
) -> None:
    config = run / "adapter" / "adapter_config.json"
    was = config.read_text()
    config.write_text(json.dumps(json.loads(was) | change))
    try:
        with pytest.raises(ExportError, match=f"{why}.*Merge it"):
            vllm.write(_found(run), tmp_path / "v")
    finally:
        config.write_text(was)
    assert not (tmp_path / "v").exists()


def test_a_merged_model_needs_no_layout_for_vllm(run: Path) -> None:
    with pytest.raises(ExportError, match="which vLLM serves as it is"):
        quiet(run / "merged", "vllm")


def _found(run: Path) -> Any:
    from qlora import trained

    return trained.find(run, finished=True)


# --- the command line


def shell(*words: str) -> Any:
    return CliRunner().invoke(app, ["export", *words])


def test_the_shell_says_what_comes_next(run: Path, writes: Any, tmp_path: Path) -> None:
    done = shell(str(run), "--to", "ollama", "--out", str(tmp_path / "o"))
    assert done.exit_code == 0, done.output
    assert (
        "ollama create NAME -f Modelfile" in done.output
        and "Ollama itself was not run" in done.output
    )


def test_the_shell_prints_json_alone_on_standard_output(
    run: Path, writes: Any, tmp_path: Path
) -> None:
    done = shell(str(run), "--to", "gguf", "--quant", "f16", "--out", str(tmp_path / "g"), "--json")
    (file,) = json.loads(done.stdout)["files"]
    assert file["file"] == "tiny-f16.gguf" and file["ran"] is False


def test_without_a_terminal_a_list_for_the_hub_needs_a_yes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.export import publishing

    def send(parcel: Any, screen: Any, agree: Any) -> str:
        lines: Sequence[str] = parcel.lines()
        agree(lines)
        return "sent"

    monkeypatch.setattr(publishing, "send", send)
    done = shell(str(run), "--to", "hub", "--repo", "me/model")
    assert isinstance(done.exception, ExportError) and "Write --yes" in str(done.exception)
    assert "adapter_model.safetensors" in done.output
    assert shell(str(run), "--to", "hub", "--repo", "me/model", "--yes").exit_code == 0


def test_the_converter_is_looked_for_where_it_was_named(run: Path, tmp_path: Path) -> None:
    done = shell(
        str(run), "--to", "gguf", "--llama-cpp", str(tmp_path), "--out", str(tmp_path / "g")
    )
    assert isinstance(done.exception, ExportError) and converter.SCRIPT in str(done.exception)
    assert not list((tmp_path / "g").glob("*"))
