#!/usr/bin/env bash
# Turns an hour with a GPU into evidence: bench/gpu_check.sh tests | sample | train
# Each part is one call under 8 minutes on a machine with torch and triton only; results are written as
# JSON while it goes, under $OUT (default bench/results/<part>), and it goes on past a failing piece.
set -u
part="${1:-}"
here="$(cd "$(dirname "$0")/.." && pwd)"
out="${OUT:-$here/bench/results}/$part"
python="${PYTHON:-python3}"
cd "$here" || exit 1
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
case "$part" in
  tests)
    mkdir -p "$out"
    "$python" -m pytest -q -m gpu --continue-on-collection-errors tests \
      --junitxml "$out/gpu_tests.xml" 2>&1 | tee "$out/gpu_tests.txt"
    status=${PIPESTATUS[0]}
    if command -v compute-sanitizer >/dev/null 2>&1; then
      compute-sanitizer --tool memcheck "$python" -m bench.gpu smoke >"$out/memcheck.txt" 2>&1 \
        || echo "memcheck failed, see $out/memcheck.txt"
      tail -n 2 "$out/memcheck.txt"
    else
      echo "compute-sanitizer: not on this machine, not run"
    fi
    exit "$status"
    ;;
  sample | train)
    mkdir -p "$out"
    exec "$python" -m bench.gpu "$part" --out "$out"
    ;;
  *)
    echo "gpu_check.sh: error: got '$part', expected tests, sample or train" >&2
    exit 2
    ;;
esac
