#!/usr/bin/env bash
# test.sh [PYTEST ARGUMENT...]: builds the wheel, installs it in a clean virtual environment, and runs the Python tests there.
# Needs python3 (3.11 or newer), pip and cargo; a Debian python3 without venv is completed by apt, as root.
# MKA_PROFILE=release builds what users get; the default is the profile that the Rust tests use, which is built already.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/target/python
mkdir -p "$work"

venv() { # venv FOLDER
  [ -x "$1/bin/pip" ] && return
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    apt-get update -q
    apt-get install -qy --no-install-recommends python3-venv
  fi
  python3 -m venv "$1"
}

venv "$work/build"
"$work/build/bin/pip" install -q "maturin==1.16.0"
rm -rf "$work/wheels"
profile=(--profile "${MKA_PROFILE:-dev}")
(cd "$here" && "$work/build/bin/maturin" build -q "${profile[@]}" --out "$work/wheels")
wheel=$(ls "$work"/wheels/mka-*.whl)
echo "wheel: $(basename "$wheel"), $(($(stat -c %s "$wheel") / 1024)) KiB, profile ${MKA_PROFILE:-dev}"

rm -rf "$work/clean"
venv "$work/clean"
"$work/clean/bin/pip" install -q "$wheel[numpy,langgraph,openai-agents,llama-index,pydantic-ai,mcp]" -r "$here/tests/requirements.txt"
cd "$here"
exec "$work/clean/bin/python" -m pytest -q -p no:cacheprovider "$@"
