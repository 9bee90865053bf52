#!/usr/bin/env bash
# swift-root.sh ROOT install | swift-root.sh ROOT run PROJECT COMMAND...: a Swift toolchain for Debian 12, which has none.
# `install` unpacks Debian 13 with swiftlang into the folder ROOT (540 MB to download, 2.1 GB while it unpacks, 1.4 GB kept;
# nothing when it is there);
# `run` runs COMMAND in it with PROJECT as /src, in a mount namespace of its own, so that nothing is left mounted.
# Needs root and apt; writes ROOT, and installs the package debootstrap where it is missing.
set -euo pipefail
root=$1
mode=$2
shift 2

case $mode in
install)
  [ -e "$root/.complete" ] && exit 0
  if ! command -v debootstrap >/dev/null; then
    apt-get update -q
    apt-get install -qy --no-install-recommends debootstrap
  fi
  # The archive that this machine's apt uses, or Debian's own.
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' |
    grep -E '/debian/?$' | head -n 1 || true)
  rm -rf "$root"
  mkdir -p "$root"
  # What building, testing, DocC and the formatter do without: left out while unpacking, so that the disk never holds it.
  mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
  printf 'path-exclude=%s\n' '/usr/share/doc/*' '/usr/share/locale/*' '/usr/share/man/*' '/usr/share/info/*' \
    '/usr/libexec/swift/lib/swift_static/*' '/usr/libexec/swift/lib/swift/embedded/*' '/usr/libexec/swift/lib/liblldb.so*' \
    '/usr/libexec/swift/bin/lldb*' '/usr/libexec/swift/bin/clangd' '/usr/libexec/swift/bin/sourcekit-lsp' \
    '/usr/libexec/swift/lib/libsourcekitdInProc.so' >"$root/etc/dpkg/dpkg.cfg.d/mka"
  # libc6-dev and libstdc++-14-dev: swiftlang links nothing without them, and does not depend on them.
  debootstrap --variant=minbase --components=main --include=swiftlang,libc6-dev,libstdc++-14-dev \
    trixie "$root" "${mirror:-http://deb.debian.org/debian}" >"$root.log" 2>&1 ||
    {
      # debootstrap names the package alone; why it failed (a full disk, say) stands in its own log.
      tail -n 20 "$root.log" "$root/debootstrap/debootstrap.log" >&2 || true
      df -h "$root" >&2
      exit 1
    }
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  rm -f "$root.log"
  touch "$root/.complete"
  ;;
run)
  project=$1
  shift
  # /proc: the toolchain finds its own libraries through /proc/self.
  exec unshare --mount --propagation private bash -euc '
    root=$1 project=$2
    shift 2
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mkdir -p "$root/src"
    mount --bind "$project" "$root/src"
    # Models that were fetched already.
    if [ -d "$HOME/.cache/mka" ]; then
      mkdir -p "$root/root/.cache/mka"
      mount --bind "$HOME/.cache/mka" "$root/root/.cache/mka"
    fi
    exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/usr/sbin HOME=/root LC_ALL=C.UTF-8 \
      sh -c "cd /src && exec \"\$@\"" sh "$@"' bash "$root" "$project" "$@"
  ;;
*)
  echo "swift-root.sh: mode $mode, expected install or run" >&2
  exit 2
  ;;
esac
