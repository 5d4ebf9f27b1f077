#!/usr/bin/env bash
# First contact with a GPU: is everything right? Prepares what pack_for_gpu.sh has left here, or builds it, and runs the
# steps that check: ceilings, every op and case, the GPU tests, compute-sanitizer, every op at three batch sizes.
#
# Usage: bash bench/first_contact.sh [--smoke] [--output DIR]     (JSON lines go to DIR, or $OUT if that is set)
# SECONDS_IN_ALL (230) is kept whatever happens; a part that fails or hangs costs itself alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
begin=$SECONDS
in_all=${SECONDS_IN_ALL:-230}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$PWD/build/gpu/triton}"

left() { echo $((in_all - (SECONDS - begin))); }

# A part: so many seconds at most, and whatever it does, the next one runs.
part() {
  local seconds=$1
  shift
  local at_most
  at_most=$(left)
  ((seconds < at_most)) || seconds=$at_most
  ((seconds > 0)) || { echo "first_contact: no time is left for: $*" && return; }
  # In the foreground, so that whoever ends this script ends the part with it.
  timeout --foreground --kill-after=5 "$seconds" "$@" || echo "first_contact: exit code $? of: $*"
}

smoke=()
for argument in "$@"; do [[ $argument != --smoke ]] || smoke=(--smoke); done

part 120 "$python" bench/gpu_pack.py use "${smoke[@]}"
rest=$(left)
part "$rest" "$python" bench/gpu_report.py --steps ceilings,correct,tests,sanitizer,ops --seconds "$((rest > 15 ? rest - 10 : 5))" "$@"
echo "first_contact: ended after $((SECONDS - begin)) of $in_all s"
