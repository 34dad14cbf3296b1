#!/bin/sh
# What can be checked of the GPU path on a machine without a GPU: tests/cuda_standin/run.sh PYTHON [full]
#
# PYTHON has a CUDA build of torch, this project and its test dependencies. In order: the tests marked `gpu`, every
# section of bench/gpu_check.py, the packages of the torch backend (with `full`, at the released sizes).
set -eu
python=$1
scale=${2:-tiny}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/build/cuda_standin
mkdir -p "$work"
headers=$("$python" -c 'import importlib.util as u; print(u.find_spec("triton").submodule_search_locations[0])')/backends/nvidia/include
flags="-shared -fPIC -O1 -Wall -Wno-unused-parameter -I$headers"
cc $flags "$here/driver.c" -o "$work/libcuda.so.1" -Wl,-soname,libcuda.so.1
cc $flags "$here/runtime.c" -o "$work/runtime.so"

cd "$root"
unset CUDA_HOME CUDA_PATH
export LD_LIBRARY_PATH="$work" PYTHONPATH="$here" LADA_RT_CUDA_STANDIN=1
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor" TORCHINDUCTOR_COMPILE_THREADS=1
with() { LD_PRELOAD="$work/runtime.so" "$@"; }
with env TRITON_INTERPRET=1 "$python" -P -m pytest -p plugin -q -m gpu tests/test_device_pipeline.py \
    tests/test_torch_backend.py tests/test_torch_decode.py
songs=ceilings,kernels,attention,engines,sound,songs,baseline,stage_times,quiet_loop
with env TRITON_INTERPRET=1 "$python" -P -m plugin bench/gpu_check.py --device cuda --tiny --no-compile --only $songs \
    --json "$work/gpu_check.json"
with "$python" -P -m plugin "$here/packages.py" "$scale"
