"""The house stands as its map says: floors, owners, doors that open without a sound."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qlora

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora"
FILES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
FILES |= {
    path.parent.name: path.parent for path in PACKAGE.glob("*/__init__.py")
}  # folders are nouns too
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate")
OWNERS = {
    "bitsandbytes": {"bnb"},
    "peft": {"adapter"},
    "trl": {"sft"},
    "datasets": {"table"},
    "wandb": {"tracking"},
    "tensorboard": {"tracking"},
    "yaml": {"document"},
    "pydantic": {"settings", "recipe"},
    "typer": {"cli"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "lm_eval": {"evaluation"},
    "gguf": {"hints"},
    "llama_cpp": {"llama"},
}


def read_map(docstring: str) -> list[tuple[str, int]]:
    """(module, floor) in the order of the map: ``    2 stories   trainer, sft`` and what follows."""
    listed: list[tuple[str, int]] = []
    floor: int | None = None
    for line in docstring.splitlines():
        if start := re.match(r" {4}(\d) [a-z ]+?  +(\S.*)$", line):
            floor, names = int(start[1]), start[2]
        elif floor is not None and re.match(r" {15,}\S", line):
            names = line
        else:
            floor = None
            continue
        listed += [(name, floor) for name in re.findall(r"\w+", names)]
    return listed


MAP = read_map(qlora.__doc__ or "")
FLOOR = dict(MAP)
GROUND = sorted(name for name, floor in MAP if floor == 0)
every_module = pytest.mark.parametrize("name", sorted(FILES))


def imports(source: str) -> Iterator[tuple[str, str | None, bool]]:
    """(module, name taken from it, whether it happens when the file is imported)."""
    tree = ast.parse(source)
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = "qlora" if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from ((module, alias.name, id(node) not in later) for alias in node.names)


def neighbours(source: str, *, on_import: bool = False) -> set[str]:
    """The modules of the package that a source imports, in any of the ways to write it."""
    found = set()
    for module, name, at_once in imports(source):
        top, _, inner = module.partition(".")
        if top != "qlora" or (on_import and not at_once):
            continue
        if inner:
            found.add(inner.partition(".")[0])
        elif name in FILES:
            found.add(name)
    return found


def outsiders(source: str) -> set[str]:
    """The other packages that a source imports, at once or later."""
    return {module.partition(".")[0] for module, _, _ in imports(source)} - {"qlora", ""}


def text(name: str) -> str:
    """The source of a module; of a folder, all its files."""
    path = FILES[name]
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def run(code: str) -> dict[str, object]:
    """What a fresh interpreter says in its last line, which is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


# --- the readers of this test, held to examples of their own


