#!/usr/bin/env bash
# Set up a Debian 12 or 13 machine: packages, a CRIU that works on its kernel, and pymigrate. The Makefile, CI and the
# virtual machines all use this script. It needs root. It can be repeated, and then needs no network if nothing is missing.
#
#   provision.sh --peer   what a target needs: sshd, python3, criu, rsync
#   provision.sh          that, and pymigrate in /opt/pymigrate/venv and /usr/local/bin
#   provision.sh --demo   that, and the root file system of the demo
#   provision.sh --dev    what `make demo` and `make lint` need, with .venv in the checkout
#   provision.sh --vm     that, and what `make test`, `make test-vm` and make-box need to build and run virtual machines
#
# With --image first: set up the tree of a machine that is not running yet (in a chroot). CRIU cannot be tried on its
# kernel.
set -euo pipefail

CRIU_VERSION=4.2.1
CRIU_SHA256=29ec0ee09e296479fe7048c80980e8ef1d0684d0b0204c2b101dfea19f6725b9
PREFIX=/opt/pymigrate
CACHE=/var/cache/pymigrate/rootfs
DIST_PYCRIU=/usr/lib/python3/dist-packages/pycriu/rpc_pb2.py
PIPE_MAX_SIZE=$((32 << 20))
BUILD_PACKAGES=(gcc make libbsd-dev libcap-dev libgnutls28-dev libnet1-dev libnftables-dev libnl-3-dev
    libprotobuf-c-dev libprotobuf-dev pkgconf protobuf-c-compiler protobuf-compiler uuid-dev xz-utils)

# Packages to build and run virtual machines (make-tree, make test-vm).
VM_PACKAGES=(cpio debian-archive-keyring e2fsprogs kmod mmdebstrap qemu-system-x86 qemu-utils xz-utils zstd)

# Container engines to test with pymigrate as their runtime, and the tool for id maps of users other than root.
ENGINE_PACKAGES=(containerd iptables netavark podman runc uidmap)

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=
if [ "${1:-}" = --image ]; then image=yes; shift; fi
mode=${1:-}
scratch=
policy=
venv=

say() { printf 'provision: %s\n' "$*"; }
die() { printf 'provision: error: %s\n' "$*" >&2; exit 1; }

cleanup() {
    if [ -n "$venv" ]; then kill "$venv" 2> /dev/null || true; fi
    if [ -n "$policy" ]; then rm -f "$policy"; fi
    if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
}
trap cleanup EXIT

