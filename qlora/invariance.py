"""What the self-test tries, what it found, and whether that is rounding: cases, report and table."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from qlora.errors import SelfTestFailed
from qlora.screen import Screen

ROWS = 8


@dataclass(frozen=True)
class Tolerance:
    """Differences that are rounding: of the loss, and of all adapter gradients as one vector."""

    loss: float
    gradient: float
    origin: str


# Measured on a CPU with random models of seven families (Llama, Qwen 2 and 3, Gemma 2 and 3, Phi 3,
# Mistral) of 2 and 24 layers, and with two pretrained ones: the embedded base and stories260K. The largest
# differences were, of the loss, 2.5e-7 in float32 and 1.0e-4 in bfloat16; of the gradient, 4.9e-7 and
# 8.9e-3. Packed rows that see each other moved the gradient by 9.8e-2 or more in either.
TOLERANCES = {
    "float32": Tolerance(2e-6, 5e-6, "eight to ten times what was measured on a CPU"),
    "bfloat16": Tolerance(1e-3, 4e-2, "four to ten times what was measured on a CPU"),
    "float16": Tolerance(1e-3, 4e-2, "taken from bfloat16; not measured"),
}


@dataclass(frozen=True)
class Case:
    """One way to put the rows through the model."""

    name: str
    sequences: int  # a pass
    packed: bool = False
    checkpointing: bool = False
    evaluation: bool = False
    level: int = 0  # of fused layers; 0: the libraries' own

    @property
    def advice(self) -> str:
        """What to write in the recipe so that training does not take this way."""
        if self.evaluation:
            return "believe no held-out loss of this model"
        ways = []
        if self.level:
            ways.append("train.kernels=off")
        if self.packed:
            ways.append("data.packing=false")
        if self.checkpointing:
            ways.append("train.activation_checkpointing=false")
        if self.sequences > 1:
            ways.append("train.per_device_train_batch_size=1")
        return f"write {' or '.join(ways)}"


REFERENCE = Case("one row a pass", 1)
CASES = (
    REFERENCE,
    Case("four rows a pass", 4),
    Case("all rows in one pass", ROWS),
    Case("activation checkpointing", 1, checkpointing=True),
    Case("packed", 1, packed=True),
    Case("packed, four a pass", 4, packed=True),
    Case("packed, activation checkpointing", 1, packed=True, checkpointing=True),
    Case("fused layers", 1, level=1),
    Case("fused layers, packed", 1, packed=True, level=2),
    Case("fused layers, packed, all again", 1, packed=True, level=5),
    Case("evaluation", 4, evaluation=True),
    Case("evaluation, packed", 1, packed=True, evaluation=True),
)


@dataclass(frozen=True)
class Finding:
    """What a case gave, beside the reference; or ``unused``: why it could not be tried."""

    case: Case
    tolerance: Tolerance
    passes: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    loss_difference: float = 0.0
    gradient_difference: float | None = None  # None: the case has no gradients
    worst_difference: float | None = None
    worst_parameter: str = ""
    unused: str = ""

    @property
    def problems(self) -> list[str]:
        """What differs by more than rounding, in words; a NaN does."""
        found = []
        if self.unused:
            return found
        if not self.loss_difference <= self.tolerance.loss:
            found.append(
                f"the loss differs by {self.loss_difference:.2g} (at most {self.tolerance.loss:g})"
            )
        if self.gradient_difference is not None and not (
            self.gradient_difference <= self.tolerance.gradient
        ):
            found.append(
                f"the gradient differs by {self.gradient_difference:.2g} (at most "
                f"{self.tolerance.gradient:g}), most in {self.worst_parameter}"
            )
        return found


@dataclass(frozen=True)
class Report:
    """Every case that was tried, on what."""

    card: str
    architecture: str
    attention: str
    dtype: str
    rows: int
    shortest: int
    longest: int
    tokens: int
    supervised: int
    tolerance: Tolerance
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.problems]

    @property
    def verdict(self) -> str:
        tried = sum(not finding.unused for finding in self.findings) - 1
        unused = len(self.findings) - 1 - tried
        said = f"{tried} ways to lay out {self.rows} rows were tried against one row a pass"
        left = f"; {unused} not used" if unused else ""
        if self.failed:
            return f"FAILED: {said}{left}; {len(self.failed)} of them give something else"
        return f"held: {said}{left}; all give its loss and gradients"

    def require_invariance(self) -> None:
        """Return in silence when every case that was tried gave what the reference gave.

        Raises:
            SelfTestFailed: Names each case that did not, what was measured, and what to do.
        """
        if not self.failed:
            return
        listed = [
            f"  {finding.case.name}: {problem}"
            for finding in self.failed
            for problem in finding.problems
        ]
        advice = dict.fromkeys(finding.case.advice for finding in self.failed)
        raise SelfTestFailed(
            f"{self.architecture} with {self.attention} attention in {self.dtype} does not compute the "
            "same when the same rows are laid out in another way:\n"
            + "\n".join(listed)
            + f"\nUntil this is mended: {'; '.join(advice)}.\nPlease report the model, with the table "
            f"above (or --json) and transformers {importlib.metadata.version('transformers')}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; a figure that is not finite is null."""
        cases = [
            {
                **dataclasses.asdict(finding.case),
                **{
                    key: value
                    for key, value in dataclasses.asdict(finding).items()
                    if key not in ("case", "tolerance")
                },
                "problems": finding.problems,
            }
            for finding in self.findings
        ]
        own = {
            key: getattr(self, key)
            for key in (
                "card", "architecture", "attention", "dtype", "rows", "shortest", "longest", "tokens",
                "supervised", "notes",
            )
        }  # fmt: skip
        whole = {
            "held": not self.failed,
            **own,
            "tolerance": dataclasses.asdict(self.tolerance),
            "cases": cases,
        }
        return _finite(whole)  # type: ignore[no-any-return]


