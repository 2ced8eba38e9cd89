"""Single-GPU QLoRA fine-tuning: a recipe in, a proven adapter out.

The house has four floors. A module imports along its own floor or from a floor below, never from
one above; the ground floor never imports torch. A test reads this map and holds the code to it.

    3 front door   cli, __main__
    2 stories      planning, trainer, ready, fusing, sft, rehearsal, dress, samples, finishing, doctor,
                   draft, selftest, invariance, preview, accounting, page, chart, report, resuming,
                   recording, verdict, answering, evaluation, trained, chat, probing, merging, export,
                   modelcard, combining, server
    1 machinery    hardware, bnb, nf4, weights, loader, adapter, alive, attention, kernels, offload,
                   phantom, tracing, counting, tokenizer, rendering, shortening, parity, table,
                   intake, preparation, data, packing, prefetch, generation, scoring, agreement, folded,
                   shards, engine, hints, screen, timeline, callbacks, tracking, statefile, randomness,
                   keeping, guard, diagnosis, relief, budget, stopping
    0 ground       recipe, settings, document, cookbook, configfile, memory, step, layer, fused,
                   shape, cards, fitting, speed, siblings, plansheet, records, templates, sources, ledger,
                   rundir, store, mirror, identity, durations, address, llama, places, vault, hub,
                   redact, errors

From a notebook::

    import qlora
    recipe = qlora.load_recipe("quickstart")
    print(qlora.plan(recipe, "t4"))
    run = qlora.train(recipe)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_recipe": "qlora.recipe",
    "Recipe": "qlora.recipe",
    "plan": "qlora.planning",
    "train": "qlora.trainer",
    "resume": "qlora.trainer",
    "evaluate": "qlora.evaluation",
    "merge": "qlora.merging",
    "combine": "qlora.combining",
    "show": "qlora.preview",
    "Run": "qlora.rundir",
    "open_run": "qlora.rundir",
    "QLoRAError": "qlora.errors",
}
__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from qlora.combining import combine as combine
    from qlora.errors import QLoRAError as QLoRAError
    from qlora.evaluation import evaluate as evaluate
    from qlora.merging import merge as merge
    from qlora.planning import plan as plan
    from qlora.preview import show as show
    from qlora.recipe import Recipe as Recipe
    from qlora.recipe import load_recipe as load_recipe
    from qlora.rundir import Run as Run
    from qlora.rundir import open_run as open_run
    from qlora.trainer import resume as resume
    from qlora.trainer import train as train


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import qlora`` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
