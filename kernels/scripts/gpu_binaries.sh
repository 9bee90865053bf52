#!/usr/bin/env bash
# gpu_binaries.sh DEST: builds the CUDA tests and benchmarks into DEST with a script, DEST/run.sh, that runs them on a
# machine with a driver and no Rust. Copy DEST there; run.sh takes names of binaries, or runs all.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dest=${1:?DEST}
cd "$here/../.."
if [ -z "${CUDA_HOME:-}" ]; then
  kernels/scripts/cuda_setup.sh
  . kernels/scripts/cuda_env.sh
fi
mkdir -p "$dest"
build() { # NAME CARGO_ARGUMENTS..: the one executable that cargo reports, stripped
  local name=$1
  shift
  cargo build --release --features cuda --message-format json-render-diagnostics "$@" |
    python3 -c '
import json, sys
files = [m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")]
assert len(files) == 1, files
print(files[0])' | xargs -I{} cp {} "$dest/$name"
  strip "$dest/$name"
}
build kernels_test -p mka-kernels --test it
build bench_cuda -p mka-kernels --example bench_cuda
cp "$here/run.sh" kernels/docs/peers/*.py "$dest/" 2>/dev/null || cp "$here/run.sh" "$dest/"
ls -l "$dest"
