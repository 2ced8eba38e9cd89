"""Every failure a user can cause, as one tree.

The message is the interface: it says what was asked (with its address in the recipe or the
file), what was found, and what to do, cheapest first. The command line prints it as it is and
exits with :attr:`QLoRAError.exit_code`; nothing else about the failure is shown.
"""

from __future__ import annotations


class QLoRAError(Exception):
    """Something the user can mend. Its text is complete: no traceback is needed to act on it."""

    exit_code = 2


class RecipeError(QLoRAError):
    """The recipe cannot be read, or asks for something that does not exist or contradicts itself."""


class DataError(QLoRAError):
    """The data cannot be read, or would not train what was meant."""


class ModelError(QLoRAError):
    """The base model or its tokenizer is missing, unreadable or unsuited."""


class CacheError(QLoRAError):
    """Something kept on disk has another name, or cannot be removed."""


class HardwareError(QLoRAError):
    """The machine cannot do what the recipe asks of it."""


class DoesNotFit(HardwareError):
    """The plan needs more memory than the card has, before any weight is read; or the card ran out."""


class CheckpointError(QLoRAError):
    """A run directory, checkpoint or adapter is missing, torn or not what it claims to be."""


class ExportError(QLoRAError):
    """What was to be written for use elsewhere cannot be, or is not what was trained."""


class ServerError(QLoRAError):
    """The server cannot start as it was asked to."""


class TrainingDiverged(QLoRAError):
    """A loss, gradient or weight stopped being a finite number, or losses rose too far; names the rows."""


class SelfTestFailed(QLoRAError):
    """The same rows gave another loss or gradient when they were laid out in another way."""


class Interrupted(QLoRAError):
    """A signal stopped the run. The message names the last complete checkpoint.

    ``exit_code`` is 128 and the number of the signal: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM came where there was nothing to finish. Like Ctrl-C it passes what catches errors."""
