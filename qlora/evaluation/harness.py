"""EleutherAI's lm-evaluation-harness on a model that is loaded already. The only user of lm_eval.

The harness is handed objects: told a path and an adapter it would load the base a second time, unquantized,
and lm-eval 0.4.13 resizes the embedding where a vocabulary is padded, which ruins the figures.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qlora import hub
from qlora.errors import DataError, RecipeError
from qlora.places import expanded

EXTRA = "pip install 'qlora[eval]'"


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Its name in the harness.
        metric: With its filter where that is not "none": ``exact_match (strict-match)``.
        value: Of the whole task.
        rows: The metric of every document, in their order; empty where it is none of single documents.
        higher_is_better: As the task says.
    """

    task: str
    metric: str
    value: float
    rows: tuple[float, ...] = field(repr=False)
    higher_is_better: bool = True


@dataclass(frozen=True)
class Harness:
    """The harness with some of its tasks, known to exist."""

    tasks: tuple[str, ...]
    manager: Any

    def run(
        self,
        model: Any,
        tok: Any,
        *,
        chat: bool = False,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> list[TaskScore]:
        """What a loaded model scores in every task.

        Args:
            model: A causal model, with an adapter of peft or without; it stays as it is.
            tok: Its tokenizer.
            chat: Whether the questions go through the chat template.
            limit: Documents of a task at most.
            batch_size: Documents at a time.

        Raises:
            DataError: A task's data set cannot be read.
            RecipeError: A task would run code that the model writes, or does not fit this model.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        was_training = model.training
        model.eval()
        try:
            with _quiet():
                found = lm_eval.simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tok, batch_size=batch_size),
                    tasks=list(self.tasks),
                    task_manager=self.manager,
                    limit=limit,
                    apply_chat_template=chat,
                    bootstrap_iters=0,  # the intervals are of pairs, and made elsewhere
                )
        except (OSError, EOFError) as error:  # ConnectionError and FileNotFoundError are among them
            raise DataError(self._unread(error)) from None
        except (ValueError, KeyError, AssertionError, ImportError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise RecipeError(
                f"--lm-eval {','.join(self.tasks)}: the harness refuses: {said[:300]}"
            ) from None
        finally:
            model.train(was_training)
        assert found is not None
        return _scores(found)

    def _unread(self, error: Exception) -> str:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        why = hub.unreachable()
        return (
            f"--lm-eval {','.join(self.tasks)}: a data set of these tasks cannot be read: {said[:300]}\n"
            + (f"  {why}\n" if why else "")
            + "  The harness takes its data from the hub. Run once where there is a network, or write a "
            "task of your own over a local file (dataset_path: json), its folder as --lm-eval-path DIR."
        )


def find(tasks: Sequence[str], path: str | Path | None = None) -> Harness:
    """The harness with these tasks: seconds, so that a wrong name is told before a model is loaded.

    Args:
        tasks: Names of tasks, groups or tags.
        path: A folder with more tasks. What is in its YAML files and beside them is run as code.

    Raises:
        RecipeError: lm_eval is not installed, the folder is none, or a task is not known.
    """
    asked = ",".join(tasks)
    if not tasks:
        raise RecipeError("--lm-eval names no task. Write some, as --lm-eval arc_easy,hellaswag.")
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            f"--lm-eval {asked} needs EleutherAI's lm-evaluation-harness, which is not installed. Install "
            f"it with `{EXTRA}`, or leave --lm-eval out."
        )
    folder = None if path is None else expanded(path)
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--lm-eval-path is {str(path)!r}, which is no folder.")
    from lm_eval.tasks import TaskManager

    with _quiet():
        own = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
        here = set(own.all_tasks) if own else set()
        if set(tasks) <= here:
            return Harness(tuple(tasks), own)
        known = [*here, *_everything(None).all_tasks]
        unknown = [name for name in tasks if name not in set(known)]
        if unknown:
            raise RecipeError(
                f"--lm-eval {asked}: the harness knows no task {unknown[0]!r}"
                + _near(unknown[0], known)
                + (f" In {folder} are: {', '.join(sorted(here)) or 'none'}." if folder else "")
                + " `lm-eval ls tasks` lists all."
            )
        return Harness(tuple(tasks), _everything(folder if here & set(tasks) else None))


@cache
def _everything(folder: Path | None) -> Any:
    """The harness's own tasks and those of a folder: thousands of files, ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f". Did you mean {', '.join(near)}?" if near else "."


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    listed = []
    better = found.get("higher_is_better", {})
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not _is_number(value):
                continue
            rows = _rows(found.get("samples", {}).get(task, ()), metric, filtered)
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            higher = better.get(task, {}).get(metric)
            listed.append(TaskScore(task, shown, float(value), rows, higher is not False))
    return listed


def _rows(samples: Sequence[Mapping[str, Any]], metric: str, filtered: str) -> tuple[float, ...]:
    own = [one for one in samples if one.get("filter") == filtered]
    own.sort(key=lambda one: one["doc_id"])
    values = [one.get(metric) for one in own]
    return tuple(float(v) for v in values) if all(map(_is_number, values)) else ()  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    try:
        return not isinstance(value, str | tuple | list) and math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's remarks on how it is called to itself; its bars stay."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
