"""Documents name only files and modules that there are."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
# What a path may begin at: a document names the package's own files without the package, and a test by its name.
ROOTS = [ROOT, *(ROOT / name for name in ("idlevit_kernels", "csrc", "tests", "bench"))]
ENDINGS = r"py|md|sh|h|cpp|cuh?|json|csv|png|svg|toml|txt|pt2?|onnx|ya?ml"
PATH = re.compile(rf"(?<![\w./<-])\.?[A-Za-z_][\w.-]*(?:/[\w.-]+)*(?:/|\.(?:{ENDINGS}))(?![\w/-])")
# What the commands that are shown write, or what is the reader's own.
NOT_OURS = re.compile(
    r"deit\.onnx|deit\.pt2|idling\.png|schedule\.json|segmentation\.png|val/|[A-Z]+\.json|(.*/)?my_\w+\.(py|h)"
)


def names(text: str) -> Iterator[str]:
    """Paths that stand in a document, in code or in a link, without what is an address elsewhere."""
    text = re.sub(r"https?://\S+", "", text)
    for span in re.findall(r"```.*?```|`[^`\n]+`|\]\([^)\s]+\)", text, re.S):
        for match in PATH.finditer(span):
            if not NOT_OURS.fullmatch(match[0]):
                yield match[0]


def exists(name: str) -> bool:
    return any((root / name).exists() for root in ROOTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    missing = sorted({name for name in names((ROOT / document).read_text()) if not exists(name)})
    assert not missing, f"{document} names {', '.join(missing)}, which there is not"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_exists(document: str) -> None:
    for dotted in set(re.findall(r"\bidlevit_kernels(?:\.\w+)+", (ROOT / document).read_text())):
        parts = dotted.split(".")
        found = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)


def test_what_the_search_finds() -> None:
    text = "`ops/library.py` and `csrc/cpu/` ([plot](bench/results/gone.png), https://x.org/a.py, a.py, `x.shape`)"
    assert list(names(text)) == ["ops/library.py", "csrc/cpu/", "bench/results/gone.png"]
    assert exists("ops/library.py") and exists("csrc/cpu/") and not exists("bench/results/gone.png")
