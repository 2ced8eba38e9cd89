"""llama.cpp's own converter to GGUF: where it is, fetched once if it is nowhere, and run with care.

No package of the index converts a Hugging Face model to GGUF (looked at for llama.cpp of October 2026),
but the source archive of llama-cpp-python carries the converter that llama.cpp keeps. Of that one
archive, whose hash stands here, the converter's files alone are unpacked; nothing of it is built or
installed. It runs in a process of its own, which has no network, no token and no home.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from qlora import places, redact, rundir, vault
from qlora.errors import ExportError

VERSION = "0.3.36"  # of llama-cpp-python; its llama.cpp is 0c1e570
ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ARCHIVE_BYTES = 76_589_250
INDEX = "https://pypi.org/simple"
SCRIPT = "convert_hf_to_gguf.py"
TIMEOUT_SECONDS = 30.0  # without a byte from the index
MAX_LISTING_BYTES = MAX_UNPACKED_BYTES = 16 * 2**20
_WANTED = re.compile(
    r"(LICENSE|convert_hf_to_gguf\.py|conversion/\w+\.py|gguf-py/LICENSE|gguf-py/gguf/\w+\.py)"
)
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG",
         "LC_ALL", "OMP_NUM_THREADS")  # fmt: skip

_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qlora import hints; hints.main()"


def find(named: str | None = None) -> Path | None:
    """The folder of a converter that is here: the named one, ``LLAMA_CPP``, or the fetched one.

    Raises:
        ExportError: The named folder is no checkout of llama.cpp.
    """
    asked = named or os.environ.get("LLAMA_CPP")
    if asked:
        folder = places.expanded(asked)
        if not places.is_file(folder / SCRIPT) or not places.is_dir(folder / "conversion"):
            origin = "--llama-cpp" if named else "LLAMA_CPP"
            raise ExportError(
                f"{origin} is {str(asked)!r}, which holds no {SCRIPT} with its folder `conversion`. Name a "
                "checkout of llama.cpp, of June 2026 or later, or leave it out: the converter is then "
                "fetched."
            )
        return folder.resolve()
    kept = _place()
    return kept if rundir.defect(kept) is None else None


def fetch(watch: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """The converter's folder after its archive was downloaded, checked and unpacked into the cache.

    Args:
        watch: Told how many bytes are here, and of how many.

    Raises:
        ExportError: The index cannot be asked, what it gave is another file, or the disk is full.
    """
    kept = _place()
    advice = (
        "Try again later, set PIP_INDEX_URL to an index that can be reached, or name a checkout of "
        "llama.cpp with --llama-cpp or the variable LLAMA_CPP."
    )
    try:
        with tempfile.TemporaryFile() as file:
            _download(file, watch)
            file.seek(0)
            shutil.rmtree(kept, ignore_errors=True)  # a damaged one
            with rundir.writing_aside(kept) as aside:
                _unpack(file, aside)
                rundir.seal(aside)
    except (OSError, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        words = redact.clean(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)
        raise ExportError(
            f"GGUF needs llama.cpp's converter, which is fetched once ({ARCHIVE}, "
            f"{vault.human(ARCHIVE_BYTES)}) from {redact.clean(_index())}: {words}.\n  {advice}"
        ) from None
    return kept


def convert(
    folder: Path,
    model: Path,
    target: Path,
    kind: str,
    told: Mapping[str, Any],
    *,
    seconds: float,
    alive: Callable[[int], None] = lambda size: None,
) -> None:
    """Have a model folder written as one GGUF file.

    Args:
        folder: Of the converter.
        model: A plain 16- or 32-bit Hugging Face model.
        target: The file.
        kind: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        told: What :mod:`qlora.hints` reads: ``pre``, ``space_prefix``, ``add_bos``, ``tokens`` and
            ``chat_template``.
        seconds: After which it is given up.
        alive: Told now and then how many bytes the file has.

    Raises:
        ExportError: The converter failed or took too long; its last line stands in the message.
    """
    with tempfile.TemporaryDirectory() as home:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {
            "HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        errors = Path(home) / "errors"
        with errors.open("wb") as stderr:
            package = str(Path(__file__).resolve().parent.parent)
            command = [
                sys.executable, "-c", _CODE, package, str(folder / SCRIPT), json.dumps(told),
                str(model.resolve()), "--outfile", str(target.resolve()), "--outtype", kind,
            ]  # fmt: skip
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr,
                env=environment, cwd=home,
            )  # fmt: skip
            try:
                for waited in _ticks(process, seconds):
                    if waited is None:
                        raise ExportError(
                            f"llama.cpp's converter was stopped: not done after {seconds:.0f} seconds. "
                            f"{vault.human(_size(target))} were written. Is the disk slow or full?"
                        )
                    alive(_size(target))
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        said = errors.read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0 or not target.is_file():
        raise ExportError(_failed(process.returncode, said, model))


def _failed(code: int, said: str, model: Path) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = redact.clean(lines[-1] if lines else "it said nothing")
    start = f"llama.cpp's converter could not write {model.name} (exit code {code}): {last}"
    if "pre-tokenizer was not recognized" in said:
        return (
            f"{start}\n  Its tokenizer cuts words as no pre-tokenizer of llama.cpp does, so each prompt "
            "would have other tokens than training. Serve this model with `qlora serve` or vLLM instead."
        )
    if "is not supported" in said:
        return (
            f"{start}\n  llama.cpp does not know this architecture, or this version ({VERSION}) does not "
            "yet: name a newer checkout with --llama-cpp."
        )
    return start


def _ticks(process: subprocess.Popen[bytes], seconds: float) -> Iterator[float | None]:
    """Seconds gone, twice a second until the process ends; None when the time is over."""
    began = time.monotonic()
    while True:
        try:
            process.wait(0.5)
            return
        except subprocess.TimeoutExpired:
            gone = time.monotonic() - began
            yield gone if gone < seconds else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _place() -> Path:
    return places.cache() / "converters" / f"llama.cpp-{ARCHIVE_SHA256[:16]}"


def _index() -> str:
    return (os.environ.get("PIP_INDEX_URL") or INDEX).rstrip("/")


def _page() -> str:
    return f"{_index()}/llama-cpp-python/"


def _open(url: str, accept: str = "*/*") -> Any:
    """An answer of the index; a login in its address goes to that host alone, and with no redirection."""
    parts = urlsplit(url)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    asked = urllib.request.Request(
        urlunsplit(bare), headers={"User-Agent": "qlora", "Accept": accept}
    )
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        basic = base64.b64encode(login.encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {basic}")
    return urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS)


def _download(file: IO[bytes], watch: Callable[[int, int], None]) -> None:
    """The archive from the package index, believed for its hash alone."""
    page = _page()
    with _open(page, "application/vnd.pypi.simple.v1+json, text/html;q=0.5") as answer:
        listing = answer.read(MAX_LISTING_BYTES).decode("utf-8", "replace")
    named = re.search(rf"""["']([^"'\s]*{re.escape(ARCHIVE)})(?:#[^"']*)?["']""", _links(listing))
    if named is None:
        raise ValueError(f"it lists no {ARCHIVE}")
    digest, done = hashlib.sha256(), 0
    with _open(urljoin(page, named[1])) as answer:
        while piece := answer.read(2**20):
            done += len(piece)
            if done > ARCHIVE_BYTES:
                break
            digest.update(piece)
            file.write(piece)
            watch(done, ARCHIVE_BYTES)
    if done != ARCHIVE_BYTES or digest.hexdigest() != ARCHIVE_SHA256:
        raise ValueError(
            f"what it gave as {ARCHIVE} is another file (its SHA-256 is not the known one)"
        )


def _links(listing: str) -> str:
    """Of an index's answer, in JSON or HTML, the text in which addresses stand in quotes."""
    try:
        return " ".join(f'"{one["url"]}"' for one in json.loads(listing)["files"])
    except (ValueError, KeyError, TypeError):
        return listing


def _unpack(file: IO[bytes], folder: Path) -> None:
    """Of the archive, the converter's own files: plain, each once, and not more than it has."""
    seen, total = set(), 0
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for member in archive:
            inner = member.name.partition("/vendor/llama.cpp/")[2]
            if not _WANTED.fullmatch(inner) or not member.isfile():
                continue
            total += member.size
            if inner in seen or total > MAX_UNPACKED_BYTES:
                raise ValueError(f"{ARCHIVE} does not hold what it did")
            seen.add(inner)
            member.name = inner
            archive.extract(member, folder, filter="data")
    if SCRIPT not in seen:
        raise ValueError(f"{ARCHIVE} holds no converter")
