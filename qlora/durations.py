"""Times as people write them: 90s, 10m, 1h30m."""

from __future__ import annotations

import re

_PARTS = re.compile(r"^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?$")


def seconds(text: str) -> float:
    """Seconds of a duration.

    >>> seconds("90m"), seconds("1h30m"), seconds("45s")
    (5400.0, 5400.0, 45.0)

    Raises:
        ValueError: It is none, or zero; says how one is written.
    """
    found = _PARTS.match(text.strip())
    days, hours, minutes, rest = (int(part or 0) for part in found.groups()) if found else (0,) * 4
    total = float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    if not total:
        raise ValueError(f"{text!r}, which is no duration; write one such as 90s, 10m or 1h30m")
    return total
