"""Whether one result of ``idlevit bench --json`` is faster than another: ``python bench/compare.py OLD.json NEW.json``.

Compares speed-ups over the dense model of the same run, because machines, and their moods, differ between runs; the
dense rows themselves are compared in images per second. A difference counts where the spreads (20th to 80th percentile,
of a speed-up: of both its sides) do not overlap. Exit code 1 if anything got slower.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from idlevit_kernels.measure.tables import console_for

Key = tuple[int, str, str, bool]
Spread = tuple[float, float, float]  # 20th percentile, median, 80th percentile


def key(row: dict[str, Any], schedule: Sequence[float] | None) -> Key:
    """Batch, method, keep ratio or schedule in words, and whether compiled."""
    ratio = row["keep_ratio"]
    if row["method"] == "dense":
        kept = "1"
    else:
        kept = f"{ratio:g}" if ratio is not None else " ".join(f"{r:g}" for r in schedule or [])
    return row["batch"], row["method"], kept, row["compiled"]


def read(path: Path) -> dict[Key, dict[str, Any]]:
    try:
        result = json.loads(path.read_text())
        return {key(row, result.get("schedule")): row for row in result["models"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a file that `idlevit bench --json` wrote: {error!r}") from error


def spread(rows: dict[Key, dict[str, Any]], which: Key) -> Spread:
    """Of the speed-up over dense in eager mode; of dense itself, of images per second."""
    row, dense = rows[which], rows[which[0], "dense", "1", False]
    if row is dense:
        return row["p20"], row["images_per_second"], row["p80"]
    return row["p20"] / dense["p80"], row["speedup"], row["p80"] / dense["p20"]


def verdict(old: Spread, new: Spread) -> str:
    if new[0] > old[2]:
        return f"faster, {new[1] / old[1] - 1:+.1%}"
    if new[2] < old[0]:
        return f"slower, {new[1] / old[1] - 1:+.1%}"
    return "within the spread"


def compare(old: dict[Key, dict[str, Any]], new: dict[Key, dict[str, Any]]) -> list[tuple[Key, Spread, Spread, str]]:
    """The rows that both have, in the order of the new one."""
    spreads = [(which, spread(old, which), spread(new, which)) for which in new if which in old]
    return [(which, a, b, verdict(a, b)) for which, a, b in spreads]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        rows = compare(read(options.old), read(options.new))
        if not rows:
            raise ValueError(f"{options.old} and {options.new} have no row in common")
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("batch", "method", "keep", "unit", "old (p20-p80)", "new (p20-p80)", "verdict"):
        table.add_column(title, justify="left" if title in ("method", "unit", "verdict") else "right", no_wrap=True)
    for (batch, method, kept, compiled), *both, words in rows:
        dense = method == "dense" and not compiled
        cells = [f"{median:.2f} ({low:.2f}-{high:.2f})" for low, median, high in both]
        name = f"{method}, compiled" if compiled else method
        table.add_row(
            str(batch), name, kept if " " not in kept else "schedule", "images/s" if dense else "x dense", *cells, words
        )
    console_for(table).print(table)
    return int(any(words.startswith("slower") for *_, words in rows))


if __name__ == "__main__":
    sys.exit(main())
