"""llama.cpp at work, in a process of its own: its crash is a finding here and not the end of the export.

Builds of llama.cpp for the machine they were made on are known to crash elsewhere, and even there: one
made on a CPU with AMX ends with a segmentation fault when it loads a model of 8 bits (seen with
0.3.36). The package is llama-cpp-python, the extra ``qlora[gguf]``.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import ExportError

INSTALL = (
    "pip install 'qlora[gguf]' builds it, which takes some minutes and a C++ compiler; on a CPU with "
    "AMX set "
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" first: its native build '
    "crashes there"
)
# What llama.cpp makes of a 16-bit file, by its own names; what its converter writes is not among them.
QUANTS = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s",
    "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
SECONDS = 3600.0
_CODE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from qlora import llama; llama.serve()"


class Crashed(ExportError):
    """The process in which llama.cpp ran did not come back with an answer; the text says how it ended."""


def is_here() -> bool:
    """Whether llama-cpp-python is installed; whether it works is seen when it is used."""
    return importlib.util.find_spec("llama_cpp") is not None


def quantize(source: Path, target: Path, quant: str) -> None:
    """Write a 16- or 32-bit GGUF file again in one of :data:`QUANTS`.

    Raises:
        Crashed: It did not end well.
    """
    _ask({"do": "quantize", "source": str(source), "target": str(target), "quant": quant})


def tokenize(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """What a server that runs the file makes of texts, with the BOS that the file asks for.

    Raises:
        Crashed: As :func:`quantize`.
    """
    found = _ask({"do": "tokenize", "file": str(file), "texts": list(texts)})
    ids: list[list[int]] = found["ids"]
    return ids


def logits(file: Path, rows: Sequence[Sequence[int]], last: int, out: Path) -> None:
    """Write the next-token logits at the last positions of each row into a ``.npy`` file, (N, V) in fp32.

    Raises:
        Crashed: As :func:`quantize`.
    """
    asked = {"do": "logits", "file": str(file), "rows": [list(row) for row in rows], "last": last}
    _ask({**asked, "out": str(out)})


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        package = str(Path(__file__).resolve().parent.parent)
        command = [sys.executable, "-c", _CODE, package, str(asked), str(answer)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Crashed(f"not done after {SECONDS / 60:.0f} minutes") from None
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
        raise Crashed(_ending(done.returncode, done.stderr.decode("utf-8", "replace")))


def _ending(code: int, said: str) -> str:
    """How a process ended, in words."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"it was ended by {name}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


# --- the side that runs it


def serve() -> None:
    """Answer the one request in the file that the first argument names."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    act = {"quantize": _quantize, "tokenize": _tokenize, "logits": _logits}[request["do"]]
    Path(sys.argv[2]).write_text(json.dumps(act(request)), encoding="utf-8")


def _quantize(request: Mapping[str, Any]) -> dict[str, Any]:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['quant'].upper()}")
    source, target = request["source"].encode(), request["target"].encode()
    code = llama_cpp.llama_model_quantize(source, target, ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama_model_quantize gave {code}")
    return {}


def _tokenize(request: Mapping[str, Any]) -> dict[str, Any]:
    import llama_cpp

    model = llama_cpp.Llama(request["file"], vocab_only=True, verbose=False)
    return {
        "ids": [
            model.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]
        ]
    }


def _logits(request: Mapping[str, Any]) -> dict[str, Any]:
    import llama_cpp
    import numpy

    rows, last = request["rows"], request["last"]
    longest = max(map(len, rows))
    model = llama_cpp.Llama(
        request["file"], n_ctx=longest + 8, n_batch=longest + 8, n_ubatch=longest + 8, logits_all=True,
        n_gpu_layers=0, verbose=False,
    )  # fmt: skip
    found = []
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(
            numpy.array(model.scores[max(0, len(row) - last) : len(row)], dtype=numpy.float32)
        )
    numpy.save(request["out"], numpy.concatenate(found))
    return {}
