"""The notebook is committed clean, runs from top to bottom without a network, and shows what it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "recipes" / "notebooks").glob("*.ipynb"))
QUICKSTART = ROOT / "recipes" / "notebooks" / "quickstart.ipynb"


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_quickstart_is_among_the_notebooks() -> None:
    assert QUICKSTART in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs_and_counts(path: Path) -> None:
    notebook = _read(path)
    assert _code(notebook)
    for cell in _code(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
        assert set(cell.metadata) <= {"tags"}, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_4_5_with_an_id_for_each_cell(path: Path) -> None:
    notebook = _read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_names_no_place_of_one_machine_and_no_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|Users|work|tmp|content)/|hf_\w{8}|[A-Z]:\\\\", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_each_code_cell_follows_words_that_explain_it(path: Path) -> None:
    cells = _read(path).cells
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            explained = before is not None and "parameters" in before.metadata.get("tags", [])
            assert explained or before.cell_type == "markdown", cell.id


def test_the_first_cell_installs_only_what_is_missing() -> None:
    first = _code(_read(QUICKSTART))[0].source
    assert "%pip install" in first
    line = next(line for line in first.splitlines() if "%pip" in line)
    assert line.startswith("    ")  # inside: if find_spec("qlora") is None
    assert 'find_spec("qlora") is None' in first


def test_every_command_the_notebook_names_is_a_verb_of_the_command_line() -> None:
    from qlora import cli

    verbs = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    verbs |= {group.name for group in cli.app.registered_groups if group.name}
    text = "\n".join(cell.source for cell in _read(QUICKSTART).cells)
    named = set(re.findall(r"^qlora (\w+)|`qlora (\w+)", text, re.MULTILINE))
    assert named and {a or b for a, b in named} <= verbs


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The quickstart, executed with few steps, and the folder its run was written to."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = _read(QUICKSTART)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    asked = ["train.max_steps=8", "eval.generate=4", "eval.max_new_tokens=24", f"run.dir={folder}"]
    asked += ["data.train=embedded:tickets/heldout.jsonl"]
    asked += ["data.held_out=" + str(_some_rows(folder))]
    parameters.source = f"overrides = {asked!r}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # the kernel inherits it
        client = nbclient.NotebookClient(
            notebook, timeout=120, kernel_name="python3",
            resources={"metadata": {"path": str(QUICKSTART.parent)}},
        )  # fmt: skip
        client.execute()
    yield notebook, folder


def _some_rows(folder: Path) -> Path:
    """Twelve training rows to hold out: a few seconds of evaluation."""
    rows = (ROOT / "qlora" / "embedded" / "tickets" / "train.jsonl").read_text(encoding="utf-8")
    path = folder / "some.jsonl"
    path.write_text("".join(rows.splitlines(keepends=True)[:12]), encoding="utf-8")
    return path


def _said(notebook: Any, cell_id: str) -> str:
    """What a cell printed, and the plain text of what it showed."""
    (cell,) = [c for c in notebook.cells if c.id == cell_id]
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts.append(output.get("data", {}).get("text/plain", ""))
    return "".join(parts)


def test_no_cell_ends_in_an_error_or_complains(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    for cell in _code(notebook):
        assert not any(output.output_type == "error" for output in cell.outputs), cell.id
        lines = _said(notebook, cell.id).splitlines()
        complaints = [line for line in lines if "Warning" in line or "Traceback" in line]
        # tqdm says so where ipywidgets is missing, which is not needed: bars are then text.
        assert not [line for line in complaints if "IProgress not found" not in line], cell.id


def test_the_install_cell_does_nothing_where_qlora_is_there(executed: tuple[Any, Path]) -> None:
    assert _said(executed[0], "install") == ""


def test_rows_are_shown_before_anything_is_trained(executed: tuple[Any, Path]) -> None:
    said = _said(executed[0], "rows")
    assert "300 rows to learn from, 12 held out" in said
    assert "user:" in said and "assistant:" in said


def test_training_tells_its_story_in_the_notebook(executed: tuple[Any, Path]) -> None:
    said = _said(executed[0], "train")
    assert "held-out loss" in said and "exact match" in said


def test_the_loss_cell_ends_in_a_picture(executed: tuple[Any, Path]) -> None:
    (cell,) = [c for c in executed[0].cells if c.id == "loss"]
    pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1


def test_base_and_tuned_answers_stand_side_by_side(executed: tuple[Any, Path]) -> None:
    said = _said(executed[0], "answers")
    assert said.count("exact match") == 2
    assert [said.count(word) for word in ("ticket:", "wanted:", "base:", "tuned:")] == [3] * 4


def test_the_last_cells_answer_a_new_ticket_and_list_a_finished_run(
    executed: tuple[Any, Path],
) -> None:
    notebook, folder = executed
    assert _said(notebook, "new").strip()
    (result,) = folder.glob("quickstart/*/result.json")
    said = _said(notebook, "files")
    assert str(result.parent) in said
    assert "result.json" in said and "adapter_model.safetensors" in said


def test_the_code_that_talks_to_people_is_plain_python() -> None:
    """Only the install cell may need IPython; a reader can paste the others into a script."""
    for cell in _code(_read(QUICKSTART)):
        if cell.id != "install":
            ast.parse(cell.source)


TRAINING = """
import qlora
asked = {asked!r}
qlora.train(qlora.load_recipe("quickstart", asked))
"""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_the_stop_button_ends_a_training_with_its_step_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupyter_client.manager import start_new_kernel

    from qlora import store

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    asked = [
        "train.max_steps=5000", "train.logging_steps=1", "eval.generate=0", "data.held_out=null",
        "data.held_out_fraction=0", "run.save_every=null", "run.name=mine",
    ]  # fmt: skip
    try:
        sent = client.execute(TRAINING.format(asked=asked))
        stopped, errors = False, []
        while True:
            message = client.get_iopub_msg(timeout=180)
            if message["msg_type"] == "error":
                errors.append(message["content"])
            ours = message["parent_header"].get("msg_id") == sent
            if ours and message["content"].get("execution_state") == "idle":
                break
            metrics = [path.read_text() for path in tmp_path.glob("runs/mine/*/metrics.jsonl")]
            if not stopped and any(text.count("\n") >= 2 for text in metrics):
                manager.interrupt_kernel()
                stopped = True
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (error,) = errors
    assert error["ename"] == "Interrupted" and "--resume" in error["evalue"]
    (checkpoints,) = tmp_path.glob("runs/mine/*/checkpoints")
    newest = store.newest(checkpoints)
    assert newest is not None and newest.name in error["evalue"]
