"""A GGUF file is llama.cpp's own making, and is believed when it was run, or read back, and not before."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import save_tiny
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qlora import hints, llama, trained
from qlora.errors import ExportError
from qlora.export import converter, gguf, pretokenizer
from qlora.screen import Screen

pytestmark = pytest.mark.usefixtures("one_thread")

# In the place of llama.cpp's: writes the tensors of a Llama by the names of the format, as they are.
FAKE = """
import json, pathlib, sys
import argparse, gguf, numpy, torch
from safetensors.torch import load_file
from conversion import base
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile"); parser.add_argument("--outtype")
asked = parser.parse_args()
model = base.TextModel(asked.model)
writer = gguf.GGUFWriter(asked.outfile, "llama")
writer.add_block_count(model.hparams["num_hidden_layers"])
writer.add_tokenizer_pre(model.get_vocab_base_pre(None))
vocab = gguf.SpecialVocab(asked.model, load_merges=False)
vocab.add_to_gguf(writer)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.hparams["num_hidden_layers"])
kind = {"f32": numpy.float32, "f16": numpy.float16}[asked.outtype]
for file in asked.model.glob("*.safetensors"):
    for name, tensor in load_file(file).items():
        values = tensor.float().numpy()
        if "q_proj" in name:
            values = values[::-1].copy()  # the converter reorders rows of these
        writer.add_tensor(names.get_name(name, (".weight",)), values.astype(kind) SCALE)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
writer.close()
"""
FAKE_BASE = """
import json
class TextModel:
    def __init__(self, folder):
        self.dir_model = folder
        self.hparams = json.loads((folder / "config.json").read_text())
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
    def _create_vocab_sentencepiece(self):
        raise AssertionError
"""


CHECKOUT = os.environ.get("LLAMA_CPP")  # of llama.cpp itself, for the tests that run it


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in fp32 that stands for a merged one."""
    return save_tiny(tmp_path_factory.mktemp("merged"))


@pytest.fixture
def make_converter(tmp_path: Path) -> Callable[..., Path]:
    """A folder that looks like a checkout of llama.cpp; its script is ours."""

    def make(script: str = FAKE.replace(" SCALE", "")) -> Path:
        folder = tmp_path / "llama.cpp"
        (folder / "conversion").mkdir(parents=True)
        (folder / converter.SCRIPT).write_text(script)
        (folder / "conversion" / "__init__.py").write_text("def get_model_class(*a, **k): ...")
        (folder / "conversion" / "base.py").write_text(FAKE_BASE)
        return folder

    return make


@pytest.fixture
def without_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "is_here", lambda: False)


@pytest.fixture
def without_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script alone, without the seconds that importing transformers takes."""
    code = "import runpy, sys; runpy.run_path(sys.argv[2], run_name='__main__')"
    monkeypatch.setattr(converter, "_CODE", code)


def write(
    model: Path, target: Path, quant: str = "f32", **settings: Any
) -> tuple[gguf.Written, str]:
    """What came of it, and what was said."""
    said = io.StringIO()
    screen = Screen(Console(file=said, width=200))
    found = trained.find(model)
    return gguf.write(found, model, target, quant, screen, **settings), said.getvalue()


# --- the file


@pytest.mark.parametrize("quant", ["f32", "f16"])
def test_a_file_that_cannot_be_run_is_read_back_and_that_is_said(
    quant: str, model: Path, make_converter: Any, without_llama: None, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "m.gguf"
    written, said = write(model, target, quant, llama_cpp=str(make_converter()))
    assert (
        written.matrices == (16, 16) and written.agreement is None
    )  # 2 layers of 7, embedding and head
    assert "not run: llama.cpp is not installed" in said and "was not asked" in said
    kept = json.loads(target.with_name("m.gguf.json").read_text())
    assert (
        kept["ran"] is False and kept["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    )
    assert sorted(path.name for path in target.parent.iterdir()) == ["m.gguf", "m.gguf.json"]


def test_what_the_converter_cannot_know_is_in_the_file(
    model: Path, make_converter: Any, without_llama: None, tmp_path: Path
) -> None:
    import gguf as library

    write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter()))
    fields = library.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False  # training saw none
    template = fields["tokenizer.chat_template"].contents()
    assert "generation" not in template.replace("add_generation_prompt", "")
    tok = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    wanted = tok.apply_chat_template(turns, tokenize=False)
    tok.chat_template = template
    assert tok.apply_chat_template(turns, tokenize=False) == wanted


def test_a_file_with_other_weights_is_refused_and_nothing_is_left(
    model: Path, make_converter: Any, without_llama: None, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "m.gguf"
    wrong = make_converter(FAKE.replace(" SCALE", " * kind(1.01 if 'down' in name else 1)"))
    with pytest.raises(
        ExportError, match=r"not the model: blk\.0\.ffn_down\.weight does not hold the rows"
    ):
        write(model, target, llama_cpp=str(wrong))
    assert list(target.parent.iterdir()) == []


def test_a_file_that_is_run_gets_the_verdict_of_its_logits(
    model: Path, make_converter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reference is transformers in this process; llama.cpp is played by it with a known error."""
    asked = _play_llama(monkeypatch, model, error=0.01)
    written, said = write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter()))
    assert written.agreement is not None and written.tokens == 4 and written.matrices == (0, 0)
    assert written.agreement.max_logit == pytest.approx(0.01, rel=1e-3)
    assert written.agreement.positions == sum(
        min(len(row), gguf.POSITIONS) for row in asked["rows"]
    )
    assert "run by llama.cpp, against the merged model: KL" in said