# Install missing packages without starting daemons: the lab and the administrator decide where those run.
need() {
    local package missing=()
    for package in "$@"; do
        is_installed "$package" || missing+=("$package")
    done
    if [ ${#missing[@]} -eq 0 ]; then return; fi
    say "installing ${missing[*]}"
    apt_update
    if [ ! -e /usr/sbin/policy-rc.d ] && [ ! -d /run/systemd/system ]; then
        policy=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' > "$policy"
        chmod 755 "$policy"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qq -y --no-install-recommends \
        "${missing[@]}" > /dev/null || die "apt-get cannot install ${missing[*]}: is there a network, and is Debian's archive in apt's sources?"
    if [ -n "$policy" ]; then rm -f "$policy"; policy=; fi
}

is_installed() { dpkg-query -W -f '${db:Status-Status}' "$1" 2> /dev/null | grep -qx installed; }

updated=
apt_update() {
    if [ -z "$updated" ]; then apt-get -o DPkg::Lock::Timeout=300 update -qq; updated=yes; fi
}

# Install the distribution's CRIU if it works on this kernel; otherwise build the pinned source.
criu_works() { "$1" check > /dev/null 2>&1; }

install_criu() {
    local ours=$PREFIX/sbin/criu
    if [ -x "$ours" ]; then
        if [ "$(cat "$PREFIX/criu.version" 2>/dev/null)" = "$CRIU_VERSION" ] && criu_works "$ours"; then return; fi
    elif [ ! -e "$PREFIX/criu.version" ]; then
        is_installed criu || apt_update
        if is_installed criu || apt-cache show criu > /dev/null 2>&1; then
            need criu
            # Debian 12's criu contains it. A peer does not need it: the agent brings the messages.
            if [ "$mode" != --peer ] && [ ! -e "$DIST_PYCRIU" ]; then need python3-pycriu; fi
            if [ -n "$image" ] || criu_works criu; then return; fi
            say "the distribution's criu does not work on this kernel"
        fi
    fi
    build_criu
    criu_works "$ours" || die "criu $CRIU_VERSION does not work on this kernel: $("$ours" check 2>&1 | tail -n 1)"
}

build_criu() {
    local url tarball
    need "${BUILD_PACKAGES[@]}"
    apt_update
    say "building criu $CRIU_VERSION"
    scratch=$(mktemp -d)
    chmod 755 "$scratch"
    tarball=$scratch/criu.tar.xz
    for url in $(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sort -u); do
        /usr/lib/apt/apt-helper -qq download-file "${url%/}/pool/main/c/criu/criu_$CRIU_VERSION.orig.tar.xz" \
            "$tarball" "SHA256:$CRIU_SHA256" > /dev/null 2>&1 && break
    done
    [ -s "$tarball" ] || die "criu_$CRIU_VERSION.orig.tar.xz cannot be downloaded from the mirrors that apt uses, or its SHA-256 is wrong"
    echo "$CRIU_SHA256  $tarball" | sha256sum --check --quiet || die "criu's source has the wrong SHA-256"
    tar -xf "$tarball" -C "$scratch"
    if ! make -C "$scratch/criu-$CRIU_VERSION" -j"$(nproc)" criu > "$scratch/log" 2>&1; then
        tail -n 20 "$scratch/log" >&2
        die "criu $CRIU_VERSION does not build"
    fi
    mkdir -p "$PREFIX/sbin" "$scratch/pycriu"
    (cd "$scratch/criu-$CRIU_VERSION/images" && protoc --python_out="$scratch/pycriu" ./*.proto)
    rm -rf "$PREFIX/lib/pycriu"
    mkdir -p "$PREFIX/lib/pycriu"
    cp "$scratch"/pycriu/*.py "$PREFIX/lib/pycriu/"
    install -m 755 "$scratch/criu-$CRIU_VERSION/criu/criu" "$PREFIX/sbin/criu.new"
    mv "$PREFIX/sbin/criu.new" "$PREFIX/sbin/criu"
    echo "$CRIU_VERSION" > "$PREFIX/criu.version"
    rm -rf "$scratch"
    scratch=
}

# Without CAP_SYS_RESOURCE CRIU cannot make the large pipes that its page server needs, unless the limit is raised for
# all users.
raise_pipe_size() {
    local effective
    effective=$((16#$(awk '/^CapEff/ {print $2}' /proc/self/status)))
    if (( effective >> 24 & 1 )); then return; fi
    if [ "$(cat /proc/sys/fs/pipe-max-size)" -lt "$PIPE_MAX_SIZE" ]; then
        echo "$PIPE_MAX_SIZE" > /proc/sys/fs/pipe-max-size 2> /dev/null || say "fs.pipe-max-size stays as it is"
    fi
}

# Make a root file system of a few programs from Debian's packages, with the libraries that they name. Install nothing.
#   make_rootfs NAME PACKAGES... -- FILES...
# A file is the name of a program in /usr/bin, or the pattern of a file or of a whole directory, as in /usr/lib/python3.*
make_rootfs() {
    local name=$1 packages=() files=() into place file library
    shift
    while [ "$1" != -- ]; do packages+=("$1"); shift; done
    shift
    files=("$@")
    if [ -e "$CACHE/$name" ]; then return; fi
    say "making the root file system $name"
    apt_update
    scratch=$(mktemp -d)
    chmod 755 "$scratch"
    # All packages that these need, including those that are installed here.
    mapfile -t packages < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances --no-pre-depends "${packages[@]}" | grep -E '^[a-z0-9]' | grep -v '^debconf\|^perl\|^init\|^adduser\|^lsb\|^sysv\|^dpkg\|^passwd\|^libllvm\|^locales\|^libz3' | sort -u)
    mkdir -p "$scratch/deb" "$scratch/all"
    (cd "$scratch/deb" && for package in "${packages[@]}"; do
        apt-get -qq download "$package" > /dev/null 2>&1 || true   # a virtual package has nothing to download
    done)
    for place in "$scratch"/deb/*.deb; do dpkg-deb -x "$place" "$scratch/all"; done
    into=$scratch/rootfs
    mkdir -p "$into"/{bin,dev,etc,lib,proc,root,run,sys,tmp,usr/bin,usr/lib}
    ln -s lib "$into/lib64"
    chmod 1777 "$into/tmp"
    echo 'root:x:0:0:root:/root:/bin/sh' > "$into/etc/passwd"
    echo 'root:x:0:' > "$into/etc/group"
    cp "$(find "$scratch/all" -path '*/bin/busybox' -type f | head -n 1)" "$into/bin/busybox"
    for program in $("$into/bin/busybox" --list | grep -vx busybox); do ln -s busybox "$into/bin/$program"; done
    for file in "${files[@]}"; do
        case $file in /*) ;; *) file=/usr/bin/$file ;; esac
        (cd "$scratch/all" && for place in .$file; do
            mkdir -p "$into/${place%/*}"
            if [ -d "$place" ]; then cp -a "$place" "$into/$place"; else cp -L "$place" "$into/$place"; fi
        done)
    done
    # The query compiler needs all of LLVM; a cache of byte code would be written by the first user that runs it.
    find "$into/usr" \( -name 'llvmjit*' -o -name bitcode -o -name __pycache__ \) -prune -exec rm -rf {} +
    if [ ${#files[@]} -gt 0 ]; then
        cp -L "$(find "$scratch/all" -name 'ld-linux-*.so.*' | head -n 1)" "$into/lib/"
        while library=$(missing_library "$into"); [ -n "$library" ]; do
            place=$(find "$scratch/all" -name "$library" | head -n 1)
            [ -n "$place" ] || die "root file system $name: no package has $library"
            cp -L "$place" "$into/lib/$library"
        done
    fi
    mkdir -p "$CACHE"
    mv -T "$into" "$CACHE/$name"
    rm -rf "$scratch"
    scratch=
}

# Print one library that a root file system needs and does not have, or nothing.
missing_library() {
    local needed
    for needed in $(find "$1/usr" "$1/lib" -type f -exec readelf -d {} + 2> /dev/null |
        sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u); do
        if [ ! -e "$1/lib/$needed" ]; then echo "$needed"; return; fi
    done
}

# Print the directory that a virtual environment imports from.
site_packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# write_launcher FILE DIRECTORY...: write the command so that it starts without processing site-packages.
# A read-only mount covers the interpreter's directory once there is a container (runtime/linux/selfexec.py).
write_launcher() {
    local file=$1 python=$PREFIX/sealed/python3
    shift
    mkdir -p "$PREFIX/sealed"
    [ -e "$python" ] || ln -sf /usr/bin/python3 "$python"
    {
        printf '#!%s -IS\nimport sys\nsys.path[0:0] = [' "$python"
        printf '"%s", ' "$@"
        printf ']\nfrom migrate.cli import entry\nentry()\n'
    } > "$file.new"
    chmod 755 "$file.new"
    mv -f "$file.new" "$file"
}

# Install pymigrate as a user does: a wheel of this checkout in a virtual environment. pip's own settings apply.
install_pymigrate() {
    local pip=$PREFIX/venv/bin/pip stamp
    stamp=$(cd "$top" && find README.md pyproject.toml criu_rpc migrate runtime -type f -not -name '*.pyc' -print0 |
        sort -z | xargs -0 sha256sum | sha256sum)
    if [ "$(cat "$PREFIX/venv/stamp" 2> /dev/null)" = "$stamp" ]; then return; fi
    export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    need python3-venv
    say "installing pymigrate in $PREFIX/venv"
    [ -x "$pip" ] || /usr/bin/python3 -m venv "$PREFIX/venv"
    scratch=$(mktemp -d)
    mkdir "$scratch/src"   # a build leaves files in its directory, which would get into the next one
    (cd "$top" && cp -a README.md pyproject.toml criu_rpc migrate runtime "$scratch/src")
    "$pip" wheel --no-deps -w "$scratch" "$scratch/src" || die "pip cannot build pymigrate"
    "$pip" install "$scratch"/*.whl || die "pip cannot install what pymigrate needs"
    # The same version with other contents counts as installed.
    "$pip" install --no-index --no-deps --force-reinstall "$scratch"/*.whl || die "pip cannot install pymigrate"
    rm -f /usr/local/bin/pymigrate   # a symbolic link in earlier versions
    write_launcher /usr/local/bin/pymigrate "$(site_packages "$PREFIX/venv")"
    echo "$stamp" > "$PREFIX/venv/stamp"
    rm -rf "$scratch"
    scratch=
}

# Make the virtual environment of a checkout; make it anew if pyproject.toml has changed.
make_venv() {
    local place=$top/.venv stamp
    stamp=$(sha256sum < "$top/pyproject.toml")
    if [ "$(cat "$place/stamp" 2>/dev/null)" != "$stamp" ]; then
        say "making $place"
        rm -rf "$place"
        /usr/bin/python3 -m venv "$place"
        "$place/bin/pip" install -q --disable-pip-version-check -e "${top}[dev]" 2>&1 |
            grep -v '^WARNING: Location' || true
        "$place/bin/python" -c 'import migrate.cli, google.protobuf, paramiko, rich, jeepney, pyroute2, pytest, xdist' ||
            die "pip could not install what pyproject.toml names"
    fi
    write_launcher "$place/bin/pymigrate" "$top" "$(site_packages "$place")"
    echo "$stamp" > "$place/stamp"
}

[ "$(id -u)" = 0 ] || die "must be run as root"
case $mode in
--peer | '' | --demo | --dev | --vm) ;;
*) die "unknown option $mode: --peer, --demo, --dev, --vm or nothing" ;;
esac
case $mode in
--dev | --vm)
    need ca-certificates python3-venv
    make_venv &   # in the background: pip waits for the network most of the time
    venv=$!
    ;;
esac
need openssh-server python3 rsync
if [ "$mode" != --peer ]; then need ca-certificates iproute2 libseccomp2 nftables openssh-client; fi
install_criu
if [ -z "$image" ]; then raise_pipe_size; fi
case $mode in
--demo | --dev | --vm)
    need binutils
    make_rootfs redis busybox-static redis-server redis-tools -- redis-server redis-cli
    ;;
esac
case $mode in
--dev | --vm)
    need shellcheck sshfs
    if [ "$mode" = --vm ]; then need "${VM_PACKAGES[@]}" "${ENGINE_PACKAGES[@]}"; fi
    make_rootfs busybox busybox-static --
    make_rootfs services busybox-static curl nginx-light postgresql python3 python3-minimal redis-server redis-tools -- \
        curl redis-cli redis-server /usr/bin/python3 '/usr/lib/python3.*' /usr/sbin/nginx /etc/nginx \
        /usr/lib/postgresql /usr/share/postgresql
    wait "$venv"
    venv=
    ;;
'' | --demo) install_pymigrate ;;
esac
