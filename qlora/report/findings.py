"""What came of a run, question by question: each answer is a sentence and a mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora.chart import figure
from qlora.page import Mark, Verdict
from qlora.report.dossier import Dossier, number, text
from qlora.screen import duration

ROSE = 1.02  # a held-out loss this much above its lowest was better before
FEW_STOP = 0.9  # a smaller share of answers that end by themselves is worth a word
ABOVE = 1.02  # a peak this much above its prediction, too


def verdicts(told: Dossier) -> list[Verdict]:
    """The answers, the most telling first, and what could not be read."""
    found = [
        _ended(told),
        *_loss(told),
        *_match(told),
        *_fit(told),
        *_alive(told),
        *_steps(told),
        *_combined(told),
        *_merged(told),
    ]
    missing = told.missing
    if _combination(told):  # which took no step of its own
        missing = [what for what in missing if not what.startswith("metrics.jsonl is missing")]
    return [*found, *(Verdict("note", "missing", what) for what in missing)]


def _ended(told: Dossier) -> Verdict:
    steps = number(told.result, "steps")
    if told.is_finished and _combination(told):
        when = text(told.result, "finished")[:16].replace("T", " ")
        how = text(_combination(told), "method")
        return Verdict("good", "combined", f"of several runs by {how}{', ' * bool(when)}{when}")
    if told.is_finished:
        seconds = number(told.result, "train_seconds")
        said = f"after {figure(steps)} steps" if steps is not None else "its steps are not told"
        said += f", {duration(seconds)} of training" if seconds is not None else ""
        when = text(told.result, "finished")[:16].replace("T", " ")
        return Verdict("good", "finished", f"{said}{', ' * bool(when)}{when}")
    if told.run.is_complete:
        return Verdict("bad", "result", "result.json is there but cannot be read")
    where = f"the last log line is of step {told.curves.step:,}" if told.curves.lines else ""
    newest = told.checkpoint
    kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
    return Verdict("note", "not finished", "; ".join(filter(None, (where, kept))))


def _loss(told: Dossier) -> Iterator[Verdict]:
    about, held = "held-out loss", [(x, y) for x, y in told.curves.held_out if y is not None]
    before = number(told.result, "before", "held_out_loss")
    before = told.before.loss if before is None else before
    after = number(told.result, "after", "held_out_loss")
    rows = number(told.data, "held_out", "rows")
    on = f" on {figure(rows)} rows" if rows else ""
    if before is not None and after is not None:
        low = min(held, key=lambda point: point[1], default=(0.0, after))
        said = f"{before:.4f} before, {after:.4f} after{on}"
        if after >= before:
            yield Verdict("bad", about, f"{said}: it did not get lower")
        elif after > ROSE * low[1]:
            yield Verdict(
                "note",
                about,
                f"{said}; it was lower at step {figure(low[0])} ({low[1]:.4f}), and rose since: fewer "
                "steps, or a lower learning rate, may do better",
            )
        else:
            yield Verdict("good", about, said)
    elif before is not None:
        later = f", {held[-1][1]:.4f} at step {figure(held[-1][0])}" if len(held) > 1 else ""
        yield Verdict("unknown", about, f"{before:.4f} before{later}{on}")
    elif told.is_finished:
        yield Verdict(
            "note", about, "no row was held out: nothing tells how it does on rows it has not seen"
        )


def _match(told: Dossier) -> Iterator[Verdict]:
    before, after = (number(told.result, when, "exact_match") for when in ("before", "after"))
    asked = told.recipe.get("eval")
    fields = asked.get("exact_match") if isinstance(asked, dict) else None
    what = " + ".join(map(str, fields)) if isinstance(fields, list) and fields else "whole answer"
    about = f"exact match ({what[:80]})"
    if before is not None and after is not None:
        rows = number(told.result, "after", "answered")
        on = f" on {figure(rows)} held-out rows" if rows else ""
        mark: Mark = "good" if after > before else "note" if after == before else "bad"
        yield Verdict(mark, about, f"{before:.1%} before, {after:.1%} after{on}")
        ends = number(told.result, "after", "stop_rate")
        if ends is not None and ends < FEW_STOP:
            yield Verdict(
                "note", "answers", f"only {ends:.0%} end by themselves; the others run on until cut"
            )
    elif told.before.answers:
        right, of = told.before.right, told.before.answers
        yield Verdict("unknown", about, f"{right / of:.1%} before, on {of:,} held-out rows")


def _fit(told: Dossier) -> Iterator[Verdict]:
    planned, peak = number(told.plan, "total_bytes"), told.peak_bytes
    if planned is None or peak is None:
        return
    about, card = "memory", told.environment.get("card")
    predicted, highest = figure(planned, "bytes"), figure(peak, "bytes")
    if text(card, "kind") == "cpu":
        yield Verdict(
            "unknown",
            about,
            f"the process held {highest} at most, Python and its libraries included; {predicted} were "
            "predicted for the model and its training. A CPU has no counter of its own to compare",
        )
        return
    free = number(card, "free_bytes")
    of = f"; {figure(free, 'bytes')} were free" if free else ""
    share = f"{abs(peak / planned - 1):.0%} {'more' if peak > planned else 'less'} than predicted"
    mark: Mark = "note" if peak > ABOVE * planned else "good"
    yield Verdict(mark, about, f"{predicted} predicted, {highest} at most: {share}{of}")


def _alive(told: Dossier) -> Iterator[Verdict]:
    if not told.is_finished:
        return
    tuned, disk, largest = (
        number(told.result, "alive", key)
        for key in ("tuned_against_base", "disk_against_memory", "largest_b")
    )
    if tuned is None or disk is None or largest is None:
        yield Verdict("unknown", "adapter", "whether it does something is not told")
    elif tuned > 0 and largest > 0:
        same = (
            f"what it did in training, within {disk:.1g}"
            if disk
            else "exactly what it did in training"
        )
        yield Verdict(
            "good",
            "adapter",
            f"alive: it moves logits by up to {figure(tuned)}, and read back from disk it computes {same}",
        )
    else:
        yield Verdict("bad", "adapter", "dead: with it the model computes what the base does")
    unchanged = told.result.get("base_unchanged")
    if unchanged is True:
        yield Verdict("good", "base", "frozen: not one of its bytes has changed in training")
    else:
        yield Verdict("bad" if unchanged is False else "unknown", "base",
                      "changed in training" if unchanged is False
                      else "whether it stayed as it was is not told")  # fmt: skip


def _steps(told: Dossier) -> Iterator[Verdict]:
    left_out = number(told.result, "skipped_steps")
    left_out = len(told.curves.skipped) if left_out is None else left_out
    back, again = number(told.result, "roll_backs"), number(told.result, "oom_retries")
    said = [
        f"{figure(count)} {what}"
        for count, what in (
            (left_out, "left out by the guard"),
            (back, "times back to a checkpoint"),
            (again, "begun anew when memory ran out"),
        )
        if count
    ]
    if said:
        rate = number(told.result, "learning_rate_factor")
        if rate is not None and rate < 1:
            said.append(f"the learning rate ended at {rate:g} times the recipe's")
        yield Verdict("note", "steps", ", ".join(said))
    elif told.curves.lines:
        yield Verdict("good", "steps", "none was left out, taken back or begun anew")


def _combination(told: Dossier) -> Mapping[str, Any]:
    found = told.result.get("combination")
    return found if isinstance(found, Mapping) else {}


def _combined(told: Dossier) -> Iterator[Verdict]:
    """What the runs that were combined have kept of what each had learned."""
    tasks = _combination(told).get("tasks")
    for task in tasks if isinstance(tasks, list) else []:
        if not isinstance(task, Mapping):
            continue
        base, alone, both = (
            number(task, one, "held_out_loss") for one in ("base", "alone", "combined")
        )
        said = text(task, "verdict") or "not scored"
        mark: Mark = "bad" if said == "BROKEN" else "note" if said == "weak" else "good"
        if base is None or alone is None or both is None:
            mark, figures = "unknown", ""
        else:
            figures = (
                f"held-out loss {base:.4f} of the base, {alone:.4f} alone, {both:.4f} combined: "
            )
        yield Verdict(mark, f"of {text(task, 'run')}", f"{figures}{said}")


def _merged(told: Dossier) -> Iterator[Verdict]:
    kl, top1, positions = (
        number(told.merged, "verdict", key) for key in ("kl", "top1", "positions")
    )
    if kl is not None and top1 is not None:
        onto = {"nf4": "the NF4 base", "16bit": "the 16-bit weights"}
        into = onto.get(text(told.merged, "onto"), "its base")
        learned = number(told.merged, "learned", "kl")
        moved = f"; training moved the base by {learned:.2g}" if learned is not None else ""
        on = f" on {figure(positions)} positions" if positions else ""
        mark: Mark = "good" if learned is None or kl < learned else "bad"
        yield Verdict(
            mark,
            "merged model",
            f"folded into {into}, it is {kl:.2g} nats a token from the trained one{moved}; the likeliest "
            f"token is the same at {top1:.1%}{on}",
        )
    elif told.merged:
        yield Verdict("unknown", "merged model", "merge.json does not tell how near it came")
