#!/usr/bin/env bash
# Prepares, on a machine without a GPU, what takes long on one with: the extension for its architecture and Python, and a
# Triton cache of all kernels that first_contact.sh and gpu_report.py launch. Both lie in build/gpu afterwards, a few MB that
# git ignores. Run it with the Python, torch and Triton of that machine: the cache is good for the identical Triton wheel
# and the same lines of source alone. What has not changed since the last time is left as it is.
#
# Usage: PYTHON=/path/to/python3.12 bash bench/pack_for_gpu.sh [--arch 90]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" bench/gpu_pack.py pack "$@"