def test_the_map_reader_takes_lines_that_go_on() -> None:
    sample = "Text.\n\n    1 first floor   cli,\n                    hub\n    0 ground  a, b\n\nMore, text."
    assert read_map(sample) == [("cli", 1), ("hub", 1), ("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    "line",
    [
        "import qlora.hub",
        "import qlora.hub as h",
        "from qlora import hub",
        "from qlora import __version__, hub",
        "from qlora.hub import unreachable",
        "from . import hub",
        "from .hub import unreachable",
        "def f():\n    from qlora import hub",
        "class A:\n    def f(self):\n        import qlora.hub",
    ],
)
def test_every_way_to_import_a_neighbour_is_seen(line: str) -> None:
    assert neighbours(line) == {"hub"}
    assert neighbours(line, on_import=True) == (set() if "def" in line else {"hub"})


# --- the map


def test_every_module_stands_on_exactly_one_floor() -> None:
    assert sorted(name for name, _ in MAP) == sorted(FILES)
    assert {floor for _, floor in MAP} == {0, 1, 2, 3}


@every_module
def test_a_module_imports_along_its_own_floor_or_from_below(name: str) -> None:
    above = {other for other in neighbours(text(name)) if FLOOR[other] > FLOOR[name]}
    assert above == set()


def test_importing_modules_never_goes_round_in_a_circle() -> None:
    graph = {name: neighbours(text(name), on_import=True) - {name} for name in FILES}
    assert sum(map(len, graph.values())) > 40  # the graph is really there
    while free := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert graph == {}


def test_importing_within_a_folder_never_goes_round_in_a_circle() -> None:
    folders, found = [path for path in FILES.values() if path.is_dir()], 0
    for folder in folders:
        graph = {}
        for file in folder.glob("*.py"):
            own = rf"^from qlora\.{folder.name}(?:\.(\w+) import| import (\w+))"
            names = re.findall(own, file.read_text(encoding="utf-8"), re.MULTILINE)
            graph[file.stem] = {first or second for first, second in names}
        found += sum(map(len, graph.values()))
        while free := {name for name, needs in graph.items() if not needs & graph.keys()}:
            graph = {name: needs for name, needs in graph.items() if name not in free}
        assert graph == {}
    assert len(folders) > 5 and found > 40


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_floor_never_imports_the_heavy_libraries(name: str) -> None:
    assert outsiders(text(name)) & set(HEAVY) == set()


def test_the_whole_ground_floor_loads_without_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        f"for name in {GROUND!r}: importlib.import_module('qlora.' + name)\n"
        "print(json.dumps(sorted(n for n in sys.modules if '.' not in n)))"
    )
    loaded = set(run(code))
    assert {"qlora", "yaml", "pydantic"} <= loaded
    assert loaded & set(HEAVY) == set()


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_a_library_is_imported_by_its_owner_alone(library: str) -> None:
    users = {name for name in FILES if library in outsiders(text(name))}
    assert users == OWNERS[library]


@every_module
def test_the_package_never_imports_scripts_or_tests(name: str) -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert scripts
    assert outsiders(text(name)) & (scripts | {"scripts", "tests"}) == set()


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert {path.stem for path in PACKAGE.rglob("*") if path.stem in drawers} == set()


# --- the door


@pytest.mark.parametrize("module", ["qlora", "qlora.cli"])
def test_importing_changes_no_environment_no_logging_and_loads_no_torch(module: str) -> None:
    code = f"""
import json, logging, os, sys, warnings
root = logging.getLogger()
def state():
    return [dict(os.environ), root.level, list(map(repr, root.handlers)), logging.root.disabled,
            logging.raiseExceptions, list(map(repr, warnings.filters)), os.getcwd()]
before = state()
import {module}
print(json.dumps([before == state(), sorted(set({HEAVY!r}) & set(sys.modules))]))
"""
    assert run(code) == [True, []]


@pytest.mark.parametrize("name", qlora.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(qlora, name) is not None
    assert name in dir(qlora)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'finetune'"):
        _ = qlora.finetune


def test_the_public_names_are_what_type_checkers_see() -> None:
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    taken = {(module, name) for module, name, at_once in imports(source) if not at_once}
    assert {name for module, name in taken if module.startswith("qlora.")} == {
        name for name in qlora.__all__ if name != "__version__"
    }
    for module, name in taken:
        if module.startswith("qlora.") and name is not None:
            assert getattr(importlib.import_module(module), name) is getattr(qlora, name)


# --- examples in docstrings


@pytest.mark.parametrize("name", GROUND)
def test_the_examples_of_the_ground_floor_run(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # an example must not lean on where it is run
    module: ModuleType = importlib.import_module(f"qlora.{name}")
    assert doctest.testmod(module).failed == 0


def test_there_are_examples_to_run() -> None:
    finder = doctest.DocTestFinder()
    examples = [
        example
        for name in GROUND
        for found in finder.find(importlib.import_module(f"qlora.{name}"))
        for example in found.examples
    ]
    assert len(examples) >= 4


def test_no_module_reads_the_environment_when_it_is_imported() -> None:
    """What is read at import cannot be changed by a notebook that sets it afterwards."""
    readers = set()
    for name in FILES:
        for node in ast.parse(text(name)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            if "os.environ" in ast.unparse(node) or "os.getenv" in ast.unparse(node):
                readers.add(name)
    assert readers == set()
