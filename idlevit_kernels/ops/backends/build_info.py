"""What the build of the native extension recorded: whether it was built, with what, and if not, why."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def build_info() -> dict[str, Any]:
    """The record that the install wrote next to the extension; empty if the package was never installed."""
    path = Path(__file__).parents[2] / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}
