# . kernels/scripts/cuda_env.sh [CUDA_HOME]: what a build with `--features cuda` reads, after cuda_setup.sh.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export CUDA_HOME="${1:-$_root/.cuda}"
export NVCC="$_root/kernels/scripts/nvcc.sh"
export CUDARC_CUDA_VERSION=13000 # else cudarc asks the nvcc of PATH
export CUDA_COMPUTE_CAP=80       # candle's kernels as PTX that every card since A100 takes
export CUDAFORGE_THREADS=2
export LIBRARY_PATH="$CUDA_HOME/lib${LIBRARY_PATH:+:$LIBRARY_PATH}"
unset _root
