#!/usr/bin/env bash
# Everything that needs a GPU, in one run of at most eight and a half minutes: build from the clean tree, the tests on
# CUDA with the demo and a step of every model, the benchmarks with the copy ceiling, then compute-sanitizer on a few
# tests of every op. Every step's log and figures land in $OUT (default gpu-results): build.log, doctor.txt, tests.log,
# benchmarks.log, cuda_ops.json, cuda_ops.md, roofline.png, sanitizer.log. Needs python3 with torch (CUDA), pybind11,
# scikit-build-core, pytest, hypothesis and nvcc; transformers as a peer, pydantic, lightning and matplotlib for training
# if they are there, be it as wheels unpacked elsewhere that PYTHONPATH names; installs nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
failed=0
step() {  # step NAME SECONDS COMMAND...: runs it, keeps the log, notes a failure and goes on
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  if timeout -k 5 "$seconds" "$@" > "$OUT/$name.log" 2>&1; then tail -n 3 "$OUT/$name.log"; else failed=1; tail -n 40 "$OUT/$name.log"; fi
}
# Files that run on CUDA; the others want libraries that such a machine may lack.
mapfile -t files < <(grep -lE 'usefixtures\("engine"\)|"cuda"' tests/ops/test_*.py)
pytest=(python3 -m pytest -rs -p no:cacheprovider --continue-on-collection-errors)
# Data that stay on the device, a step of every model, the demo: where their libraries are.
training=(tests/data/test_resident.py tests/train/test_every_system.py tests/train/test_demo.py)

site=$(mktemp -d)
# The seconds of all steps, and five more each for what does not stop when told, are 505.
step build 120 env CMAKE_ARGS="-DMOEYARD_CUDA=ON" python3 -m pip install -q --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
{ timeout -k 5 10 python3 -m moeyard.doctor; env | grep -E "^(CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CMAKE_ARGS|CC|CXX)="; } | tee "$OUT/doctor.txt"
step tests 145 "${pytest[@]}" -q -m "not slow" -k "(cuda or nvtx or on_a_gpu) and not emulated" \
  "${files[@]}" tests/test_cuda.py tests/native/test_nvtx.py "${training[@]}"
step benchmarks 110 python3 benchmarks/cuda_ops.py --out "$OUT"

# A slow checker: a few examples of a few tests are enough for it, the shortest files first, so that every op has its
# turn. What does not fit into its time is not an error.
few=(-m "not slow and not large" -k "cuda and not emulated and (agree or any_call or bad)")
mapfile -t engines < <(ls -rS tests/ops/test_*_engines.py)
: > "$OUT/sanitizer.log"
if ! command -v compute-sanitizer > /dev/null; then
  echo "compute-sanitizer is not installed" | tee "$OUT/sanitizer.log"
else
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== compute-sanitizer $tool" | tee -a "$OUT/sanitizer.log"
    MOEYARD_EXAMPLES=0.02 timeout -k 5 20 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "${pytest[@]}" -v -x "${few[@]}" "${engines[@]}" > "$OUT/one_tool.log" 2>&1
    status=$?
    { tail -n 200 "$OUT/one_tool.log"; echo; } >> "$OUT/sanitizer.log"
    # Out of time, neither pytest's last line nor the exit status is there to tell what ran and what was found.
    ran=$(grep -oE ' (PASSED|FAILED)' "$OUT/one_tool.log" | wc -l)
    found=$(grep -cE '(^|[^=])={9} (Invalid|Uninitialized|Barrier error|Error: Race)' "$OUT/one_tool.log")
    refused=$(grep -c "Device not supported" "$OUT/one_tool.log")
    rm "$OUT/one_tool.log"
    if [ "$refused" -gt 0 ]; then
      echo "compute-sanitizer does not accept this device" | tee -a "$OUT/sanitizer.log"
      break
    fi
    case $status:$found in
      0:*) echo "$tool: clean, $ran tests ran" ;;
      124:0 | 137:0) echo "$tool: out of time, nothing found in the $ran tests that ran" ;;
      *) echo "$tool: exit status $status, $ran tests ran" ;;
    esac | tee -a "$OUT/sanitizer.log"
    case $status:$found in 0:* | 124:0 | 137:0) ;; *) failed=1; tail -n 20 "$OUT/sanitizer.log" ;; esac
  done
fi
exit "$failed"
