#!/usr/bin/env bash
# test.sh [SWIFT TEST ARGUMENT...]: the package builds without a warning, Apple's side of it is well formed, and its tests pass.
# That the generated code is up to date is a test of `cargo test --workspace` (bindings/bindgen).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
root=$(cd "$here/../.." && pwd)
(cd "$root" && cargo test -q --workspace --no-run)
bash -n "$here/scripts/build-xcframework.sh"
log=$root/target/swift.log
"$here/scripts/swift.sh" build --build-tests 2>&1 | tee "$log"
# The generated code is not ours to mend: everything else compiles without a warning.
if grep 'warning:' "$log" | grep -v 'Sources/MKABindings/' >&2; then
  echo "test.sh: expected no warning" >&2
  exit 1
fi
"$here/scripts/swift.sh" package -Xbuild-tools-swiftc -DAPPLE_MANIFEST dump-package >/dev/null
"$here/scripts/swift.sh" test --skip-build "$@"
