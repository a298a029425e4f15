#!/usr/bin/env bash
# Gathers what bench/comfyui.py needs on a GPU machine without a network, for CPython 3.12 on Linux x86-64: the wheels that
# ComfyUI imports beside torch, torchvision, torchaudio, transformers, numpy, scipy, einops, safetensors, psutil, pillow,
# sentencepiece and PyYAML; a tar.gz of a checkout without what a run without a server leaves out; the tool that starts it.
# Usage: bench/comfyui_wheels.sh COMFYUI TOOL [FOLDER], default .comfyui. With KERNELS=1 the kernels that ComfyUI's users have
# are there, 56 MiB; without them all systems compute with torch's.
set -euo pipefail
comfyui=$(realpath "$1")
tool=$(realpath "$2")
cd "$(dirname "$0")/.."
folder=${3:-.comfyui}
rm -rf "$folder"
mkdir -p "$folder/wheels"
fetch() {
    "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$folder/wheels" "$@"
}
fetch --implementation py --abi none --platform any torchsde==0.2.6 trampoline==0.1.2
platforms=()
for minor in $(seq 5 39); do
    platforms+=(--platform "manylinux_2_${minor}_x86_64")
done
if [ -n "${KERNELS:-}" ]; then
    fetch --implementation cp "${platforms[@]}" comfy-kitchen==0.2.31
else
    fetch --implementation py --abi none --platform any comfy-kitchen==0.2.31
fi
fetch --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --platform any comfy-aimdo==0.6.0
left_out=(.git .github .ci tests tests-unit blueprints comfy_api_nodes models input output)
tar -C "$comfyui" -czf "$folder/comfyui.tar.gz" "${left_out[@]/#/--exclude=./}" --exclude='*.png' --exclude='*.webp' \
    --exclude='*.mp4' --exclude=__pycache__ .
cp "$tool" "$folder/comfy_headless.py"
du -sh "$folder" "$folder"/*
