"""The table of tests/matrix.sh: ``versions`` prints those of this environment, ``table FOLDER`` the results in it."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

LIBRARIES = ("torch", "timm", "transformers", "triton", "numpy")


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    return found


def table(results: Path) -> tuple[str, bool]:
    """Markdown, and whether all passed. A file that left no results, as when it crashed, is a failure."""
    rows, failures = [], []
    for environment in sorted(path for path in results.iterdir() if (path / "versions").exists()):
        passed = failed = skipped = 0
        for done in sorted(environment.glob("*.done")):
            report = done.with_suffix(".xml")
            cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
            bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
            left_out = sum(c.find("skipped") is not None for c in cases)
            skipped += left_out
            passed += len(cases) - len(bad) - left_out
            failed += len(bad) + (not report.exists())
            if not report.exists():
                failures.append(f"- {environment.name}: tests/{done.stem}.py left no results; see {done.stem}.log")
            failures += [f"- {environment.name}: {c.get('classname')}.{c.get('name')}" for c in bad]
        facts = json.loads((environment / "versions").read_text())
        rows.append([environment.name, *facts.values(), str(passed), str(failed), str(skipped)])
    head = ["environment", "Python", *LIBRARIES, "passed", "failed", "skipped"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", *failures]), not failures and bool(rows)


if __name__ == "__main__":
    if sys.argv[1] == "versions":
        print(json.dumps(versions()))
    else:
        text, passed = table(Path(sys.argv[2]))
        print(text)
        sys.exit(not passed)
