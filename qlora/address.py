"""Where a server listens, and who may come: keys from the environment, and names of this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence

from qlora.errors import ServerError

KEY = "QLORA_API_KEY"  # the environment variable; an argument could be seen by others
MIN_KEY_CHARS = 16


def keys_for(host: str, names: Sequence[str]) -> list[str]:
    """The keys in these environment variables; without names, that of ``QLORA_API_KEY`` if it is set.

    Raises:
        ServerError: A named variable is not set, a key is too short, or there is none where one is needed.
    """
    keys = []
    for name in names or (KEY,):
        key = os.environ.get(name, "").strip()
        if key and len(key) < MIN_KEY_CHARS:
            raise ServerError(
                f"the key in {name} has {len(key)} characters, which can be guessed; at least "
                f"{MIN_KEY_CHARS} are needed. Make one: python -c "
                "'import secrets; print(secrets.token_urlsafe(32))'."
            )
        if not key and names:
            raise ServerError(f"--api-key-env names {name}, which is not set in the environment.")
        keys += [key] if key else []
    if not keys and not is_loopback(host):
        raise ServerError(
            f"--host is {host!r}, which others can reach, and there is no key that they would need. Leave "
            f"--host out, or put a key of at least {MIN_KEY_CHARS} characters into the environment "
            f"variable {KEY} (it would be seen in a command line)."
        )
    return keys


def listen(host: str, port: int) -> socket.socket:
    """The socket to serve on, taken before anything slow is loaded.

    Raises:
        ServerError: The port is taken, or the address is none of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # else a port that was just let go is taken for a minute
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen(128)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ServerError(
            f"cannot listen on {host}, port {port}: {why}. Name another with --port, or stop what is there."
        ) from None
    return found


def host_name(header: str) -> str:
    """A Host header's name, without the port.

    >>> host_name("[::1]:8000"), host_name("localhost:8000"), host_name("127.0.0.1")
    ('::1', 'localhost', '127.0.0.1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether an address or name can only mean this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
