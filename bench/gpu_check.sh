#!/usr/bin/env bash
# Turns an hour with a GPU into evidence: bench/gpu_check.sh tests | tables | sample | train | compiled
#
#   tests      every gpu test, 1,000 repeats, compute-sanitizer on one small step of each
#              implementation
#   tables     which GEMM and which attention runs, measured and entered
#   sample     device time by kernel, waits of the sampler, then python -m bench on the sampler, on
#              networks, parts of an iteration and operators, on data and on other packages
#   train      memory, 300 steps of the digits in three precisions, micro-batches as graphs, python
#              -m bench on training and the optimiser
#   compiled   the rows against torch.compile: mostly compilation
#
# On an H200 with 16 cores: tests 112 s, train 136, sample 258, a compiled row 77 to 125 (pieces:
# bench/results/nvidia-h200/checks.txt). Each part is one call that ends within
# $BUDGET seconds (default 460): a piece gets its own limit or what is left, and is killed with all
# that it started. Needs torch, triton, cupy and pytest, no
# network. Results are written as JSON while it goes, under $OUT (default bench/results/gpu), beside
# the words of all pieces in PART.log and the tables that were written. A piece that fails is told
# in the table at the end, and the rest goes on; exit status 1 then, 2 without a GPU. Variables:
# PYTHON; JOBS (processes, default the cores); FPDM_PTX (csrc/cuda as PTX for sm_70, see
# tests/test_cuda_gpu.py); FPDM_COMMIT (for a copy without git).
set -u
part="${1:-}"
case "$part" in
  tests | tables | sample | train | compiled) ;;
  *)
    echo "gpu_check.sh: error: got '$part', expected tests, tables, sample, train or compiled" >&2
    exit 2
    ;;
esac
here="$(cd "$(dirname "$0")/.." && pwd)"
out="${OUT:-$here/bench/results/gpu}"
python="${PYTHON:-python3}"
jobs="${JOBS:-$(nproc)}"
budget="${BUDGET:-460}"
cd "$here" || exit 1
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check.sh: error: got no CUDA device for $python, expected one" >&2
  exit 2
}
[ -n "${FPDM_COMMIT:-}" ] || git rev-parse HEAD >/dev/null 2>&1 || {
  echo "gpu_check.sh: error: got neither git nor FPDM_COMMIT, expected the commit to name" >&2
  exit 2
}
mkdir -p "$out" || exit 1
work="$(mktemp -d)" || exit 1
trap 'rm -rf "$work"' EXIT
: >"$out/$part.log"

# piece NAME SECONDS COMMAND...: runs it with a limit and keeps its words and how it ended
piece() {
  local name="$1" limit="$2" left=$((budget - SECONDS)) began=$SECONDS status=0 ended=passed
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -gt 0 ]; then
    # what is deaf to SIGTERM, as a process in a driver's call is, gets SIGKILL
    timeout -k 3 "$limit" "$@" >"$work/$name.log" 2>&1
    status=$?
  else
    ended="not started"
    echo "no time left of $budget s" >"$work/$name.log"
  fi
  [ "$status" = 0 ] || ended="exit $status"
  case $status in
    # 137 is also what a process gets that took too much memory
    124 | 137) [ $((SECONDS - began)) -lt "$limit" ] || ended="stopped at $limit s" ;;
  esac
  # one write a piece: pieces may run in the background
  printf '%-16s %-18s %4d s   %s\n' "$name" "$ended" $((SECONDS - began)) \
    "$(tail -n 1 "$work/$name.log" | cut -c1-120)" >>"$work/table"
  echo "== $name: $ended after $((SECONDS - began)) s"
  tail -n 4 "$work/$name.log" | cut -c1-300
  { echo "== $name: $*"; cat "$work/$name.log"; } >>"$out/$part.log"
}

case "$part" in
  tests)
    options=()
    # as many processes as cores: a team of threads each would fill them many times over
    "$python" -c 'import xdist' 2>/dev/null && options+=(-n "$jobs") &&
      export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
    # a test that hangs costs its worker, not the piece
    "$python" -c 'import pytest_timeout' 2>/dev/null &&
      options+=(--timeout 150 --timeout-method thread)
    mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
    # exit 127 where there is no compute-sanitizer: not run is not passed
    sanitizer=(compute-sanitizer --error-exitcode 9 --tool)
    # without torch's cache every tensor is an allocation of its own, and what passes its end is
    # seen
    piece memcheck 200 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "${sanitizer[@]}" memcheck "$python" -m bench.gpu smoke &
    piece racecheck 200 "${sanitizer[@]}" racecheck "$python" -m bench.gpu smoke &
    piece gpu_tests 280 "$python" -m pytest -v --tb short -m "gpu and not slow and not alone" \
      "${options[@]}" --junitxml "$out/gpu_tests.xml" "${files[@]}" &
    # beside the others: what they do to its order of blocks is welcome
    piece gpu_repeats 280 "$python" -m pytest -v --tb short -m "gpu and slow" "${files[@]}"
    wait
    piece gpu_tests_alone 120 "$python" -m pytest -v --tb short -m "gpu and not slow and alone" \
      "${files[@]}"
    ;;
  tables)
    piece gemm 200 "$python" -m bench.gemm --out "$out/gemm.json" --write --jobs "$jobs" \
      --batches 2 16 64
    # our tiles were slower at every smaller one
    piece gemm_large 60 "$python" -m bench.gemm --out "$out/gemm_large.json" --write \
      --batches 128 256 --dtypes bfloat16 --routes cublaslt
    piece attention 60 "$python" -m bench.attention --out "$out/attention.json" --write
    # one file: at most eight of a part come back from a lent machine
    tar -cf "$out/tables.tar" -C fpdm/kernels gemm_table.json attention_table.json
    ;;
  sample)
    piece profile 60 "$python" -m bench.gpu profile --out "$out"
    piece syncs 60 "$python" -m bench.gpu syncs --out "$out"
    piece bench_sampler 220 "$python" -m bench --suite sampler --skip compiled \
      --out "$out/bench_sampler.json"
    piece bench_network 120 "$python" -m bench --suite network iteration operators \
      --out "$out/bench_network.json"
    piece bench_rest 60 "$python" -m bench --suite data "third party" --out "$out/bench_rest.json"
    ;;
  train)
    piece memory 80 "$python" -m bench.gpu memory --out "$out"
    piece digits 90 "$python" -m bench.gpu digits --out "$out"
    piece replays 80 "$python" -m bench.gpu replays --out "$out"
    piece bench_train 200 "$python" -m bench --suite training optimizer --skip compiled \
      --out "$out/bench_train.json"
    ;;
  compiled)
    piece compiled_1 180 "$python" -m bench --suite sampler --row 'B1 .*compiled' \
      --out "$out/compiled_1.json"
    piece compiled_train 150 "$python" -m bench --suite training --row compiled \
      --out "$out/compiled_train.json"
    piece compiled_64 120 "$python" -m bench --suite sampler --row 'B64.*compiled' \
      --out "$out/compiled_64.json"
    ;;
esac
echo
cat "$work/table" | tee -a "$out/$part.log"
failed="$(grep -cv '^[^ ]* *passed ' "$work/table")"
echo "$part: $failed failed after $SECONDS s, results in $out"
[ "$failed" = 0 ]
