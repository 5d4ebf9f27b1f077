#!/usr/bin/env bash
# What takes longer than .ci/run may: the tests marked full, long random hunts, the versions that are supported.
# Run it once before a release, on an idle machine, in an environment with the extra [test]:
#
#   tests/full.sh [marked] [edits] [matrix]      all three unless some are named
#
# marked: pytest -m full; edits: 2,000 random sequences of edits (tests/test_edits.py); matrix: tests/matrix.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -gt 0 ]] || set -- marked edits matrix
for part; do
  case $part in
    marked) python -m pytest -q -m full tests ;;
    edits) IDLEVIT_EDITS=2000 python -m pytest -q tests/test_edits.py ;;
    matrix) tests/matrix.sh ;;
    *) echo "full.sh: a part must be marked, edits or matrix, got $part" >&2; exit 2 ;;
  esac
done