def test_a_file_whose_predictions_are_others_is_refused(
    model: Path, make_converter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _play_llama(monkeypatch, model, error=2.0)
    with pytest.raises(
        ExportError, match=r"not the model: KL .*At most 0\.0001 nats a token are allowed for f32"
    ):
        write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter()))
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_that_makes_other_tokens_is_refused(
    model: Path, make_converter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _play_llama(monkeypatch, model, error=0.0)
    monkeypatch.setattr(llama, "tokenize", lambda file, texts: [[1, 2, 3] for _ in texts])
    with pytest.raises(ExportError, match=r"of 'What is two plus two.' llama\.cpp makes 3 tokens"):
        write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter()))


def test_a_crash_of_llama_cpp_is_a_finding_and_the_file_is_read_back(
    model: Path, make_converter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llama, "is_here", lambda: True)
    monkeypatch.setattr(llama, "_CODE", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    written, said = write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter()))
    assert written.crash == "it was ended by SIGSEGV" and written.matrices == (16, 16)
    assert (
        "llama.cpp crashed on this machine: it was ended by SIGSEGV" in said
        and "GGML_NATIVE=OFF" in said
    )


def _play_llama(monkeypatch: pytest.MonkeyPatch, model: Path, error: float) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    asked: dict[str, Any] = {}
    tok = AutoTokenizer.from_pretrained(model)

    @torch.inference_mode()
    def logits(file: Path, rows: Any, last: int, out: Path) -> None:
        import numpy

        asked["rows"] = rows
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        found = [loaded(torch.tensor([list(row)])).logits[0, -last:] for row in rows]
        every = torch.cat(found)
        every[:, ::2] += error
        numpy.save(out, every.numpy())

    monkeypatch.setattr(llama, "is_here", lambda: True)
    monkeypatch.setattr(llama, "logits", logits)
    monkeypatch.setattr(
        llama,
        "tokenize",
        lambda file, texts: tok(list(texts), add_special_tokens=False)["input_ids"],
    )
    return asked


# --- what is refused before anything is written


def test_a_type_that_nobody_knows_lists_those_that_are_known(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError,
        match=r"--quant is 'q9', which is not known\. Known: f32, f16, bf16, q8_0, q2_k",
    ):
        write(model, tmp_path / "m.gguf", "q9")


def test_few_bits_need_llama_cpp_and_say_how_to_get_it(
    model: Path, without_llama: None, tmp_path: Path
) -> None:
    with pytest.raises(
        ExportError, match=r"'q4_k_m', which needs llama-cpp-python.*qlora\[gguf\].*GGML_NATIVE=OFF"
    ):
        write(model, tmp_path / "m.gguf", "q4_k_m")


