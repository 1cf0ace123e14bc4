"""Plain text tables of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

WIDTH = 100
_LONGEST_NAME = 36


def render(
    header: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[str], *, numbers: Collection[int] = ()
) -> str:
    """A table with a rule above, below and between. The first column, of names, loses its beginnings where it is too
    wide, the last is wrapped; ``numbers`` are the columns that are aligned to the right."""
    rows = [[_shortened(row[0]), *row[1:]] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    widths[-1] = min(widths[-1], max(12, WIDTH - sum(widths[:-1]) - 2 * len(widths[:-1])))
    lines = []
    for row in [header, *rows]:
        last = textwrap.wrap(row[-1], widths[-1]) or [""]
        for i, part in enumerate(last):
            cells = [*row[:-1], part] if i == 0 else [*[""] * (len(row) - 1), part]
            placed = [
                c.rjust(w) if n in numbers else c.ljust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append("  ".join(placed).rstrip())
    below = [part for line in footer for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ")]
    width = max(map(len, lines + below))
    lines.insert(1, "-" * width)
    rule = "=" * width
    return "\n".join([rule, *lines, rule, *below, *([rule] if below else [])])


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "..." + name[3 - _LONGEST_NAME :]


def bytes_of(count: float) -> str:
    """Such as "23.1 MB", in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
