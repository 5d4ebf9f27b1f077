#!/usr/bin/env bash
# Runs the test suite on the oldest and the newest versions that pyproject.toml allows.
#
#   tests/matrix.sh [oldest] [newest] [mixed]      all three unless some are named
#
# oldest: the oldest Python, and every floor of pyproject.toml; the whole suite.
# newest: the newest Python on this machine, and the newest of everything; the whole suite.
# mixed:  as newest, with the floors of timm and transformers; the tests that are not marked slow.
#
# IDLEVIT_MATRIX is the folder of the environments (build/matrix); each takes some 7 GB, mixed some 60 MB beside newest.
# IDLEVIT_MATRIX_FILES names the files of tests (all), IDLEVIT_MATRIX_TIMEOUT the seconds that one may take (1800).
# IDLEVIT_CUDA=0 saves the minutes that the CUDA kernels take to build.
#
# An environment that is there is used again (remove newest to get newer releases), and a file of tests that has run on
# this very state of the tree is not run again. A run's table is in IDLEVIT_MATRIX/summary-STATE.md, each file's output
# in results-STATE beside it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_NO_INPUT=1

folder=${IDLEVIT_MATRIX:-build/matrix}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
state=$({ git rev-parse HEAD; git diff HEAD; git ls-files -z --others --exclude-standard | xargs -0 -r cat; } |
  sha256sum | cut -c1-12)
results=$folder/results-$state
[[ $# -gt 0 ]] || set -- oldest newest mixed

# The floor of each library that pyproject.toml names with one, as "name==version".
floors() {
  sed -nE 's/^ *"([a-z-]+)>=([0-9.]+)[";].*/\1==\2/p' pyproject.toml | grep -E "^($1)=="
}

# What a run needs beside those libraries: the extras' packages, without a version.
tools() {
  echo pytest pytest-benchmark hypothesis ruff mypy import-linter accelerate matplotlib scikit-image scikit-learn tensorboard
  echo onnx onnxruntime onnxscript
}

# Path of an interpreter "3.X"; pyenv's too where it is not the selected one.
interpreter() {
  local found
  if "python$1" -c "" 2>/dev/null; then
    command -v "python$1"
  elif found=$(pyenv versions --bare 2>/dev/null | grep -E "^$1\.[0-9]+$" | tail -1) && [[ -n $found ]]; then
    echo "$(pyenv prefix "$found")/bin/python"
  else
    return 1
  fi
}

newest_interpreter() {
  local minor
  for minor in 15 14 13 12 11 10; do interpreter "3.$minor" && return; done
  return 1
}

# make NAME: the environment, unless it is complete.
make() {
  local environment=$folder/$1 python complete
  complete=$environment/complete-$({ floors ".*"; tools; } | sha256sum | cut -c1-12)
  [[ -e $complete ]] && return
  case $1 in
    oldest) python=$(interpreter 3.10) ;;
    *) python=$(newest_interpreter) ;;
  esac
  [[ -x $environment/bin/python ]] || "$python" -m venv "$environment"
  local pip=("$environment/bin/python" -m pip install -q)
  case $1 in
    oldest)
      # shellcheck disable=SC2046
      "${pip[@]}" $(floors ".*") $(tools)
      ;;
    newest)
      # shellcheck disable=SC2046
      "${pip[@]}" --upgrade torch timm transformers numpy rich typer $(tools)
      ;;
    mixed) # newest's packages, with its own before them
      make newest
      "$folder/newest/bin/python" -c "import site; print(site.getsitepackages()[0])" \
        >"$("$environment/bin/python" -c "import site; print(site.getsitepackages()[0])")/newest.pth"
      # shellcheck disable=SC2046
      "${pip[@]}" $(floors "timm|transformers")
      ;;
    *)
      echo "tests/matrix.sh: no environment is called $1; there are oldest, newest and mixed" >&2
      exit 2
      ;;
  esac
  touch "$complete"
}

# install ENVIRONMENT: the package as it lies here, with the native extension for this Python, unless that is done.
install() {
  local built
  built=$1/built-$({ pwd; cat setup.py CMakeLists.txt; grep "^version" pyproject.toml; find csrc -type f | sort | xargs cat; } |
    sha256sum | cut -c1-12)
  local suffix
  suffix=$("$1/bin/python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
  [[ -e $built && -e idlevit_kernels/_C$suffix ]] && return
  "$1/bin/python" -m pip install -q --no-deps -e .
  touch "$built"
}

# run NAME: every file of tests in a process of its own, so that one that crashes or hangs is one failure.
run() {
  local environment=$folder/$1 out=$results/$1 selected="not full" file name
  [[ $1 == mixed ]] && selected="not full and not slow"
  mkdir -p "$out"
  install "$environment"
  "$environment/bin/python" tests/matrix_summary.py versions >"$out/versions"
  for file in ${IDLEVIT_MATRIX_FILES:-tests/test_*.py}; do
    name=$(basename "$file" .py)
    [[ -e $out/$name.done ]] && continue
    timeout "${IDLEVIT_MATRIX_TIMEOUT:-1800}" "$environment/bin/python" -m pytest -q -rfEs -p no:cacheprovider \
      -m "$selected" "--junitxml=$out/$name.xml" "$file" >"$out/$name.log" 2>&1 || true
    touch "$out/$name.done"
    echo "$1 $name: $(tail -1 "$out/$name.log")"
  done
}

for name in "$@"; do
  make "$name"
  run "$name"
done
"$folder/${!#}/bin/python" tests/matrix_summary.py table "$results" | tee "$folder/summary-$state.md"
