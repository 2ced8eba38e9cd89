"""Secrets are recognized, kept out of recipes and messages, and in no file of a run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora import redact
from qlora.errors import RecipeError
from qlora.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
HEX = "0123456789abcdef" * 2 + "01234567"
HUB = "hf_" + "aB3" * 11 + "x"
SECRETS = {
    "hub": HUB,
    "hub, of an organization": "api_org_" + "aB3" * 11,
    "wandb": HEX,
    "wandb, self-hosted": f"local-{HEX}",
    "wandb, new": "wandb_v1_" + "aB3" * 20,
    "openai": "sk-" + "aB3" * 16,
    "openai, project": "sk-proj-abcdefghijklmnop",
    "anthropic": "sk-ant-api03-" + "a-B_" * 10,
    "github": "ghp_" + "aB3" * 12,
    "github, fine-grained": "github_pat_" + "aB3_" * 10,
    "gitlab": "glpat-" + "aB3-" * 6,
    "amazon": "AKIAABCDEFGHIJKLMNOP",
    "login": "https://jane:geheimnis@example.org/rows.jsonl",
    "login, proxy": "http://:geheimnis@proxy:3128",
    "key file": "-----BEGIN OPENSSH PRIVATE KEY-----",
}
HARMLESS = [
    "Qwen/Qwen3-8B", "hf_finetuned", "sk-learn", "/data/sk-learn-tutorial-rows-of-2024.jsonl",
    "task-classification-of-long-texts", "risk-ant-colony-optimization-2024", "AKIA", "ghp_short",
    "https://example.org:8080/path@2", "ssh://git@example.org/x", "mailto:me@example.org", "",
    f"/cache/models--a--b/snapshots/{HEX}/config.json", HEX + "0", HEX[:-1], HEX.upper(),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "WANDB_", "NETRC")) or "KEY" in name or "proxy" in name.lower():
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# --- what is one


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_cleaned(kind: str) -> None:
    secret = SECRETS[kind]
    assert redact.find(secret) == [()]
    assert redact.find({"a": [{"b": secret}]}) == [("a", "0", "b")]
    for text in (secret, f"cannot use {secret!r}.", f"x={secret}, y"):
        cleaned = redact.clean(text)
        assert "***" in cleaned
        for piece in (secret.partition("@")[0][-9:], secret[-9:] if "@" not in secret else "***"):
            assert piece == "***" or piece not in cleaned


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_resembles_a_secret_is_let_through(text: str) -> None:
    assert redact.find({"a": text}) == []
    assert redact.clean(text) == text


def test_a_key_that_is_a_secret_is_not_repeated_in_its_address() -> None:
    assert redact.find({"run": {HUB: 1}}) == [("run", "***")]


@pytest.mark.parametrize("key", ["hub_token", "token", "api_key", "wandb_api_key", "password"])
def test_under_the_name_of_a_secret_anything_is_one(key: str) -> None:
    assert redact.find({"train": {"sft_config": {key: "x"}}}) == [("train", "sft_config", key)]
    assert redact.find({key: ""}) == redact.find({key: None}) == redact.find({key: True}) == []


@pytest.mark.parametrize("key", ["pad_token", "eos_token", "train_new_tokens", "keys", "monkey"])
def test_other_tokens_are_words(key: str) -> None:
    assert redact.find({key: "<pad>"}) == []


def test_forty_hexadecimal_digits_are_a_commit_where_a_commit_is_expected() -> None:
    recipe = {"model": {"name": "a/b", "revision": HEX}, "data": {"train": [{"revision": HEX}]}}
    assert redact.find(recipe) == []
    assert redact.find({"run": {"project": HEX}}) == [("run", "project")]
    assert redact.find({"model": {"revision": HUB}}) == [("model", "revision")]
    kept = [
        f"revision {HEX}", f"commit: {HEX}", f"'sha': '{HEX}'", f"owner/name@{HEX}",
        f"C:\\snapshots\\{HEX}",
    ]  # fmt: skip
    assert [redact.clean(text) for text in kept] == kept
    assert redact.clean(f"the key is {HEX}") == "the key is ***"
    facts = {"commit": HEX, "base": {"revision": HEX, "note": HEX}}
    assert redact.cleaned(facts) == {"commit": HEX, "base": {"revision": HEX, "note": "***"}}


def test_a_login_loses_its_name_and_password_and_keeps_its_host() -> None:
    assert redact.clean("at http://me:a@b@proxy:3128/x") == "at http://***@proxy:3128/x"


def test_an_authorization_header_is_cleaned() -> None:
    for text in ("Authorization: Bearer abc.def-123", "{'authorization': 'Basic YXBpOng='}"):
        cleaned = redact.clean(text)
        assert "***" in cleaned and "abc.def" not in cleaned and "YXBp" not in cleaned


def test_cleaning_keeps_the_shape_and_the_numbers() -> None:
    value = {"r": 8, "on": True, "names": ("a", HUB), "none": None, "loss": 0.5}
    expected = {"r": 8, "on": True, "names": ["a", "***"], "none": None, "loss": 0.5}
    assert redact.cleaned(value) == expected


# --- secrets of this machine


def test_the_environments_secrets_are_told_by_the_names_of_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "MY_SECRET": "home-made", "DB_PASSWORD": "home-made-too", "some_api_key": "lower-case",
        "GIT_TOKEN": "short", "TOKENIZERS_PARALLELISM": "parallel", "HF_TOKEN_PATH": "/a/long/path",
        "HTTPS_PROXY": "http://me:ge%40heimnis@proxy:3128", "PLAIN": "not-a-secret",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    found = redact.secrets_in_environment()
    wanted = {"home-made", "home-made-too", "lower-case", "ge%40heimnis", "ge@heimnis"}
    assert wanted <= set(found)
    assert not {"short", "parallel", "/a/long/path", "not-a-secret"} & set(found)
    assert list(found) == sorted(found, key=lambda text: -len(text))
    said = redact.clean("home-made-too, home-made and ge@heimnis but short")
    assert said == "***, *** and *** but short"


def test_a_secret_of_the_environment_in_a_recipe_is_found_even_if_it_looks_like_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SECRET", "correct horse battery staple")
    monkeypatch.setenv("DB_PASSWORD", "postgres")
    assert redact.find({"a": "x correct horse battery staple y"}) == [("a",)]
    assert redact.find({"a": "postgres"}) == [("a",)]
    assert redact.find({"a": "rows/postgres.jsonl"}) == []  # a coincidence


def test_secrets_on_disk_are_cleaned_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    netrc = home / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password of-the-netrc\n")
    netrc.chmod(0o600)
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text("of-the-hub\n")
    assert set(redact.secrets_on_disk()) == {"of-the-netrc", "of-the-hub"}
    assert redact.clean("of-the-netrc of-the-hub") == "*** ***"
    netrc.write_text("nonsense")
    (home / ".cache" / "huggingface" / "token").write_bytes(b"\xff\xfe")
    assert redact.secrets_on_disk() == ()


# --- at the door


@pytest.fixture
def write(tmp_path: Path, rows_file: Path) -> Callable[[str], Path]:
    def write(more: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(f"model: {{name: embedded:base}}\ndata:\n  train: {rows_file}\n{more}")
        return path

    return write


@pytest.mark.parametrize(
    ("more", "line", "address"),
    [
        (f"run:\n  name: x\n  project: {HUB}\n", 6, "run.project"),
        (f"run:\n  project: {HEX}\n", 5, "run.project"),
        (f"train:\n  sft_config:\n    tags: [a, {HUB}]\n", 6, "train.sft_config.tags.1"),
        ("train:\n  sft_config:\n    hub_token: x\n", 6, "train.sft_config.hub_token"),
        (f"run:\n  report_to: {HUB}\n", 5, "run.report_to"),  # no value of this setting
        (f"run:\n  nonsense: {HUB}\n", 5, "run.nonsense"),  # no setting
    ],
)
def test_a_recipe_with_a_secret_is_refused_with_its_line(
    more: str, line: int, address: str, write: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(more))
    message = str(caught.value)
    assert f"mine.yaml:{line}: {address!r} looks like a secret." in message
    assert "HF_TOKEN" in message and "WANDB_API_KEY" in message
    assert HUB not in message and HEX not in message and len(message.splitlines()) == 1


def test_a_secret_on_the_command_line_is_refused_as_such(write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match=r"^command line: 'run.project' looks like a secret"):
        load_recipe(write(""), [f"run.project={HUB}"])
    address = "https://jane:geheimnis@example.org/rows.jsonl"
    with pytest.raises(RecipeError, match=r"'data.train.*' looks like a secret") as caught:
        load_recipe(write(""), [f"data.train={address}"])
    assert "geheimnis" not in str(caught.value)


# --- a run with canaries in the environment

CANARIES = {
    "HF_TOKEN": "hf_CANARYabcdefghijklmnopqrstuvwxyz0123",
    "WANDB_API_KEY": "ca9a41" + HEX[:34],
    "MY_SECRET": "CANARY-of-my-own",
    "HTTPS_PROXY": "http://jane:CANARY-proxy@127.0.0.1:9",
}
MARKS = (b"CANARY", CANARIES["WANDB_API_KEY"].encode(), b"amFuZTpDQU5BUlk")  # the last in base64

SCRIPT = """
import sys
from qlora import redact, trainer
from qlora.errors import QLoRAError
from qlora.recipe import load_recipe

