"""Secrets: what looks like one, where it stands, and text without it.

Tokens come from the environment, netrc or the hub's token file, and belong nowhere else: not in a recipe,
a log, a model card or a tracker. What cannot be told for sure is decided by what an error costs: a text
loses a word too many (:func:`clean`), a recipe is refused only for what is hardly anything else
(:func:`find`).
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MASK = "***"
MIN_CHARS = 8  # of a secret in the environment: "false" and "1" are none
MIN_PART_CHARS = 16  # below this, a secret inside a longer word is a coincidence

Address = tuple[str, ...]

_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
# Names of places, and of Hugging Face's switch for its tokenizers.
_NOT_NAMES = re.compile(r"(_(FILE|PATH|DIR|NAME|ID)|^TOKENIZERS_\w+)$", re.IGNORECASE)
_TOKENS = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{30,}              # Hugging Face
      | wandb_v\d_\w{20,} | local-[0-9a-f]{40}                      # wandb; its older keys are plain hex
      | sk-(?:proj|ant|svcacct|admin|or)-[\w-]{16,}                 # OpenAI and who copied it
      | (?<!-)sk-[A-Za-z0-9]{20,}
      | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{20,}
      | (?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])                    # Amazon
      | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    )""",
    re.VERBOSE,
)
# scheme://user:password@, also with the one slash that a path made of an address has
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:/{1,2})([^\s/:@]*:[^\s/]+)@")
_HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])")
# A commit has 40 hexadecimal digits too: in a path, after an @, or named as one, it is left alone.
_COMMIT = re.compile(
    r"([/\\@]|(?<![A-Za-z])(revision|commit|commit_hash|sha1?|ref|version)\W{0,6})$", re.IGNORECASE
)
_HEADER = re.compile(
    r"(authorization\W{1,6}(?:(?:bearer|basic|token)\s+)?)[^\s\"',}]+", re.IGNORECASE
)
# Keys of settings whose value is a secret whatever it looks like.
_SECRET_KEYS = re.compile(
    r"^(token|use_auth_token|(\w+_)?(api_?key|auth_token|access_token|hub_token|secret|password))$",
    re.IGNORECASE,
)


def secrets_in_environment() -> tuple[str, ...]:
    """Values of environment variables that are named like a secret, longest first.

    Those of at least eight characters whose name holds TOKEN, KEY, SECRET or PASSW, and the passwords
    within addresses such as ``HTTPS_PROXY``.
    """
    found: set[str] = set()
    for name, value in os.environ.items():
        if _NAMES.search(name) and not _NOT_NAMES.search(name):
            found.add(value.strip())
        for login in _LOGIN.finditer(value):
            password = login[2].partition(":")[2]
            found |= {password, unquote(password)}
    return _ordered(found)


def secrets_on_disk() -> tuple[str, ...]:
    """The passwords of netrc and the hub's token, longest first; nothing where there is none."""
    found: set[str] = set()
    for path in netrc_files():
        try:
            found |= {login[2] for login in netrc.netrc(str(path)).hosts.values() if login[2]}
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
            continue
    try:
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        place = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
        found.add(place.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: there is no home
        pass
    return _ordered(found)


def netrc_files() -> list[Path]:
    """Where logins may be kept, in the order of asking; only files that are there."""
    found = []
    for name in (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"):
        try:
            path = Path(name).expanduser()
        except RuntimeError:  # there is no home
            continue
        if name and path.is_file():
            found.append(path)
    return found


def find(value: object) -> list[Address]:
    """Where a value, or what is in it, looks like a secret: addresses, ``()`` for the value itself.

    Forty hexadecimal digits are a wandb key, except under the key ``revision``: there they are a commit.

    >>> find({"run": {"project": "hf_" + "a" * 34}, "model": {"revision": "0" * 40}})
    [('run', 'project')]
    >>> find("a user's task-classification-data"), find("ftp://me:geheim@example.org")
    ([], [()])
    """
    known = (*secrets_in_environment(), *secrets_on_disk())
    return list(dict.fromkeys(_find(value, (), known)))


def _find(value: object, address: Address, known: tuple[str, ...]) -> Iterator[Address]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and _looks_secret(key, (), known):
                yield (*address, MASK)
            else:
                yield from _find(inner, (*address, str(key)), known)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _find(item, (*address, str(number)), known)
    elif isinstance(value, str | os.PathLike) and _looks_secret(str(value), address, known):
        yield address


def _looks_secret(text: str, address: Address, known: tuple[str, ...]) -> bool:
    own = address[-1] if address else ""
    if own != "revision" and _HEX.fullmatch(text.strip()):
        return True
    return bool(
        _TOKENS.search(text)
        or _LOGIN.search(text)
        or (text and _SECRET_KEYS.match(own))
        or any(
            text == secret or (len(secret) >= MIN_PART_CHARS and secret in text) for secret in known
        )
    )


def clean(text: str) -> str:
    """A text with every secret replaced by ``***``: those of this machine, and what looks like one.

    >>> clean("cannot reach http://me:geheim@proxy:3128 as hf_" + "a" * 34)
    'cannot reach http://***@proxy:3128 as ***'
    >>> clean("model at revision " + "0" * 40) == "model at revision " + "0" * 40
    True
    """
    text = _LOGIN.sub(rf"\1{MASK}@", text)
    for secret in (*secrets_in_environment(), *secrets_on_disk()):
        text = text.replace(secret, MASK)
    text = _HEADER.sub(rf"\1{MASK}", _TOKENS.sub(MASK, text))
    return _HEX.sub(lambda hit: hit[0] if _COMMIT.search(text[: hit.start()]) else MASK, text)


def cleaned(value: Any) -> Any:
    """Nested dictionaries and lists with every text :func:`clean`; other values as they are.

    A commit under a key such as ``revision`` or ``commit`` stays.

    >>> cleaned({"argv": ["--key", "sk-" + "a" * 30], "commit": "0" * 40, "r": 8})["argv"]
    ['--key', '***']
    """
    if isinstance(value, Mapping):
        return {
            clean(str(key)): inner
            if isinstance(inner, str) and _HEX.fullmatch(inner) and _COMMIT.search(str(key))
            else cleaned(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _ordered(found: set[str]) -> tuple[str, ...]:
    # Longest first: a secret that holds another one is not left with a tail.
    return tuple(sorted((s for s in found if len(s) >= MIN_CHARS), key=lambda s: (-len(s), s)))
