from __future__ import annotations

import os

# tests/test_triton_interpreter.py starts this suite with the variable set; in any other process it is not collected.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
