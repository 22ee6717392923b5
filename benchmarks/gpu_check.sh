#!/usr/bin/env bash
# Everything that needs a GPU, in one run: build, the test suite with CUDA, compute-sanitizer on the op tests, then the
# benchmarks and the copy ceiling. Most important first; every step's log and figures land in $OUT (default gpu-results).
# Needs python3 with torch (CUDA), pybind11, scikit-build-core, pytest, hypothesis and nvcc; installs nothing else.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
failed=0
step() {  # step NAME COMMAND...: runs it, keeps the log, notes a failure and goes on
  local name=$1
  shift
  echo "== $name"
  if "$@" > "$OUT/$name.log" 2>&1; then tail -n 3 "$OUT/$name.log"; else failed=1; tail -n 40 "$OUT/$name.log"; fi
}

site=$(mktemp -d)
step build env CMAKE_ARGS="-DMOEYARD_CUDA=ON" python3 -m pip install -q --no-build-isolation --no-deps --target "$site" .
export PYTHONPATH="$site"
{ python3 -m moeyard.doctor; env | grep -E "^(CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CMAKE_ARGS|CC|CXX)="; } | tee "$OUT/doctor.txt"
step tests python3 -m pytest tests/ops tests/test_cuda.py tests/test_native.py -m "not slow" -p no:cacheprovider

if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== compute-sanitizer $tool"
    timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest tests/test_cuda.py -x -q -p no:cacheprovider >> "$OUT/sanitizer.log" 2>&1
    status=$?
    if grep -q "Device not supported" "$OUT/sanitizer.log"; then
      echo "compute-sanitizer does not accept this device" | tee -a "$OUT/sanitizer.log"
      break
    fi
    [ "$status" -eq 0 ] || { failed=1; tail -n 20 "$OUT/sanitizer.log"; }
  done
else
  echo "compute-sanitizer is not installed" | tee "$OUT/sanitizer.log"
fi

step copy python3 benchmarks/cuda_copy.py --json "$OUT/copy.json"
exit "$failed"
