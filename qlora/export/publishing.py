"""A model given to the Hugging Face hub: a list of files that was shown and agreed to, and nothing else.

The repository is private unless the opposite is asked for. Files are taken by name, never a folder; no
local path and nothing that looks like a secret is in any of them. The token is the environment's or the
hub login's.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora import hub, modelcard, redact, vault
from qlora.errors import ExportError
from qlora.recipe import is_local, local_path
from qlora.screen import Screen
from qlora.trained import MERGED, Trained

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
ADAPTER = ("README.md", "adapter_config.json", "adapter_model.safetensors", *_TOKENIZER)
MODEL = (
    "README.md", "config.json", "generation_config.json", "model.safetensors",
    "model.safetensors.index.json", *_TOKENIZER,
)  # fmt: skip
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Parcel:
    """The files that would be given away, by the names they get."""

    repo: str
    public: bool
    files: dict[str, Path]

    def lines(self) -> list[str]:
        """What is shown before anything leaves this machine."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        width = max(map(len, sizes))
        who = "PUBLIC, for everybody to see" if self.public else "private"
        listed = [f"  {name:<{width}}  {_size(size)}" for name, size in sizes.items()]
        return [f"{self.repo} ({who}): {len(sizes)} files, {_size(sum(sizes.values()))}", *listed]


@contextmanager
def adapter_parcel(
    found: Trained, repo: str, *, public: bool, base: str | None
) -> Iterator[Parcel]:
    """A run's adapter with its tokenizer and card, ready to be sent while the block runs.

    Raises:
        ExportError: ``repo`` is no name, or a file tells of a place on this machine.
    """
    assert found.run is not None and found.source is not None
    _require_names(repo, base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found.tok.save_pretrained(folder)
        config = folder / "adapter_config.json"
        config.write_text(adapter_config(found, base), encoding="utf-8")
        card = modelcard.text(found, found.run.result, base=base)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = {name: folder / name for name in ADAPTER if (folder / name).is_file()}
        files["adapter_model.safetensors"] = found.source / "adapter_model.safetensors"
        _require_no_places(files, found)
        yield Parcel(repo, public, dict(sorted(files.items())))


@contextmanager
def model_parcel(found: Trained, folder: Path, repo: str, *, public: bool) -> Iterator[Parcel]:
    """A merged model, ready to be sent.

    Raises:
        ExportError: As :func:`adapter_parcel`, or the folder is no merged model.
    """
    _require_names(repo, None)
    if not (folder / MERGED).is_file():
        raise ExportError(
            f"{folder}: was not written by `qlora merge` (no {MERGED}), so what it is is not known. "
            "Name a run."
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = {name: folder / name for name in names if name in MODEL or _SHARD.fullmatch(name)}
    _require_no_places(files, found)
    yield Parcel(repo, public, files)


def adapter_config(found: Trained, base: str | None) -> str:
    """The adapter's configuration as JSON, with a base that others know by the same name, or none."""
    assert found.source is not None
    values = json.loads((found.source / "adapter_config.json").read_text(encoding="utf-8"))
    named = base or modelcard.public_base(found)
    values["base_model_name_or_path"] = named
    values["revision"] = found.config.commit if named and not base else None
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def send(parcel: Parcel, screen: Screen, agree: Callable[[Sequence[str]], bool]) -> str:
    """Upload a parcel in one commit; its address.

    Args:
        parcel: What.
        screen: Where it is told.
        agree: Shown :meth:`Parcel.lines`; nothing is sent unless it says yes.

    Raises:
        ExportError: No token, no hub, no agreement, a repository that others can see when a private one was
            asked for, or the upload failed.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if why := hub.unreachable():
        raise ExportError(f"{parcel.repo}: the hub cannot be asked: {why}. Nothing was sent.")
    token = huggingface_hub.get_token()
    if not token:
        raise ExportError(
            f"{parcel.repo}: no token for the hub. Set HF_TOKEN, or run `hf auth login`. A recipe or an "
            "option is no place for one."
        )
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    made = False
    try:
        is_private = _visibility(api, parcel.repo, RepositoryNotFoundError)
        if is_private is False and not parcel.public:
            raise ExportError(
                f"{parcel.repo}: is there already, and public: everybody could see what is sent. Write "
                "--public if that is meant, make it private in its settings, or name another one."
            )
        if not agree(parcel.lines()):
            raise ExportError(f"{parcel.repo}: nothing was sent.")
        if is_private is None:
            api.create_repo(parcel.repo, private=not parcel.public, repo_type="model")
            made = True
            if (
                not parcel.public
                and _visibility(api, parcel.repo, RepositoryNotFoundError) is False
            ):
                raise ExportError(
                    f"{parcel.repo}: was made, but everybody can see it, which was not asked for. "
                    "Nothing was sent; remove it on the hub."
                )
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            for name, path in parcel.files.items()
        ]
        commit = api.create_commit(
            parcel.repo, operations, commit_message="Upload with qlora", repo_type="model"
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        left = (
            f" The repository was made and is empty, and {'public' if parcel.public else 'private'}."
            if made
            else ""
        )
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(
            f"{parcel.repo}: the upload failed: {redact.clean(first)}.{left} Check that the token may "
            "write there, and try again: what has arrived is not sent twice."
        ) from None
    address = f"{endpoint}/{parcel.repo}"
    screen.say("hub", f"{len(parcel.files)} files in one commit {commit.oid[:7]}: {address}")
    return address


def _visibility(api: Any, repo: str, absent: type[Exception]) -> bool | None:
    """Whether a repository is private; None where there is none that the token may see."""
    try:
        return bool(api.repo_info(repo, repo_type="model").private)
    except absent:
        return None


def _require_names(repo: str, base: str | None) -> None:
    for option, name in (("--repo", repo), ("--base", base)):
        if name is not None and not _REPO.fullmatch(name):
            raise ExportError(
                f"{option} is {name!r}, which is no name on the hub. Write it as owner/name."
            )


def _require_no_places(files: dict[str, Path], found: Trained) -> None:
    """Refuse files that tell where something lies on this machine, or a secret.

    Raises:
        ExportError: One does; says which.
    """
    places = {str(Path.home()), tempfile.gettempdir()}
    if is_local(found.recipe.model.name):
        places.add(str(local_path(found.recipe.model.name).resolve()))
    if found.run is not None:
        places.add(str(found.run.dir.resolve()))
    places = {place for place in places if len(place) > 3}
    for name, path in files.items():
        if path.suffix not in (".json", ".md", ".jinja") or name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if any(f"{place}{end}" in text for place in places for end in ('"', "/", "\\")):
            raise ExportError(
                f"{path}: tells of a folder of this machine, which is nobody else's business. Nothing "
                "was sent. Take it out, and try again."
            )
        if redact.clean(text) != text:
            raise ExportError(
                f"{path}: holds what looks like a secret. Nothing was sent. Take it out, and try again."
            )


def _size(size: int) -> str:
    return vault.human(size) if size >= 2**19 else f"{size / 1024:,.1f} KiB"
