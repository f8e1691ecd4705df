#!/usr/bin/env bash
# Proves that a Debian with Python, git and make, and nothing else, is enough for a fresh clone.
#
#   scripts/bare-debian.sh [TARGET…]      default: demo test
#
# Run as root on a Debian that has debootstrap. It builds a minimal Debian in a temporary folder,
# gives it what this machine uses to reach packages (name servers, certificates, the configuration
# of apt, pip and npm), clones HEAD into it and makes each target there, in mount and process namespaces
# of its own, so that neither a mount nor a process outlives it.
set -euo pipefail
cd "$(dirname "$0")/.."

# Variables by which clients of package registries are told how to reach them.
readonly NETWORK='^(PIP_|UV_|NPM_CONFIG_|NODE_EXTRA_CA_CERTS=|SSL_CERT_|REQUESTS_CA_BUNDLE=|(https?|no|all)_proxy=)'
readonly CONFIGURATION=(
  /etc/resolv.conf /etc/hosts /etc/ssl/certs /usr/local/share/ca-certificates
  /etc/apt /usr/share/keyrings /etc/pip.conf /etc/xdg/pip "$HOME/.config/pip" "$HOME/.npmrc"
)

fail() {
  printf 'bare-debian: %s\n' "$*" >&2
  exit 1
}

[[ $(id -u) == 0 ]] || fail 'only root may build a Debian'
command -v debootstrap >/dev/null || fail 'please run: apt-get install -y debootstrap'
targets=("$@")
((${#targets[@]})) || targets=(demo test)

root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
chmod 755 "$root"

# The release is this machine's, and so is the mirror: the first that apt reads its main section from.
# shellcheck disable=SC1091  # not a file of ours
release=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
# shellcheck disable=SC2016  # apt's variable, not the shell's
mirror=$(apt-get indextargets --format '$(REPO_URI)' \
  'Identifier: Packages' "Codename: $release" 'Component: main' | head -n 1)
[[ $mirror ]] || fail "apt knows no mirror of $release"

printf 'bare-debian: building %s\n' "$release"
debootstrap --variant=minbase --include=python3,git,make,ca-certificates \
  "$release" "$root" "$mirror" >"$root.log" 2>&1 || {
  cat "$root.log" >&2
  fail 'debootstrap failed'
}
rm "$root.log"

for path in "${CONFIGURATION[@]}"; do
  [[ -e $path ]] || continue
  mkdir -p "$root$(dirname "$path")"
  rm -rf "$root$path" # its links are absolute and would be followed out of the folder
  cp -aLT "$path" "$root$path"
done
git clone --quiet --no-local . "$root/root/holdoff"

mapfile -t network < <(env | grep -iE "$NETWORK")
# The folder becomes the root of a mount namespace, as on a machine: in a mere chroot nobody may make
# mounts private, which `holdoff run --isolate always` has to.
# shellcheck disable=SC2016  # for the shell in the namespaces
inside() {
  unshare --mount --pid --fork --kill-child --propagation private -- \
    sh -ec 'mount --bind "$0" "$0"
      cd "$0"
      mount -t proc proc proc
      mount -t sysfs -o ro sysfs sys
      mount -t devpts devpts dev/pts
      mount -t tmpfs tmpfs dev/shm
      pivot_root . mnt
      cd /
      umount --lazy /mnt
      exec "$@"' \
    "$root" /usr/bin/env -i "${network[@]}" \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "$@" </dev/null
}

# Else this would prove nothing.
for command in pip pip3 uv cc gcc; do
  ! inside sh -c "command -v $command" || fail "the minimal Debian has $command"
done
! inside python3 -c 'import ensurepip' 2>/dev/null || fail 'the minimal Debian has ensurepip'

for target in "${targets[@]}"; do
  printf 'bare-debian: make %s\n' "$target"
  SECONDS=0
  inside make -C /root/holdoff "$target"
  printf 'bare-debian: make %s passed in %d s\n' "$target" "$SECONDS"
done
