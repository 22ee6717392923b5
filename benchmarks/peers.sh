#!/usr/bin/env bash
# Peers that an extra cannot bring, as far as they can be had; `make bench` calls it before it measures.
# usage: benchmarks/peers.sh PYTHON. Whatever fails here only turns into "not installed" in the notes of some rows.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
pip() { "$python" -m pip --disable-pip-version-check -q install -c constraints.txt "$@"; }
has() { "$python" -m pip show -q "$1" > /dev/null 2>&1; }
try() { # try NAME COMMAND...
  local name=$1
  shift
  has "$name" || { echo "peer $name" && "$@" || echo "peer $name: not available, its rows will say so"; }
}

# Their own requirements pin other versions of torch and numpy, and most of them are not needed for what is asked here.
try megatron-core pip --no-deps megatron-core
try fairchem-core pip --no-deps fairchem-core
try axolotl pip --no-deps axolotl
# Only as source on PyPI, compiled against the torch that is installed: some minutes.
try torch_cluster env MAX_JOBS="${MAX_JOBS:-2}" FORCE_CUDA=0 \
  "$python" -m pip --disable-pip-version-check -q install -c constraints.txt --no-build-isolation --no-deps torch_cluster

# pyg-lib, tonari and multipack_sampler are not on PyPI; the benchmarks use them where they are installed.
exit 0
