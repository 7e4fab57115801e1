#!/usr/bin/env bash
# Fills FOLDER with the C header of ONNX Runtime, which no Python and no npm package contains: `c_header.sh FOLDER`.
# It takes the header from Debian 13, whatever runs here. It changes nothing else on this machine: apt works in a scratch
# folder, with a package list of its own.
set -euo pipefail
folder=$1

keys=/usr/share/keyrings/debian-archive-keyring.gpg
for needed in apt-get dpkg-deb "$keys"; do
  if ! command -v "$needed" >/dev/null && [ ! -e "$needed" ]; then
    echo "no C client: $needed is missing"
    exit 0
  fi
done
if [ -e "$folder/onnxruntime_c_api.h" ]; then
  exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/lists/partial "$scratch"/archives/partial
touch "$scratch/status"
echo "deb [signed-by=$keys] http://deb.debian.org/debian trixie main" >"$scratch/sources"
apt=(apt-get -qq -o APT::Sandbox::User=root -o Dir::State="$scratch" -o Dir::State::status="$scratch/status"
  -o Dir::Cache="$scratch" -o Dir::Etc::sourcelist="$scratch/sources" -o Dir::Etc::sourceparts=/dev/null)
cd "$scratch"
if ! "${apt[@]}" update || ! "${apt[@]}" download libonnxruntime-dev; then
  echo "no C client: apt cannot download Debian's package libonnxruntime-dev here"
  exit 0
fi
dpkg-deb -x libonnxruntime-dev_*.deb .
cd - >/dev/null
rm -rf "$folder"
mv "$scratch/usr/include/onnxruntime" "$folder"
