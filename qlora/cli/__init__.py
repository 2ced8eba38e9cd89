"""The front door: verbs, overrides, and errors without a traceback.

A verb is a module of this folder, or shares one with its like. Nothing heavy is imported until a verb
needs it: ``qlora --help`` and ``qlora recipes list`` never load torch.
"""

from __future__ import annotations

import sys

from qlora.cli.app import app as app
from qlora.errors import QLoRAError

# Each adds its verbs, in the order in which help shows them.
# isort: off
from qlora.cli import train  # noqa: F401
from qlora.cli import chat  # noqa: F401
from qlora.cli import export  # noqa: F401
from qlora.cli import serve  # noqa: F401
from qlora.cli import evaluate  # noqa: F401
from qlora.cli import merge  # noqa: F401
from qlora.cli import combine  # noqa: F401
from qlora.cli import report  # noqa: F401
from qlora.cli import prepare  # noqa: F401
from qlora.cli import recipes  # noqa: F401
from qlora.cli import cache  # noqa: F401
# isort: on


def main() -> None:
    """Run the command line. A user's mistake ends in a short message and exit code 2."""
    try:
        app(_with_resume_filled_in(sys.argv[1:]))
    except QLoRAError as error:
        from qlora import redact

        print(f"qlora: {redact.clean(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _with_resume_filled_in(arguments: list[str]) -> list[str]:
    """`--resume` may stand alone: it then means the newest run of the recipe.

    >>> _with_resume_filled_in(["train", "mine.yaml", "--resume", "lora.r=8"])
    ['train', 'mine.yaml', '--resume', 'newest', 'lora.r=8']
    """
    filled = []
    for index, argument in enumerate(arguments):
        filled.append(argument)
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        is_override = "=" in following and "." in following.partition("=")[0]
        if argument == "--resume" and (following.startswith("-") or is_override):
            filled.append("newest")
    return filled
