"""Weights & Biases, when asked: online, offline or not at all, and never in the way of a run.

Decided before the weights are loaded: without a key, wandb raises or prompts; with a key and no network
it waits for minutes and then ends the run. Nothing but metrics and the recipe is sent: no console
output, no code, no git state, no rows.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qlora import hub

INIT_TIMEOUT_SECONDS = 10


class Silent:
    """The tracker that tracks nothing."""

    note = ""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Drop the values."""

    def finish(self) -> None:
        """Nothing to finish."""


class Wandb:
    """A wandb run. A failure of wandb is announced once and ends the tracking, not the training."""

    def __init__(self, project: str, name: str, folder: Path, config: dict[str, Any]) -> None:
        self.note = ""
        self._run: Any = None
        try:
            mode, reason = mode_now()
            if mode == "disabled":
                self.note = f"wandb is disabled ({reason})"
                return
            import wandb

            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                config=config,
                mode=mode,
                settings=wandb.Settings(
                    init_timeout=INIT_TIMEOUT_SECONDS,
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    save_code=False,
                    silent=True,
                ),
            )
            self.note = f"wandb {mode} ({reason})"
        except Exception as error:  # noqa: BLE001 - wandb raises many kinds; none may stop a run
            self._give_up(error)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send one line of metrics."""
        if self._run is not None:
            try:
                self._run.log(values, step=step)
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def finish(self) -> None:
        """Close the run; what is offline stays in the run directory for ``wandb sync``."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self.note = f"wandb failed and is left out: {type(error).__name__}: {str(error)[:200]}"


def mode_now() -> tuple[str, str]:
    """(online, offline or disabled, and why): by WANDB_MODE, the key, and one connection.

    A dead network is found here, because wandb cannot fall back by itself: after a failed online
    start an offline one in the same process fails too (wandb issue 9865).
    """
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked in ("disabled", "offline", "dryrun"):
        return ("disabled" if asked == "disabled" else "offline"), f"WANDB_MODE={asked}"
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = url.hostname or "api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _key_in_netrc(host):
        return "offline", "no WANDB_API_KEY"
    port = url.port or (80 if url.scheme == "http" else 443)
    problem = (
        None
        if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
        else hub.connection_problem(host, port)
    )
    return ("offline", problem) if problem else ("online", host)


def _key_in_netrc(host: str) -> bool:
    for path in (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"):
        file = Path(path).expanduser() if path else None
        if file is not None and file.is_file():
            try:
                return netrc.netrc(str(file)).authenticators(host) is not None
            except (netrc.NetrcParseError, OSError):
                return False
    return False
