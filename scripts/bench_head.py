"""What the 8-bit head (``quant.head: 8bit``) costs in loss, on pretrained weights and real text.

    python scripts/bench_head.py [--steps 150] [--json tests/measurements/head-8bit.json]

Two small pretrained bases: the embedded one on its held-out tickets, and, where the folder of real data is
beside the checkout, stories260K on stories and on Shakespeare. Their heads are their embeddings; both get a
copy. The same hidden states go through both heads, so that all that differs is the head. Then the
quickstart's recipe trains with each, seed and rows the same. The interval is a bootstrap over sequences,
each drawn with both of its losses; "largest logit" is the largest difference of one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from rich.console import Console
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import trainer
from qlora.kernels.head import PackedHead
from qlora.recipe import load_recipe

BASE, TICKETS = (measure.ROOT / "qlora" / "embedded" / name for name in ("base", "tickets"))
SHARED = measure.ROOT.parent / "shared" / "data"
STORIES = SHARED / "stories260K-hf"
LENGTH, ROWS, RESAMPLES = 256, 300, 10_000
HEADINGS = ("text", "dtype", "loss", "8-bit", "apart, nats", "95 %", "relative", "largest logit")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tickets(tok: Any) -> list[list[int]]:
    """The held-out conversations, as the chat template renders them."""
    lines = (TICKETS / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tok.apply_chat_template(json.loads(s)["messages"], tokenize=False) for s in lines]
    return [tok(text)["input_ids"][:LENGTH] for text in texts[:ROWS]]


def pieces(tok: Any, path: Path) -> list[list[int]]:
    """The beginning of a text in sequences of equal length."""
    ids = tok(path.read_text(encoding="utf-8")[: 6 * LENGTH * ROWS], verbose=False)["input_ids"]
    return [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)][:ROWS]


def compare(base: Path, rows: list[list[int]], dtype: torch.dtype) -> dict[str, Any]:
    """Mean losses in nats a token by both heads, and how far they are apart."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    own = torch.nn.Linear(*model.lm_head.weight.T.shape, bias=False, dtype=dtype)
    own.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    packed, sums, largest = PackedHead(own), [], 0.0
    with torch.no_grad():
        for ids in rows:
            given = torch.tensor([ids])
            hidden = model.model(input_ids=given, use_cache=False).last_hidden_state[0, :-1]
            logits = [head(hidden).float() for head in (own, packed)]
            largest = max(largest, float((logits[0] - logits[1]).abs().max()))
            lost = [functional.cross_entropy(x, given[0, 1:], reduction="sum") for x in logits]
            sums.append([*map(float, lost), len(ids) - 1])
    return told(torch.tensor(sums, dtype=torch.double)) | {"largest_logit_difference": largest}


def told(sums: torch.Tensor) -> dict[str, Any]:
    """The figures of per-sequence (loss with the dense head, with the 8-bit head, tokens).

    >>> told(torch.tensor([[4.0, 5.0, 2.0]] * 3).double())["difference"]
    0.5
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    drawn = sums[draws].sum(1)
    differences = (drawn[:, 1] - drawn[:, 0]) / drawn[:, 2]
    interval = torch.quantile(differences, torch.tensor([0.025, 0.975]).double()).tolist()
    dense, packed, tokens = sums.sum(0).tolist()
    return {
        "sequences": len(sums), "tokens": int(tokens), "loss": dense / tokens,
        "loss_8bit": packed / tokens, "difference": (packed - dense) / tokens,
        "interval_95": interval, "relative": packed / dense - 1,
    }  # fmt: skip


def training(steps: int, seeds: list[int]) -> list[dict[str, Any]]:
    """The quickstart's recipe on an untied copy of its base, with each head: held-out losses after."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
        assert model.config.tie_word_embeddings  # else the recipe could be run as it is
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
        for seed in seeds:
            row: dict[str, Any] = {"seed": seed, "steps": steps}
            for head in ("16bit", "8bit"):
                asked = [
                    f"model.name={folder}", f"quant.head={head}", f"train.max_steps={steps}",
                    f"train.seed={seed}", f"run.dir={folder}/runs", "eval.generate=0",
                ]  # fmt: skip
                run = trainer.train(load_recipe("quickstart", asked), console=Console(quiet=True))
                for when in ("before", "after"):
                    row[f"{when}_{head}"] = run.result[when]["held_out_loss"]
            row["difference"] = row["after_8bit"] - row["after_16bit"]
            found.append(row)
    return found


def main() -> None:
    made = argparse.ArgumentParser(description="What the 8-bit head costs in loss.")
    for option, usual in {"--steps": 150, "--seeds": 3}.items():
        made.add_argument(option, type=measure.positive, default=usual, help="of training")
    measure.add_json(made)
    asked = made.parse_args()
    cases = [("embedded, tickets", BASE, tickets(AutoTokenizer.from_pretrained(BASE)))]
    names = ("tinystories_sample/tinystories_sample.txt", "tinyshakespeare/input.txt")
    for path in (SHARED / name for name in names):
        if path.is_file() and STORIES.is_dir():
            tok = AutoTokenizer.from_pretrained(STORIES)
            cases.append((f"stories260K, {path.parent.name}", STORIES, pieces(tok, path)))
        else:
            print(f"skipped: {path} or {STORIES} is not there")
    found = [
        {"text": text, "dtype": name} | compare(base, rows, dtype)
        for text, base, rows in cases
        for name, dtype in DTYPES.items()
    ]
    trained = training(asked.steps, list(range(42, 42 + asked.seeds)))
    measure.report(measure.circumstances() | {"heads": found, "training": trained}, asked.json)
    rows = [
        (r["text"], r["dtype"], f"{r['loss']:.5f}", f"{r['loss_8bit']:.5f}", f"{r['difference']:+.1e}",
         "{:+.1e} .. {:+.1e}".format(*r["interval_95"]), f"{r['relative']:+.1e}",
         f"{r['largest_logit_difference']:.2g}")
        for r in found
    ]  # fmt: skip
    rows += [
        (f"quickstart, {r['steps']} steps, seed {r['seed']}", "-", f"{r['after_16bit']:.5f}",
         f"{r['after_8bit']:.5f}", f"{r['difference']:+.1e}", "-",
         f"{r['difference'] / r['after_16bit']:+.1e}", "-")
        for r in trained
    ]  # fmt: skip
    print(measure.table(HEADINGS, rows))


if __name__ == "__main__":
    main()
