#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under nine minutes: build from the clean tree, the tests on CUDA with the
# demo and a step of every model, the benchmarks with the copy ceiling, then compute-sanitizer on the op tests. Every
# step's log and figures land in $OUT (default gpu-results): build.log, doctor.txt, tests.log, benchmarks.log,
# cuda_ops.json, cuda_ops.md, roofline.png, sanitizer.log. Needs python3 with torch (CUDA), pybind11, scikit-build-core,
# pytest, hypothesis and nvcc; transformers as a peer, lightning and matplotlib for training if they are there; installs
# nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
failed=0
step() {  # step NAME SECONDS COMMAND...: runs it, keeps the log, notes a failure and goes on
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  if timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1; then tail -n 3 "$OUT/$name.log"; else failed=1; tail -n 40 "$OUT/$name.log"; fi
}
# Files that run on CUDA; the others want libraries that such a machine may lack.
mapfile -t files < <(grep -lE 'usefixtures\("engine"\)|"cuda"' tests/ops/test_*.py)
on_cuda=(python3 -m pytest "${files[@]}" tests/test_cuda.py tests/native/test_nvtx.py
  -k "(cuda or nvtx or on_a_gpu) and not emulated" -m "not slow" -q -rs -p no:cacheprovider --continue-on-collection-errors)
# Data that stay on the device, a step of every model, the demo: where their libraries are.
training=(tests/data/test_resident.py tests/train/test_every_system.py tests/train/test_demo.py)

site=$(mktemp -d)
step build 120 env CMAKE_ARGS="-DMOEYARD_CUDA=ON" python3 -m pip install -q --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH="$site"
{ python3 -m moeyard.doctor; env | grep -E "^(CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CMAKE_ARGS|CC|CXX)="; } | tee "$OUT/doctor.txt"
step tests 180 "${on_cuda[@]}" "${training[@]}"
step benchmarks 140 python3 benchmarks/cuda_ops.py --out "$OUT"

# A slow checker: a few examples of each test are enough for it, and what does not fit into its time is not an error.
: > "$OUT/sanitizer.log"
if ! command -v compute-sanitizer > /dev/null; then
  echo "compute-sanitizer is not installed" | tee "$OUT/sanitizer.log"
else
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== compute-sanitizer $tool" | tee -a "$OUT/sanitizer.log"
    MOEYARD_EXAMPLES=0.02 timeout 25 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "${on_cuda[@]}" -x > "$OUT/one_tool.log" 2>&1
    status=$?
    tail -n 200 "$OUT/one_tool.log" >> "$OUT/sanitizer.log"
    refused=$(grep -c "Device not supported" "$OUT/one_tool.log")
    rm "$OUT/one_tool.log"
    if [ "$refused" -gt 0 ]; then
      echo "compute-sanitizer does not accept this device" | tee -a "$OUT/sanitizer.log"
      break
    fi
    case $status in
      0) echo "$tool: clean" ;;
      124) echo "$tool: out of time, nothing found until then" ;;
      *) echo "$tool: exit status $status"; tail -n 20 "$OUT/sanitizer.log" ;;
    esac | tee -a "$OUT/sanitizer.log"
    [ "$status" -eq 0 ] || [ "$status" -eq 124 ] || failed=1
  done
fi
exit "$failed"
