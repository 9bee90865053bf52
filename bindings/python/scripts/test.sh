#!/usr/bin/env bash
# test.sh [PYTEST ARGUMENT...]: builds the wheel, installs it in a clean virtual environment, and runs the Python tests there.
# Needs python3 (3.11 or newer), pip and cargo; a Debian python3 without venv is completed by apt, as root.
# The wheel holds the library that `cargo test --workspace` built; MKA_PROFILE=release packs what users get.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
root=$(cd "$here/../.." && pwd)
work=$root/target/python
profile=${MKA_PROFILE:-dev}
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
[ "$profile" != dev ] || export PATH="$here/scripts/as-tested:$PATH"
(cd "$here" && "$work/build/bin/maturin" build -q --profile "$profile" --out "$work/wheels")
wheel=$(ls "$work"/wheels/mka-*.whl)
echo "wheel: $(basename "$wheel"), $(($(stat -c %s "$wheel") / 1024)) KiB, profile $profile"

rm -rf "$work/clean"
venv "$work/clean"
"$work/clean/bin/pip" install -q "$wheel[numpy,langchain,langgraph,openai-agents,llama-index,pydantic-ai,mcp]" -r "$here/tests/requirements.txt"
cd "$here"
exec "$work/clean/bin/python" -m pytest -q -p no:cacheprovider "$@"
