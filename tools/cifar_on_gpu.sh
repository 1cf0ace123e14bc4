#!/usr/bin/env bash
# cifar_on_gpu.sh OUT MINUTES ARM...: the study's cifar suite on a machine with a GPU and no network (docs/gpu-measuring.md).
# Reads .carry/ (the images' archive, unknown sets, wheels, and runs to go on with); leaves a .tgz for each run, and logs,
# in OUT.
set -euo pipefail
out=$1 minutes=$2
shift 2
python=${PYTHON:-python3} runs=$PWD/runs/cifar
mkdir -p "$out" "$runs"
if ls .carry/wheels/*.whl > /dev/null 2>&1; then
  $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .carry/wheels/*.whl
  export PYTHONPATH=/tmp/site
fi
$python -c 'import uasparse_kernels.training.study.compare'  # what is missing shows before anything takes long
MAX_JOBS=$(nproc) TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} $python setup.py build_ext --inplace > "$out/build.log" 2>&1 &
build=$!
$python -m tarfile -e .carry/cifar10-images.tar.xz /tmp/cifar
for state in .carry/state/*.tgz; do
  [ ! -e "$state" ] || tar -xzf "$state" -C "$runs"
done
wait $build
arms=()
for arm in "$@"; do arms+=(--arm "$arm"); done
# A run that the time cut off has a checkpoint of its last epoch; compare says so, and ends well.
$python -m training compare --suite cifar --data folder:/tmp/cifar/cifar10-images --data-dir .carry/unknowns \
  --seeds 1 --sparsity 0.9 "${arms[@]}" --jobs $# --minutes "$minutes" --device cuda --out "$runs" 2>&1 | tee "$out/log" ||
  echo "compare failed: $?" | tee -a "$out/log"
for run in "$runs"/*/seed*; do
  name=${run#"$runs"/}
  tar -czf "$out/${name//[^A-Za-z0-9.-]/_}.tgz" -C "$runs" "$name" &
done
wait
ls -l "$out"
