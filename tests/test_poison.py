"""Files that would run code if anything executed them: nothing does, and what is wrong is said.

Each case plants a payload that makes a marker file. The first test shows that the payloads work.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BASE, REPOSITORY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import adapter, generation, loader, rundir, sources, tokenizer
from qlora.errors import CheckpointError, DataError, ModelError, RecipeError
from qlora.generation import Sampling
from qlora.recipe import load_recipe, recipe_from
from qlora.records import Turn
from qlora.rendering import Renderer

PICKLES = (
    "pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
    "scaler.pt", "adapter_model.bin", "tokenizer.pkl", ".mdl", "model.pt", "consolidated.00.pth",
)  # fmt: skip


class Payload:
    """Unpickling it makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a payload would leave its mark; that it did not is asserted after every test."""
    path = tmp_path / "EXECUTED"
    monkeypatch.setenv(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"
    )  # what makes torch.load unsafe again
    yield path
    assert not path.exists(), "a planted payload was run"


@pytest.fixture
def evil(marker: Path) -> dict[str, bytes]:
    """The payload as a plain pickle, as torch writes it, and as a module."""
    path = marker.parent / "payload.pt"
    torch.save({"state": Payload(marker)}, path)
    return {
        "pickle": pickle.dumps({"state": Payload(marker)}),
        "torch": path.read_bytes(),
        "python": f"open({str(marker)!r}, 'w').close()\n".encode(),
    }


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be poisoned."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plant(folder: Path, evil: dict[str, bytes]) -> None:
    """Every pickle that a loader of the field would open, and Python files with well-known names."""
    for number, name in enumerate(PICKLES):
        (folder / name).write_bytes(evil["torch" if number % 2 == 0 else "pickle"])
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "setup", "conftest"):
        (folder / f"{name}.py").write_bytes(evil["python"])
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_bytes(evil["python"])
    (folder / "__init__.py").write_bytes(evil["python"])


def load(recipe: Any, cpu: Any) -> tuple[Any, Any]:
    """Everything that a run loads of a base."""
    config = loader.read_config(recipe)
    tok, _ = tokenizer.load(recipe, config.commit)
    return loader.load_base(recipe, cpu, config, bars=False).model, tok


def test_the_payloads_work_where_they_are_executed(tmp_path: Path) -> None:
    marker = tmp_path / "EXECUTED"
    saved = tmp_path / "payload.pt"
    torch.save({"state": Payload(marker)}, saved)
    for run in (
        lambda: pickle.loads(pickle.dumps(Payload(marker))),
        lambda: torch.load(saved, weights_only=False),
        lambda: exec(f"open({str(marker)!r}, 'w').close()"),
    ):
        run()
        assert marker.exists()
        marker.unlink()


# --- a model folder


def test_a_base_with_pickles_and_python_files_beside_it_loads_and_answers(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes]
) -> None:
    plant(model, evil)
    loaded, tok = load(make_recipe(model__name=str(model)), cpu)
    said: list[str] = []
    ids = tok("Hello")["input_ids"]
    generation.stream(loaded, tok, ids, Sampling(max_new_tokens=2), said.append)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_base_that_has_only_pickled_weights_is_refused(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes], name: str, kind: str
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(evil[kind])
    with pytest.raises(ModelError, match=r"no safetensors weights.*not opened.*can run code"):
        load(make_recipe(model__name=str(model)), cpu)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_that_is_called_safetensors_is_refused(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes], kind: str
) -> None:
    (model / "model.safetensors").write_bytes(evil[kind])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(make_recipe(model__name=str(model)), cpu)


def test_an_index_of_pickled_shards_is_not_followed(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes]
) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model-00001-of-00001.bin").write_bytes(evil["torch"])
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no safetensors weights"):
        load(make_recipe(model__name=str(model)), cpu)


@pytest.mark.parametrize("named", ["payload.bin", "../payload.pt", "/etc/passwd"])
def test_an_index_of_safetensors_that_names_something_else_opens_no_pickle(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes], named: str
) -> None:
    (model / "payload.bin").write_bytes(evil["torch"])
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, named)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"is damaged|lies outside"):
        load(make_recipe(model__name=str(model)), cpu)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_takes_in_no_weights_of_another_folder(
    make_recipe: Any, cpu: Any, model: Path, tmp_path: Path, absolute: bool
) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    named = str(tmp_path / "outside.safetensors") if absolute else "../outside.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, named)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"its index names .*outside\.safetensors, which lies outside"
    ):
        load(make_recipe(model__name=str(model)), cpu)


# --- code of a repository


AUTO_MAP = {
    "AutoConfig": "configuration_evil.EvilConfig",
    "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
}


def test_a_family_that_transformers_knows_is_loaded_without_the_repositorys_code(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes], capfd: Any
) -> None:
    plant(model, evil)
    edit(model / "config.json", auto_map=AUTO_MAP, trust_remote_code=True)
    recipe = make_recipe(model__name=str(model))
    loaded, _ = load(recipe, cpu)
    assert type(loaded).__module__.startswith("transformers.models.llama")
    assert not hasattr(loaded.config, "auto_map")
    assert "trust_remote_code" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_family_that_only_the_repositorys_code_knows_is_refused(
    make_recipe: Any, cpu: Any, model: Path, evil: dict[str, bytes], where: str
) -> None:
    plant(model, evil)
    prefix = "" if where == "here" else "somebody/else--"
    named = {key: prefix + name for key, name in AUTO_MAP.items()}
    edit(model / "config.json", model_type="evil", auto_map=named, architectures=["Evil"])
    with pytest.raises(ModelError) as caught:
        load(make_recipe(model__name=str(model)), cpu)
    message = str(caught.value)
    for part in (
        "the family 'evil'", "auto_map in its config.json", f"{prefix}configuration_evil.EvilConfig",
        "somebody's code with your rights", "never run here", "convert this one elsewhere",
    ):  # fmt: skip
        assert part in message


def test_an_unknown_family_without_code_is_not_called_dangerous(
    make_recipe: Any, cpu: Any, model: Path
) -> None:
    edit(model / "config.json", model_type="lamma")
    with pytest.raises(
        ModelError, match=r"family 'lamma', which .* does not know\. Correct model_t"
    ):
        load(make_recipe(model__name=str(model)), cpu)


def test_a_tokenizer_that_needs_the_repositorys_code_is_refused(
    make_recipe: Any, model: Path, evil: dict[str, bytes]
) -> None:
    plant(model, evil)
    edit(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]},
        tokenizer_class="EvilTokenizer",
    )
    with pytest.raises(
        ModelError, match=r"auto_map in its tokenizer_config.json.*with your rights"
    ):
        tokenizer.load(make_recipe(model__name=str(model)))


@pytest.mark.parametrize("named", [["tokenization_evil.Evil", None], "tokenization_evil.Evil"])
def test_a_tokenizer_that_has_another_way_is_loaded_without_code(
    make_recipe: Any, model: Path, evil: dict[str, bytes], named: Any
) -> None:
    plant(model, evil)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": named})
    tok, _ = tokenizer.load(make_recipe(model__name=str(model)))
    assert tok("Hello")["input_ids"] == AutoTokenizer.from_pretrained(BASE)("Hello")["input_ids"]


@pytest.mark.parametrize(
    "key",
    [
        "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
        "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
    ],
)  # fmt: skip
def test_a_configuration_cannot_choose_which_code_computes(
    make_recipe: Any, cpu: Any, model: Path, key: str
) -> None:
    """Kernels are code: CVE-2026-4372 fetched one from the hub for such a key."""
    edit(model / "config.json", **{key: "somebody/kernel"})
    config = loader.read_config(make_recipe(model__name=str(model)))
    assert config.config._attn_implementation_internal is None
    assert config.config._experts_implementation_internal is None
    assert loader.load_base(make_recipe(model__name=str(model)), cpu, config, bars=False).facts[
        "attention"
    ] in ("sdpa", "eager")


# --- adapters and checkpoints


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, on its plain 32-bit weights."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("trained") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft 0.21 asks transformers 5.23 by an old name
        get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.mark.parametrize("name", ["adapter", "checkpoint-7"])
def test_pickles_beside_an_adapter_or_in_a_checkpoint_are_not_opened(
    base: Any, trained: Path, tmp_path: Path, evil: dict[str, bytes], name: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / name))
    plant(folder, evil)
    loaded = adapter.load(base, folder)
    saved = load_file(trained / "adapter_model.safetensors")
    assert adapter.count(loaded).total > sum(tensor.numel() for tensor in saved.values()) > 0


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_an_adapter_that_is_only_a_pickle_is_refused(
    base: Any, trained: Path, tmp_path: Path, evil: dict[str, bytes], kind: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").rename(folder / "weights")
    (folder / "adapter_model.bin").write_bytes(evil[kind])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        adapter.load(base, folder)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_an_adapter_whose_safetensors_are_a_pickle_never_runs_it(
    base: Any, trained: Path, tmp_path: Path, evil: dict[str, bytes], kind: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").write_bytes(evil[kind])
    with pytest.raises(CheckpointError, match="adapter"):
        adapter.load(base, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "evil_module"},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}},
        {"base_model_name_or_path": "evil_module", "revision": "main"},
    ],
)
def test_an_adapters_configuration_imports_no_module_that_it_names(
    base: Any, trained: Path, tmp_path: Path, evil: dict[str, bytes], changes: Any, monkeypatch: Any
) -> None:
    (tmp_path / "evil_module.py").write_bytes(evil["python"])
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = Path(shutil.copytree(trained, tmp_path / "adapter"))
    edit(folder / "adapter_config.json", **changes)
    try:
        adapter.load(base, folder)
    except CheckpointError as error:
        assert "security risk" in str(error)
    assert "evil_module" not in sys.modules


def test_a_manifest_cannot_reach_out_of_its_checkpoint(tmp_path: Path) -> None:
    """Whatever a checkpoint says it is made of, a file outside is neither believed nor changed."""
    run = rundir.create(tmp_path, "run")
    rundir.write_text(run.recipe_file, "")
    outside = tmp_path / "outside"
    outside.write_text("mine")
    checkpoint = run.checkpoints / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    listed = {"size": 4, "bytes": 4, "sha256": rundir.sha256(outside)}
    name = os.path.relpath(outside, checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {name: listed}, "step": 1}))
    assert rundir.defect(checkpoint) is not None
    assert outside.read_text() == "mine"


# --- chat templates


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.system('CODE') }}",
    "{{ joiner.__init__.__globals__['os'].popen('CODE').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__class__ }}",
    "{{ lipsum.__globals__.os.system('CODE') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__.os.system('CODE') }}",
    "{{ dict.__class__.__call__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{% set f = 'x'.format %}{{ ['{0.__class__}'] | map('format', 1) | list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('CODE') }}",
    "{% extends 'base' %}",
    "{{ range.__self__ }}",
    "{{ caller.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list) }}",
    "{{ ([1] | groupby('__class__')) | list }}",
    "{{ ([1] | sum(attribute='__class__')) }}",
    "{{ url_for.__globals__ }}{{ config }}{{ request.application }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ (messages | first).update({'role': 'x'}) }}",
    "{{ tools.__class__ }}{{ ().__class__.__bases__ }}",
    "{%- generation %}{{ caller.__globals__ }}{% endgeneration %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_get_out_of_its_sandbox(template: str, marker: Path) -> None:
    tok = AutoTokenizer.from_pretrained(BASE)
    tok.chat_template = template.replace("CODE", f"touch {marker}")
    try:
        text = tokenizer.render(tok, [Turn("user", "hello")])
    except (DataError, ModelError):
        return
    for leaked in ("<class", "<module", "function", "environment", "root:", "0x"):
        assert leaked not in text


def test_a_template_in_the_model_folder_is_held_to_the_same(
    make_recipe: Any, model: Path, marker: Path
) -> None:
    code = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    (model / "chat_template.jinja").write_text(code)
    tok, _ = tokenizer.load(make_recipe(model__name=str(model)))
    with pytest.raises(DataError, match=r"refuses the turns.*unsafe"):
        Renderer(tok, chat=True)
    (model / "chat_template.jinja").write_text("{{ 1 }}" + "x" * 70_000)
    with pytest.raises(ModelError, match=r"its chat template: 70,007 characters; at most 65,536"):
        tokenizer.load(make_recipe(model__name=str(model)))


# --- recipes


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch MARKER']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['MARKER']]",
        "!!python/object/new:subprocess.Popen [['touch', 'MARKER']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch MARKER']",
        "!!binary aGVsbG8=",
    ],
)
def test_a_recipe_builds_no_object_in_a_file_or_an_override(
    value: str, marker: Path, tmp_path: Path
) -> None:
    written = value.replace("MARKER", str(marker))
    file = tmp_path / "evil.yaml"
    file.write_text(f"model:\n  name: {written}\ndata:\n  train: rows.jsonl\n")
    with pytest.raises(RecipeError, match=r"evil\.yaml:2: tag .* is not read; remove it"):
        load_recipe(file)
    with pytest.raises(RecipeError):
        load_recipe("quickstart", [f"train.max_steps={written}"])


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/b", "/tmp/evil", "..", ".", "a\\b", "-x/../../y", "a\x00b", "~root", "a\n"],
)
def test_the_name_of_a_run_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.name"):
        recipe_from(
            {"model": {"name": "embedded:base"}, "run": {"name": name, "dir": str(tmp_path)},
             "data": {"train": str(REPOSITORY / "README.md")}}
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# --- data


@pytest.mark.parametrize("ending", [*sources.ENDINGS, ".jsonl.gz", ".jsonl.zst", ".csv.gz"])
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_that_is_called_data_is_refused(
    tmp_path: Path, evil: dict[str, bytes], ending: str, kind: str
) -> None:
    file = tmp_path / f"rows{ending}"
    file.write_bytes(evil[kind])
    with pytest.raises(DataError, match=f"rows{ending}"):
        sources.read(file)


@pytest.mark.parametrize(
    "name", ["rows.py", "rows.pkl", "rows.pt", "rows.npy", "rows.tar", "rows.zip"]
)
def test_a_script_or_a_container_of_objects_is_no_data(
    tmp_path: Path, evil: dict[str, bytes], name: str
) -> None:
    (tmp_path / name).write_bytes(evil["python" if name == "rows.py" else "torch"])
    with pytest.raises(DataError, match=r"are not read. Known endings"):
        sources.read(tmp_path / name)


def test_a_folder_with_a_data_set_script_is_no_data(tmp_path: Path, evil: dict[str, bytes]) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_bytes(evil["python"])
    with pytest.raises(DataError, match="a folder; name the data files in it"):
        sources.read(tmp_path / "set")


def test_a_compressed_file_is_read_row_by_row_whatever_it_grows_to(tmp_path: Path) -> None:
    """200 MB out of 0.2 MB: in constant memory where they are rows."""
    file = tmp_path / "bomb.jsonl.gz"
    row = json.dumps({"text": "a" * 10_000}).encode() + b"\n"
    with gzip.open(file, "wb") as packed:
        for _ in range(200):
            packed.write(row * 100)
    assert file.stat().st_size < 10**6
    code = (
        "import resource, sys, pathlib; from qlora import sources\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = sum(1 for _ in sources.stream(pathlib.Path(sys.argv[1])))\n"
        "print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    rows, megabytes = map(int, done.stdout.split())
    assert rows == 20_000 and megabytes < 50


# --- telemetry


def test_the_libraries_of_the_hub_report_nobody(tmp_path: Path) -> None:
    """TRL would, when a trainer is made; its switch is asked for here, with the variable unset."""
    code = """
import json, sys
from huggingface_hub.utils import _telemetry, send_telemetry
from qlora import loader
_telemetry._start_telemetry_thread = lambda: None
send_telemetry("trl/SFTTrainer")
before = _telemetry._TELEMETRY_QUEUE.qsize()
loader.keep_telemetry_off()
send_telemetry("trl/SFTTrainer")
print(json.dumps([before, _telemetry._TELEMETRY_QUEUE.qsize()]))
"""
    unset = {"HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "DO_NOT_TRACK"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={name: value for name, value in os.environ.items() if name not in unset}
        | {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 1]


def test_telemetry_is_off_once_a_base_was_looked_at(make_recipe: Any, monkeypatch: Any) -> None:
    """Which is before any weight is fetched and before a trainer is made."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    loader.read_config(make_recipe())
    assert constants.HF_HUB_DISABLE_TELEMETRY is True


# --- what is written


def test_what_is_saved_holds_no_pickle(trained: Path, base: Any, tmp_path: Path) -> None:
    loaded = adapter.load(base, trained)
    adapter.save(loaded, tmp_path / "again", "embedded:base")
    assert {path.suffix for path in (tmp_path / "again").iterdir()} <= {".json", ".safetensors"}
