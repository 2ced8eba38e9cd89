"""Whether the Hugging Face hub can be asked, found out in seconds.

The libraries retry for most of a minute before they say that there is no network, and then say it in a
traceback. Here one connection is tried first.
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5


def unreachable() -> str | None:
    """Why the hub cannot be asked, in words, or None if a connection opens.

    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and proxies are respected; behind a proxy only the proxy can tell.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE forbids asking the hub"
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return None
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
    except ValueError as error:
        return f"HF_ENDPOINT is no address ({error})"
    return connection_problem(url.hostname or "huggingface.co", port)


def connection_problem(host: str, port: int) -> str | None:
    """Why no connection to ``host`` opens within five seconds, or None if one does."""
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: not a name of the DNS
        return f"{host} cannot be reached ({getattr(error, 'strerror', None) or error})"
    return None
