#!/usr/bin/env bash
# swift.sh ARGUMENT...: `swift ARGUMENT...` in this package, by the machine's own Swift 6, or else, as root on Debian, by one
# that swift-root.sh puts into .swift. It links the library that `cargo test --workspace` builds.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
root=$(cd "$here/../.." && pwd)
command=$1
shift
# options FOLDER: with the library in FOLDER, by its whole name: the linker runs elsewhere.
options() { options=(--package-path bindings/swift --scratch-path target/swift -Xlinker "-L$1" -Xlinker -rpath -Xlinker "$1"); }
if command -v swift >/dev/null; then
  cd "$root"
  options "$root/target/debug/deps"
  exec swift "$command" "${options[@]}" "$@"
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "swift.sh: no swift in PATH, and not root on a Debian that could fetch one: expected either" >&2
  exit 1
fi
"$here/scripts/swift-root.sh" "$root/.swift" install
options /src/target/debug/deps
exec "$here/scripts/swift-root.sh" "$root/.swift" run "$root" swift "$command" "${options[@]}" "$@"