path, trackers = sys.argv[1], sys.argv[2].split(",")
for number, tracker in enumerate(trackers):
    run = trainer.train(load_recipe(path, ["run.report_to=" + tracker]))
    print("trained", tracker, number, run.dir)
for more in (["model.name=nobody/nothing"], ["data.train=hub:nobody/nothing"], ["train.learning_rate=0.9"],
             ["run.project=hf_CANARYabcdefghijklmnopqrstuvwxyz0123"]):
    try:
        trainer.train(load_recipe(path, ["run.report_to=wandb", *more]))
    except QLoRAError as error:
        print("refused", redact.clean(str(error)))
"""


def test_no_file_and_no_line_of_a_run_holds_a_secret_of_the_environment(
    tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    """wandb offline, tensorboard and runs that fail; everything is written below one folder."""
    world = tmp_path / "world"
    for name in ("home", "tmp", "here", "cache", "runs"):
        (world / name).mkdir(parents=True)
    recipe = world / "here" / "mine.yaml"
    recipe.write_text(
        f"model: {{name: {tiny}}}\ndata: {{train: {rows_file}, max_length: 128}}\n"
        "train: {max_steps: 3, save_steps: 2, logging_steps: 1, per_device_train_batch_size: 4}\n"
        f"run: {{dir: {world / 'runs'}, name: mine}}\n"
    )
    has = importlib.util.find_spec("tensorboard") is not None
    trackers = ["wandb", *(["tensorboard"] if has else [])]
    environment = {
        **{key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ},
        **CANARIES,
        "HOME": str(world / "home"), "TMPDIR": str(world / "tmp"), "PYTHONPATH": str(ROOT),
        "QLORA_CACHE": str(world / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1", "WANDB_MODE": "offline",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(recipe), ",".join(trackers)],
        capture_output=True, cwd=world / "here", env=environment, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said.decode()
    assert said.count(b"trained ") == len(trackers) and said.count(b"refused ") >= 3
    files = [path for path in world.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.suffix for path in files} | {path.name for path in files}
    assert {".wandb", "debug.log", "environment.json", "metrics.jsonl", ".safetensors"} <= names
    assert not has or any("tfevents" in path.name for path in files)
    places = {"output": said} | {str(path): path.read_bytes() for path in files}
    assert [(place, mark) for place, text in places.items() for mark in MARKS if mark in text] == []
