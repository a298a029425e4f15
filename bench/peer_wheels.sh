#!/usr/bin/env bash
# Fetches the wheels of bench/requirements-peers.txt for CPython 3.12 on Linux x86-64, to be carried to a machine without
# a network. Usage: bench/peer_wheels.sh [FOLDER], default .whl.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.whl}
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)
for minor in $(seq 5 39); do
    platforms+=(--platform "manylinux_2_${minor}_x86_64")
done
rm -rf "$folder"
"${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$folder" -r bench/requirements-peers.txt
du -sh "$folder"