def test_a_file_that_is_there_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"m\.gguf: exists already"):
        write(model, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"


# --- the converter


def test_a_named_folder_must_be_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"--llama-cpp is .*holds no convert_hf_to_gguf\.py"):
        converter.find(str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match="LLAMA_CPP is "):
        converter.find()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized - update')",
            "cuts words as no pre-token",
        ),
        (
            "import sys; print('Model Foo is not supported', file=sys.stderr); sys.exit(1)",
            "does not know this arch",
        ),
        (
            "raise ValueError('token hf_" + "a" * 34 + "')",
            r"exit code 1\): ValueError: token \*\*\*$",
        ),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"exit code -9\): it said nothing",
        ),
        ("pass", r"exit code 0\)"),
    ],
)
@pytest.mark.usefixtures("without_hints")
def test_a_converter_that_fails_is_quoted_and_leaves_nothing(
    script: str, why: str, model: Path, make_converter: Any, without_llama: None, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=f"(?s)could not write .*{why}"):
        write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter(script)))
    assert not list(tmp_path.glob("*m.gguf*"))


@pytest.mark.usefixtures("without_hints")
def test_a_converter_that_hangs_is_stopped(
    model: Path, make_converter: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gguf, "LEAST_SECONDS", 0.5)
    with pytest.raises(ExportError, match="was stopped: not done after"):
        write(
            model, tmp_path / "m.gguf", llama_cpp=str(make_converter("import time; time.sleep(60)"))
        )


@pytest.mark.usefixtures("without_hints")
def test_the_converter_sees_no_token_no_home_and_no_network(
    model: Path,
    make_converter: Any,
    without_llama: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    monkeypatch.setenv("WANDB_API_KEY", "c" * 40)
    seen = tmp_path / "seen.json"
    script = f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))"
    with pytest.raises(ExportError):
        write(model, tmp_path / "m.gguf", llama_cpp=str(make_converter(script)))
    environment = json.loads(seen.read_text())
    assert not {"HF_TOKEN", "WANDB_API_KEY", "QLORA_CACHE"} & set(environment)
    assert environment["HF_HUB_OFFLINE"] == "1" and environment["HOME"] != str(Path.home())


