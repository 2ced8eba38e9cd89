"""What goes to the hub is a list that was shown and agreed to; private, and with nothing of this "
"machine in it."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from rich.console import Console

from qlora import document, export, merging, modelcard, trained, trainer
from qlora.errors import ExportError
from qlora.export import publishing
from qlora.recipe import recipe_from
from qlora.screen import Screen

SECRET = "hf_" + "a" * 34
TOKEN = "hf_" + "t" * 34
pytestmark = pytest.mark.usefixtures("one_thread", "light")


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that an upload asks for; whatever arrives is kept."""

    def _reply(self, status: int, value: Any = None, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        served: Any = self.server
        served.asked.append(("GET", self.path, None, self.headers.get("authorization")))
        if not self.path.startswith("/api/models/"):
            self._reply(200, [])
        elif served.private is None:
            self._reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            self._reply(
                200, {"id": "me/model", "private": served.private, "siblings": [], "tags": []}
            )

    def do_POST(self) -> None:
        served: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        served.asked.append(("POST", self.path, lines, self.headers.get("authorization")))
        if self.path == "/api/repos/create":
            served.private = lines[0]["visibility"] == "private" and not served.forgets
            self._reply(200, {"url": "http://127.0.0.1/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in lines[0]["files"]
            ]
            self._reply(200, {"files": files})
        elif served.fails:
            self._reply(403, {"error": f"You may not write here with {SECRET}"})
        else:
            url = "http://127.0.0.1/me/model/commit/" + "c" * 40
            self._reply(200, {"success": True, "commitOid": "c" * 40, "commitUrl": url})

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub on this machine that has no repository yet."""
    from huggingface_hub import constants

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as served:
        served.daemon_threads = True
        served.private, served.fails, served.forgets, served.asked = None, False, False, []  # type: ignore
        threading.Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{served.server_port}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served
        served.shutdown()


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a local base, with a merged model in it."""
    folder = tmp_path_factory.mktemp("published")
    rows = folder / "customers.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = recipe_from(
        {
            "model": {"name": str(tiny)},
            "data": {"train": str(rows), "max_length": 128, "held_out_fraction": 0.1},
            "lora": {"r": 4},
            "train": {"max_steps": 2, "activation_checkpointing": False, "learning_rate": 1e-2},
            "run": {"dir": str(folder / "runs"), "name": "tiny"},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(folder / "cache"))
        made = trainer.train(recipe, console=Console(quiet=True))
        merging.merge(made.dir, console=Console(quiet=True))
    return made.dir


def send(where: Path, **settings: Any) -> tuple[list[str], str]:
    """What was shown, and the address."""
    shown: list[str] = []

    def agree(lines: Any) -> bool:
        shown.extend(lines)
        return True

    settings = {"repo": "me/model", "agree": agree, **settings}
    made = export.export(where, "hub", console=Console(quiet=True), **settings)
    return shown, made.where


def commit_of(server: Any) -> dict[str, bytes]:
    """The files of the one commit that arrived."""
    ((_, _, lines, _),) = [one for one in server.asked if "/commit/" in one[1]]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }


def test_an_adapter_arrives_in_a_new_private_repository_and_nothing_else_does(
    server: Any, run: Path
) -> None:
    (run / "adapter" / "private.txt").write_text("mine")  # somebody's own file beside it
    shown, address = send(run)
    (run / "adapter" / "private.txt").unlink()
    files = commit_of(server)
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (
        files["adapter_model.safetensors"]
        == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    assert all(any(name in line for line in shown) for name in files) and "private" in shown[0]
    ((_, _, (created,), _),) = [one for one in server.asked if one[1] == "/api/repos/create"]
    assert created["visibility"] == "private" and created["name"] == "model"
    assert {one[3] for one in server.asked if "/models/" in one[1]} == {f"Bearer {TOKEN}"}
    assert address.endswith("/me/model")


def test_nothing_that_is_sent_tells_of_this_machine_or_of_a_row(
    server: Any, run: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(run)
    for name, content in commit_of(server).items():
        if name in ("tokenizer.json", "adapter_model.safetensors"):
            continue
        text = content.decode()
        for place in (str(run), str(tiny), str(Path.home()), "customers"):
            assert place not in text, (name, place)
        assert not any(row["completion"] in text for row in ROWS)
    config = json.loads(commit_of(server)["adapter_config.json"])
    assert config["base_model_name_or_path"] is None  # a local folder means nothing elsewhere


def test_a_base_that_is_named_stands_in_the_card_and_in_the_configuration(
    server: Any, run: Path
) -> None:
    send(run, base="some/base")
    files = commit_of(server)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "some/base"
    front = document.parse(files["README.md"].decode().split("---")[1], "card").value
    assert front["base_model"] == "some/base" and front["library_name"] == "peft"


def test_a_merged_model_is_sent_without_the_record_of_its_merge(server: Any, run: Path) -> None:
    send(run, merged=True)
    assert set(commit_of(server)) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_public_has_to_be_asked_for(server: Any, run: Path) -> None:
    shown, _ = send(run, public=True)
    ((_, _, (created,), _),) = [one for one in server.asked if one[1] == "/api/repos/create"]
    assert created["visibility"] == "public" and "PUBLIC" in shown[0]


def test_a_public_repository_is_not_written_when_a_private_one_was_asked_for(
    server: Any, run: Path
) -> None:
    server.private = False
    with pytest.raises(ExportError, match=r"me/model: is there already, and public.*--public"):
        send(run)
    assert not [one for one in server.asked if one[0] == "POST"]


def test_a_hub_that_makes_a_public_one_all_the_same_is_sent_nothing(server: Any, run: Path) -> None:
    server.forgets = True
    with pytest.raises(ExportError, match=r"was made, but everybody can see it.*Nothing was sent"):
        send(run)
    assert not [one for one in server.asked if "/commit/" in one[1]]


def test_an_existing_private_repository_is_written_again(server: Any, run: Path) -> None:
    server.private = True
    send(run)
    assert commit_of(server) and not [one for one in server.asked if one[1] == "/api/repos/create"]


def test_without_agreement_nothing_is_sent(server: Any, run: Path) -> None:
    with pytest.raises(ExportError, match="nothing was sent"):
        send(run, agree=lambda lines: False)
    assert not [one for one in server.asked if one[0] == "POST"]


def test_a_failing_upload_says_what_is_left_and_no_secret(server: Any, run: Path) -> None:
    server.fails = True
    with pytest.raises(
        ExportError, match=r"the upload failed: .*repository was made and is empty"
    ) as raised:
        send(run)
    assert SECRET not in str(raised.value) and TOKEN not in str(raised.value)


def test_without_a_token_nothing_is_asked_but_whether_the_hub_is_there(
    server: Any, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(ExportError, match=r"no token for the hub. Set HF_TOKEN"):
        send(run)
    assert [one[1] for one in server.asked] == ["/api/models?limit=1"]


def test_an_unreachable_hub_is_told_before_anything_is_packed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ExportError, match=r"HF_HUB_OFFLINE forbids asking the hub. Nothing was sent"
    ):
        send(run)


@pytest.mark.parametrize("repo", ["model", "me/model/x", "../me", "me/", "me/a b", ""])
def test_a_name_that_no_repository_can_have_is_refused(repo: str, run: Path) -> None:
    with pytest.raises(ExportError, match=r"--repo is .*no name on the hub"):
        send(run, repo=repo)


def test_a_file_that_tells_a_place_of_this_machine_is_not_sent(run: Path, tmp_path: Path) -> None:
    config = run / "merged" / "config.json"
    was = config.read_text()
    config.write_text(json.dumps(json.loads(was) | {"_name_or_path": f"{Path.home()}/models/x"}))
    try:
        with pytest.raises(ExportError, match=r"config\.json: tells of a folder of this machine"):
            send(run, merged=True)
        config.write_text(json.dumps(json.loads(was) | {"note": SECRET}))
        with pytest.raises(ExportError, match=r"config\.json: holds what looks like a secret"):
            send(run, merged=True)
    finally:
        config.write_text(was)


def test_a_model_that_qlora_did_not_merge_is_not_sent(tiny: Path) -> None:
    with pytest.raises(ExportError, match=r"was not written by `qlora merge`"):
        send(tiny)


def test_the_card_says_counts_settings_scores_and_the_verdict(run: Path) -> None:
    found = trained.find(run)
    result = found.run.result | {
        "before": {"held_out_loss": 2.0, "exact_match": 0.0},
        "after": {"held_out_loss": 0.5, "exact_match": 0.75, "answered": 8},
    }
    near = {"kl": 1e-5, "worst_kl": 1e-4, "top1": 1.0, "max_logit": 0.01, "positions": 96}
    merged = {
        "onto": "nf4",
        "dtype": "float32",
        "verdict": near,
        "learned": near | {"kl": 3.5},
        "probes": "rows",
    }
    text = modelcard.text(found, result, merged)
    front = document.parse(text.split("---")[1], "card").value
    assert (
        front["library_name"] == "transformers"
        and "base_model" not in front
        and "license" not in front
    )
    for said in ("| held-out loss | 2.0000 | 0.5000 |", "| exact match | 0.0% | 75.0% |", "`lora.r` | `4`",
                 "KL divergence 1e-05", "unpacked 4-bit base", "rows were held out",
                 "transformers 5."):  # fmt: skip
        assert said in text, said


def test_the_screen_names_the_commit(server: Any, run: Path) -> None:
    import io

    said = io.StringIO()
    with publishing.adapter_parcel(
        trained.find(run), "me/model", public=False, base=None
    ) as parcel:
        publishing.send(parcel, Screen(Console(file=said)), lambda lines: True)
    assert "6 files in one commit ccccccc" in said.getvalue()
