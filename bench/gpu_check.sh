#!/usr/bin/env bash
# Turns an hour with a GPU into evidence: bench/gpu_check.sh tests | sample | train | compiled
#
#   tests      every gpu test, compute-sanitizer on one small step of each implementation (90 s)
#   sample     tables of the fused GEMMs and of attention's routes, device time by kernel, waits of
#              the sampler, then python -m bench on operators, parts of an iteration, network and
#              sampler (3 minutes)
#   train      memory, 300 steps of the digits in three precisions, micro-batches as graphs, python -m
#              bench on training and the optimiser (4 minutes)
#   compiled   the rows against torch.compile: mostly compilation (7 minutes)
#
# Each part is one call under 8 minutes on a machine with torch, triton, cupy and pytest. Results are
# written as JSON while it goes, under $OUT (default bench/results/gpu). A piece that fails is named
# at the end and the rest goes on. Variables: PYTHON; JOBS (processes, default the cores); FPDM_PTX
# (csrc/cuda as PTX for sm_70, see tests/test_cuda_gpu.py); FPDM_COMMIT (for a copy without git).
set -u
part="${1:-}"
here="$(cd "$(dirname "$0")/.." && pwd)"
out="${OUT:-$here/bench/results/gpu}"
python="${PYTHON:-python3}"
jobs="${JOBS:-$(nproc)}"
cd "$here" || exit 1
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
rm -f "$out/failed"

# piece NAME SECONDS COMMAND...: runs it with a limit, keeps its words, remembers a failure
piece() {
  local name="$1" limit="$2" began=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "== $name: exit $status after $((SECONDS - began)) s"
  tail -n 4 "$out/$name.log" | cut -c1-300
  # a file: pieces may run in the background
  [ "$status" = 0 ] || echo "$name" >>"$out/failed"
}

# exit 127 where there is no compute-sanitizer: not run is not passed
sanitizer=(compute-sanitizer --error-exitcode 9 --tool)

case "$part" in
  tests)
    parallel=()
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$jobs")
    # what measures or fills the device's memory runs alone
    alone="captures_give or graphs_give or releases_its_pool or memory_pressure or never_waits"
    piece memcheck 200 "${sanitizer[@]}" memcheck "$python" -m bench.gpu smoke &
    piece racecheck 200 "${sanitizer[@]}" racecheck "$python" -m bench.gpu smoke &
    piece gpu_tests 280 "$python" -m pytest -q -m "gpu and not slow" --continue-on-collection-errors \
      "${parallel[@]}" -k "not ($alone)" --junitxml "$out/gpu_tests.xml" tests
    wait
    piece gpu_tests_alone 120 "$python" -m pytest -q -m "gpu and not slow" \
      --continue-on-collection-errors -k "$alone" tests
    ;;
  sample)
    piece gemm 200 "$python" -m bench.gemm --out "$out/gemm.json" --write --jobs "$jobs"
    piece attention 60 "$python" -m bench.attention --out "$out/attention.json" --write
    piece profile 60 "$python" -m bench.gpu profile --out "$out"
    piece syncs 60 "$python" -m bench.gpu syncs --out "$out"
    piece bench_sample 200 "$python" -m bench --suite operators iteration network sampler --skip compiled \
      --out "$out/bench_sample.json"
    ;;
  train)
    piece memory 60 "$python" -m bench.gpu memory --out "$out"
    piece digits 90 "$python" -m bench.gpu digits --out "$out"
    piece replays 60 "$python" -m bench.gpu replays --out "$out"
    piece bench_train 200 "$python" -m bench --suite training optimizer --skip compiled \
      --out "$out/bench_train.json"
    ;;
  compiled)
    piece compiled_train 200 "$python" -m bench --suite training --row compiled \
      --out "$out/compiled_train.json"
    piece compiled_64 120 "$python" -m bench --suite sampler --row 'B64.*compiled' \
      --out "$out/compiled_64.json"
    piece compiled_1 150 "$python" -m bench --suite sampler --row 'B1 .*compiled' \
      --out "$out/compiled_1.json"
    ;;
  *)
    echo "gpu_check.sh: error: got '$part', expected tests, sample, train or compiled" >&2
    exit 2
    ;;
esac
if [ -s "$out/failed" ]; then
  echo "failed: $(tr '\n' ' ' <"$out/failed")"
  exit 1
fi
echo "all pieces of $part passed"
