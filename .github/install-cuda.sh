#!/usr/bin/env bash
# Puts nvcc and the static CUDA runtime of one release into a manylinux container. usage: install-cuda.sh 12.8
set -euo pipefail
release=${1:?usage: install-cuda.sh MAJOR.MINOR}
case "$(uname -m)" in
  x86_64) arch=x86_64 ;;
  aarch64) arch=sbsa ;;
  *) echo "no CUDA toolkit for $(uname -m)"; exit 1 ;;
esac
dnf -q -y install dnf-plugins-core
dnf -q config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$arch/cuda-rhel8.repo"
dnf -q -y install "cuda-nvcc-${release/./-}" "cuda-cudart-devel-${release/./-}"
ln -sfn "/usr/local/cuda-$release" /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
