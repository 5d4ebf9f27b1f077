"""Tables on the screen in which no number is cut."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 1000


def console_for(*tables: Table) -> Console:
    """A console as wide as the terminal, or wider where a table needs it: the terminal wraps a line, Rich cuts it."""
    console = Console(highlight=False)
    options = console.options.update(max_width=_WIDEST)
    needed = max(Measurement.get(console, options, table).maximum for table in tables)
    return Console(highlight=False, width=max(console.width, needed))