def archive(files: dict[str, str | None], prefix: str = "x-1/vendor/llama.cpp/") -> bytes:
    """A source archive; a file of no content is a link."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name.split("#")[0])
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                made.addfile(member)
            else:
                member.size = len(content)
                made.addfile(member, io.BytesIO(content.encode()))
    return packed.getvalue()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A package index in a folder, that gives an archive as the one whose hash is known."""

    def serve(content: bytes, *, known: bool = True) -> None:
        page = tmp_path / "index" / "llama-cpp-python"
        page.mkdir(parents=True)
        (page.parent / converter.ARCHIVE).write_bytes(content)
        monkeypatch.setattr(converter, "ARCHIVE_BYTES", len(content))
        if known:
            monkeypatch.setattr(converter, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
        listing = f'<a href="{(page.parent / converter.ARCHIVE).as_uri()}#sha256=0">x</a>'
        (page / "index.html").write_text(listing)
        monkeypatch.setattr(converter, "_page", lambda: (page / "index.html").as_uri())

    return serve


WHOLE = {
    "convert_hf_to_gguf.py": "pass", "conversion/base.py": "", "gguf-py/gguf/vocab.py": "",
    "src/llama.cpp": "not wanted", "convert_lora_to_gguf.py": "", "conversion/x.sh": "rm",
}  # fmt: skip


def test_of_the_archive_only_the_converters_files_are_kept_and_fetched_once(index: Any) -> None:
    index(archive(WHOLE))
    assert converter.find() is None
    place = converter.fetch()
    names = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert names == {
        "convert_hf_to_gguf.py",
        "conversion/base.py",
        "gguf-py/gguf/vocab.py",
        "manifest.json",
    }
    assert converter.find() == place


def test_a_damaged_converter_is_not_run(index: Any) -> None:
    index(archive(WHOLE))
    place = converter.fetch()
    (place / "conversion" / "base.py").write_text("import os")
    assert converter.find() is None


@pytest.mark.parametrize(
    ("files", "known", "why"),
    [
        (WHOLE, False, "is another file"),
        ({"src/x": ""}, True, "holds no converter"),
        (WHOLE | {"conversion/base.py#2": "again"}, True, "does not hold what it did"),
        ({"convert_hf_to_gguf.py": None}, True, "holds no converter"),
    ],
)
def test_an_archive_that_is_another_is_refused_and_nothing_is_kept(
    files: dict[str, str | None], known: bool, why: str, index: Any
) -> None:
    index(archive(files), known=known)
    with pytest.raises(ExportError, match=f"fetched once .*{why}"):
        converter.fetch()
    assert converter.find() is None


def test_without_a_network_what_to_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:geheim@127.0.0.1:9/simple")
    with pytest.raises(
        ExportError, match=r"(?s)127\.0\.0\.1:9/simple: .*refused.*--llama-cpp"
    ) as raised:
        converter.fetch()
    assert "geheim" not in str(raised.value)


# --- tokens


def test_a_known_way_to_cut_words_is_found_again() -> None:
    for name in ("falcon", "deepseek-v3", "qwen2"):
        tok = copy.deepcopy(families.tokenizer_of("llama3"))
        values = json.loads(tok.backend_tokenizer.to_str())
        tok._tokenizer = pretokenizer.copy(values, name)
        found = pretokenizer.match(tok, ["It's 12345."])
        assert found is not None and found.different == 0
        again = pretokenizer.copy(values, found.name)
        hard = list(pretokenizer.HARD)
        ours, theirs = (t.encode_batch(hard) for t in (tok._tokenizer, again))
        assert [one.ids for one in ours] == [one.ids for one in theirs]


def test_a_way_that_no_server_knows_is_none() -> None:
    from tokenizers import Regex, pre_tokenizers

    tok = copy.deepcopy(families.tokenizer_of("llama3"))
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[aeiou]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert pretokenizer.match(tok, []) is None


def test_a_text_of_the_run_that_gets_other_tokens_rules_a_way_out() -> None:
    tok = families.tokenizer_of("llama3")
    assert pretokenizer.match(tok, ["fine"]) is not None
    assert (
        pretokenizer.match(tok, ["fine", "re'system"]) is None
    )  # its words have no endings like 's


def test_the_order_of_merges_is_that_of_the_scores() -> None:
    """Sentencepiece merges the neighbours with the highest score first: the tokens must be the "
    "tokenizer's."""
    tok = families.tokenizer_of("gemma")
    values = json.loads(tok.backend_tokenizer.to_str())
    tokens, scores, types = hints.from_merges(values, len(tok))
    known = {
        text.decode(): score
        for text, score, kind in zip(tokens, scores, types, strict=True)
        if kind == 1
    }
    ids = {text.decode(): number for number, text in enumerate(tokens)}
    plain = Tokenizer.from_str(json.dumps({**values, "added_tokens": [], "post_processor": None}))
    for text in families.TEXT:
        pieces = list(text.replace(" ", "▁"))
        while True:
            pairs = [(known.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
            best = max((pair for pair in pairs if pair[0] is not None), default=None)
            if best is None:
                break
            at = -best[1]
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        made = [
            number
            for piece in pieces
            for number in (
                [ids[piece]]
                if piece in known
                else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
            )
        ]
        assert made == plain.encode(text, add_special_tokens=False).ids


def test_other_tokenizers_are_left_to_the_converter() -> None:
    values = json.loads(families.tokenizer_of("llama3").backend_tokenizer.to_str())
    with pytest.raises(FileNotFoundError):
        hints.from_merges(values, 10)


# --- with the real ones, where they are


real = pytest.mark.skipif(
    CHECKOUT is None or not llama.is_here(),
    reason="needs llama-cpp-python and a checkout",
)


@real
@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_k_m"])
def test_llama_cpp_itself_predicts_what_the_model_does(quant: str, tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "m", hidden_size=256, num_attention_heads=4, intermediate_size=512
    )
    written, _ = write(folder, tmp_path / "m.gguf", quant, llama_cpp=CHECKOUT)
    assert written.crash is None and written.agreement is not None and written.tokens == 4
