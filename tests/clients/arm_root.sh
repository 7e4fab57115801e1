#!/usr/bin/env bash
# Makes FOLDER the root folder of a Debian for 64-bit ARM with Python and a bundle's requirements, which qemu-aarch64 can
# run: `arm_root.sh FOLDER PIP`, from the project's folder.
# It changes nothing else on this machine: apt works in a scratch folder, with package lists of its own.
set -euo pipefail
root=$1
pip=$2

for program in qemu-aarch64 apt-get dpkg-deb; do
  if ! command -v "$program" >/dev/null; then
    echo "no ARM client: $program is not installed"
    exit 0
  fi
done
# A root is made once for each state of these two files.
version=$(cat tests/clients/arm_root.sh constraints/cpu.txt | sha256sum)
if [ "$(cat "$root/version" 2>/dev/null)" = "$version" ]; then
  exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/lists/partial "$scratch"/archives/partial
touch "$scratch/status"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root -o Dir::State="$scratch"
  -o Dir::State::status="$scratch/status" -o Dir::Cache="$scratch")
# Some sources have no packages for ARM, which apt reports as a failure. Only a missing Python matters.
"${apt[@]}" update || true
if ! "${apt[@]}" install -y --download-only --no-install-recommends python3 libstdc++6; then
  echo "no ARM client: apt has no Python for arm64 here"
  exit 0
fi

new=$root.new
rm -rf "$root" "$new"
for package in "$scratch"/archives/*.deb; do
  dpkg-deb -x "$package" "$new"
done
python=$(basename "$(readlink "$new/usr/bin/python3")")
"$pip" install --disable-pip-version-check -q -c constraints/cpu.txt onnxruntime tokenizers numpy \
  --only-binary=:all: --implementation cp --python-version "${python#python}" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
  --platform manylinux2014_aarch64 --target "$new/usr/local/lib/$python/dist-packages"

# ONNX Runtime reads from these files which core it runs on, and crashes at import where they describe none of ARM's.
mkdir -p "$new/proc" "$new/sys/devices/system/cpu"
cat >"$new/proc/cpuinfo" <<'END'
processor	: 0
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

END
for file in possible present online; do
  echo 0 >"$new/sys/devices/system/cpu/$file"
done
echo "$version" >"$new/version"
mv "$new" "$root"
