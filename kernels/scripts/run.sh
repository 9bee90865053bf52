#!/usr/bin/env bash
# run.sh [NAME ..]: runs the binaries beside it with the CUDA libraries of the toolkit, or of python3's wheels, in reach.
set -u
here=$(cd "$(dirname "$0")" && pwd)
folders=$(python3 - <<'P' 2>/dev/null
import glob, os, sys
found = []
for path in sys.path:
    found += sorted(d for d in glob.glob(os.path.join(path, "nvidia", "*", "lib")) if glob.glob(d + "/*.so*"))
print(":".join(dict.fromkeys(found)))
P
)
for folder in /usr/local/cuda/lib64 /usr/local/nvidia/lib64; do
  [ -d "$folder" ] && folders="$folders:$folder"
done
export LD_LIBRARY_PATH="$folders${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
failed=0
for name in ${*:-kernels_test bench_cuda}; do
  echo "=== $name"
  case $name in
  *test) "$here/$name" cuda:: --test-threads 1 --nocapture ;;
  *) "$here/$name" ;;
  esac || failed=1
done
exit $failed
