#!/usr/bin/env bash
# Runs the tests of the kernels for aarch64, NEON included: natively, or under qemu.
#
# Elsewhere than on aarch64 that takes a cross linker and libc, qemu, and a Rust standard library for the
# target. What is missing is had from Debian: linker and qemu are installed; where the Rust toolchain in use
# lacks the target, Debian's rustc-web and its arm64 library are unpacked below the target directory, so
# that neither that toolchain nor the package database changes.
set -euo pipefail
cd "$(dirname "$0")/.."

TARGET=aarch64-unknown-linux-gnu
ROOT=${CARGO_TARGET_DIR:-target}/aarch64
export PROPTEST_CASES=${PROPTEST_CASES:-16} # emulation is some fifty times slower
export CARGO_TARGET_DIR=$ROOT/build         # another compiler's artefacts stay out of the usual ones
export CARGO_INCREMENTAL=0

need() {
  echo "test-aarch64 needs $1" >&2
  exit 1
}

if [ "$(uname -m)" = aarch64 ]; then
  exec cargo test -p patchcore-kernels
fi

missing=()
command -v aarch64-linux-gnu-gcc >/dev/null || missing+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
command -v qemu-aarch64 >/dev/null || missing+=(qemu-user)
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || need "a cross gcc for aarch64 with its libc, and qemu-aarch64, on the PATH"
  [ "$(id -u)" = 0 ] || need "the packages ${missing[*]}: install them, or run it as root"
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "${missing[@]}" >/dev/null
fi

# Downloads rustc-web, what it needs and the target's library with an apt of its own, and unpacks them.
unpack_toolchain() {
  local host tree=$1
  host=$(dpkg --print-architecture)
  mkdir -p "$ROOT"/apt/{lists,cache,debs}
  cat >"$ROOT/apt/conf" <<EOF
APT::Architectures { "$host"; "arm64"; };
APT::Sandbox::User "root";
Dir::State::lists "$(realpath "$ROOT")/apt/lists";
Dir::Cache "$(realpath "$ROOT")/apt/cache";
EOF
  export APT_CONFIG
  APT_CONFIG=$(realpath "$ROOT/apt/conf")
  apt-get -qq update
  local packages=(rustc-web "libstd-rust-web-dev:$host" libstd-rust-web-dev:arm64) package
  for package in $(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances rustc-web | grep -E '^lib[^:]+$' | sort -u); do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || packages+=("$package:$host")
  done
  (cd "$ROOT/apt/debs" && rm -f -- *.deb && apt-get -qq download "${packages[@]}")
  unset APT_CONFIG
  rm -rf "$tree" "$tree.new"
  for package in "$ROOT"/apt/debs/*.deb; do
    dpkg-deb --extract "$package" "$tree.new"
  done
  mv "$tree.new" "$tree"
  rm -r "$ROOT/apt"
}

if [ ! -d "$(rustc --print sysroot)/lib/rustlib/$TARGET/lib" ]; then
  tree=$ROOT/toolchain
  if [ ! -d "$tree" ]; then
    command -v apt-get >/dev/null || need "the Rust target: rustup target add $TARGET"
    unpack_toolchain "$tree"
  fi
  RUSTC=$(realpath "$tree/usr/bin/rustc")
  RUSTDOC=$(realpath "$tree/usr/bin/rustdoc")
  export RUSTC RUSTDOC
  LD_LIBRARY_PATH=$(realpath "$tree/usr/lib/$(gcc -print-multiarch)"):$(realpath "$tree/usr/lib")
  export LD_LIBRARY_PATH
fi

# With the emulator as the runner, cargo test works as it does at home. The two tests that go through every shape of
# data at every width are left out, as they would take hours; the random tests beside them draw the same shapes.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
cargo test -p patchcore-kernels --target "$TARGET" -- --skip every_shape
