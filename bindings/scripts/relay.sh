#!/usr/bin/env bash
# relay.sh [MODEL]: one scripted conversation from Rust, Python and Swift gives the same bytes, alone and taking turns on one
# store. The model is the tiny one of the tests, whose bytes are in tests/data; of another one the three are compared.
# Needs what python/scripts/test.sh and swift/scripts/test.sh leave behind: the wheel's environment and the Swift programs.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
model=${1:-engine/tests/data/golden/gguf/model.gguf}
script=bindings/tests/data/conversation.json
work=target/relay
rm -rf "$work"
mkdir -p "$work"

# What was built in the root of swift-root.sh runs there.
swift=()
command -v swift >/dev/null || swift=(bindings/swift/scripts/swift-root.sh .swift run "$root")
say() { # say LANGUAGE STORE FROM TO
  local language=$1 store=$2
  shift 2
  case $language in
  rust) target/debug/examples/conversation "$store" "$model" "$script" "$@" ;;
  python) target/python/clean/bin/python bindings/python/examples/conversation.py "$store" "$model" "$script" "$@" ;;
  swift) "${swift[@]}" target/swift/debug/Conversation "$store" "$model" "$script" "$@" ;;
  esac
}

expected=bindings/tests/data/conversation.txt
if [ $# -gt 0 ]; then
  # The chroot of swift.sh sees the repository alone.
  cp "$model" "$work/model.gguf"
  model=$work/model.gguf
  expected=$work/rust.txt
fi
for language in rust python swift; do
  say "$language" "$work/$language.mka" 0 99 >"$work/$language.txt"
  cmp "$expected" "$work/$language.txt"
  echo "$language: $(wc -l <"$work/$language.txt") lines, as expected"
done
for order in "rust python swift" "swift rust python" "python swift rust"; do
  read -r first second third <<<"$order"
  store=$work/relay.mka
  rm -rf "$store"
  { say "$first" "$store" 0 3; say "$second" "$store" 3 6; say "$third" "$store" 6 99; } >"$work/relay.txt"
  cmp "$expected" "$work/relay.txt"
  echo "$order on one store: as expected"
done
