"""Counts of what a server did, in the text that Prometheus reads. Nothing of what was asked or said."""

from __future__ import annotations

import threading
from collections.abc import Mapping

Labels = tuple[tuple[str, str], ...]
BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0)  # seconds


class Meter:
    """Counters and histograms by name and labels. For any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = {}
        self._seconds: dict[str, dict[Labels, list[float]]] = {}

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count something; its name ends with ``_total``."""
        with self._lock:
            found = self._counts.setdefault(name, {})
            key = tuple(sorted(labels.items()))
            found[key] = found.get(key, 0.0) + amount

    def time(self, name: str, seconds: float, **labels: str) -> None:
        """Put a duration into its buckets."""
        with self._lock:
            found = self._seconds.setdefault(name, {})
            row = found.setdefault(tuple(sorted(labels.items())), [0.0] * (len(BUCKETS) + 2))
            for index, bound in enumerate(BUCKETS):
                row[index] += seconds <= bound
            row[-2] += 1
            row[-1] += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it, and some values as they are now."""
        lines = []
        with self._lock:
            for name, rows in sorted(self._counts.items()):
                lines.append(f"# TYPE {name} counter")
                lines += [f"{name}{_shown(key)} {value:g}" for key, value in sorted(rows.items())]
            for name, histogram in sorted(self._seconds.items()):
                lines.append(f"# TYPE {name} histogram")
                for key, row in sorted(histogram.items()):
                    for bound, count in zip((*map(str, BUCKETS), "+Inf"), row, strict=False):
                        lines.append(f"{name}_bucket{_shown((*key, ('le', bound)))} {count:g}")
                    lines.append(f"{name}_count{_shown(key)} {row[-2]:g}")
                    lines.append(f"{name}_sum{_shown(key)} {row[-1]:.6f}")
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    r"""Labels as Prometheus writes them.

    >>> _shown((("model", 'a "b"\n'),))
    '{model="a \\"b\\"\\n"}'
    """
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for name, value in labels
    )
    joined = ",".join(f'{name}="{value}"' for name, value in escaped)
    return f"{{{joined}}}" if joined else ""