def tell(report: Report, console: Console) -> None:
    """The report as lines, a table and a verdict."""
    screen = Screen(console)
    screen.say("card", f"{report.card}, computes in {report.dtype}")
    screen.say("base", f"{report.architecture}, {report.attention} attention")
    screen.say(
        "rows",
        f"{report.rows}, of {report.shortest:,} to {report.longest:,} tokens: {report.tokens:,} tokens, "
        f"{report.supervised:,} of them train",
    )
    for note in report.notes:
        screen.say("note", note)
    for line in table(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    tolerance = report.tolerance
    screen.say(
        "allowed",
        f"loss {tolerance.loss:g}, gradient {tolerance.gradient:g} in {report.dtype} "
        f"({tolerance.origin})",
    )
    screen.say("verdict", report.verdict)


def table(report: Report) -> list[str]:
    """One line a case, aligned, under its headings."""
    cells: list[tuple[str, ...]] = [
        ("case", "passes", "seconds", "loss", "loss differs", "gradient differs", "worst parameter")
    ]
    reasons: dict[int, str] = {}
    for finding in report.findings:
        if finding.unused:
            reasons[len(cells)] = f"not used: {finding.unused}"
            cells.append((finding.case.name, *[""] * 6))
            continue
        reference = finding.case is REFERENCE
        apart, worst = finding.gradient_difference, finding.worst_difference
        cells.append(
            (
                finding.case.name,
                str(finding.passes),
                f"{finding.seconds:.2f}",
                f"{finding.loss:.6f}",
                "reference" if reference else f"{finding.loss_difference:.1e}",
                "reference" if reference else "-" if apart is None else f"{apart:.1e}",
                ""
                if reference or worst is None
                else f"{worst:.1e} {_short(finding.worst_parameter)}",
            )
        )
        if finding.problems:
            cells[-1] = (*cells[-1][:-1], f"{cells[-1][-1]}  FAILED".strip())
    widths = [max(len(row[column]) for row in cells) for column in range(7)]
    lines = []
    for index, row in enumerate(cells):
        first, *figures, last = row
        aligned = [f"{cell:>{width}}" for cell, width in zip(figures, widths[1:-1], strict=True)]
        rest = reasons.get(index) or "  ".join([*aligned, last])
        lines.append(f"{first:<{widths[0]}}  {rest}".rstrip())
    return lines


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".default.weight")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
