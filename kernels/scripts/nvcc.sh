#!/usr/bin/env bash
# nvcc.sh: nvcc for candle's kernels. candle compiles its quantised products to machine code of one card alone, and on
# another card they fail without a word: every launch is refused and the output keeps what was in memory.
# Here each object also carries PTX, which every later card takes, and the products of decoding (mmvq) Hopper's own code.
real="${CUDA_HOME:?set CUDA_HOME}/bin/nvcc"
extra=()
if [[ " $* " == *" -c "* && " $* " == *"-gencode=arch=compute_80,code=sm_80"* ]]; then
  extra+=(-gencode=arch=compute_80,code=compute_80)
  [[ "${!#}" == *mmvq_gguf.cu ]] && extra+=(-gencode=arch=compute_90,code=sm_90)
fi
exec "$real" ${extra[@]+"${extra[@]}"} "$@"
