#!/usr/bin/env bash
# build-xcframework.sh: CMKA.xcframework for macOS, iOS and its simulator, beside Package.swift. Needs a Mac with Xcode and
# rustup. It is checked for syntax here (`bash -n`), and has not been run: there is no Mac in our tests.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
root=$(cd "$here/../.." && pwd)
[ "$(uname)" = Darwin ] || { echo "build-xcframework.sh: system $(uname), expected Darwin" >&2; exit 1; }
targets=(aarch64-apple-darwin x86_64-apple-darwin aarch64-apple-ios aarch64-apple-ios-sim x86_64-apple-ios)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
rustup target add "${targets[@]}"
for target in "${targets[@]}"; do
  # Only Apple links the library statically: other builds do without 275 MB.
  RUSTFLAGS="--remap-path-prefix=$root=." cargo rustc --release -p mka-bindings --lib --crate-type staticlib --target "$target"
done
# One library a platform; its headers in a folder of their own, so that two packages' module maps do not meet.
headers=$work/headers/CMKA
mkdir -p "$headers" "$work/macos" "$work/simulator"
cp "$here"/Sources/CMKA/{CMKA,direct}.h "$headers/"
grep -v 'link "mka_bindings"' "$here/Sources/CMKA/module.modulemap" >"$headers/module.modulemap"
library() { echo "target/$1/release/libmka_bindings.a"; }
lipo -create "$(library aarch64-apple-darwin)" "$(library x86_64-apple-darwin)" -output "$work/macos/libmka_bindings.a"
lipo -create "$(library aarch64-apple-ios-sim)" "$(library x86_64-apple-ios)" -output "$work/simulator/libmka_bindings.a"
rm -rf "$here/CMKA.xcframework"
xcodebuild -create-xcframework \
  -library "$work/macos/libmka_bindings.a" -headers "$work/headers" \
  -library "$(library aarch64-apple-ios)" -headers "$work/headers" \
  -library "$work/simulator/libmka_bindings.a" -headers "$work/headers" \
  -output "$here/CMKA.xcframework"
