#!/usr/bin/env bash
# cuda_setup.sh [DEST]: makes DEST (default .cuda) a CUDA_HOME that builds `--features cuda` on a machine without
# toolkit, driver or GPU: nvcc 13.0 and its headers as wheels from PyPI, and link stubs for the driver's libraries.
# Needs python3 with pip and gcc. Downloads 104 MB, takes 280 MB. Does nothing when DEST is complete.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dest=${1:-$root/.cuda}
[ -e "$dest/.complete" ] && exit 0
# nvcc is pinned to 13.0: a newer one writes a newer PTX, which drivers of the 580 series refuse.
packages=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip install -q --root-user-action=ignore --no-deps --no-compile --target "$work" "${packages[@]}"
rm -rf "$dest"
mkdir -p "$(dirname "$dest")"
mv "$work/nvidia/cu13" "$dest"
ln -s lib "$dest/lib64"                                   # nvcc's own link step looks in lib64
cp "$dest/lib/libcudart_static.a" "$dest/lib/libcudart.a" # -lcudart then links statically
metadata=$(cd "$root" && cargo metadata --format-version 1 --features mka-kernels/cuda)
cudarc=$(python3 -c '
import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(next(os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "cudarc"))
' <<<"$metadata")
python3 "$here/link_stubs.py" "$cudarc" "$dest/lib"
touch "$dest/.complete"
