#!/usr/bin/env bash
# Checks, runs and times everything on a GPU machine with torch, from what bench/bundle.sh built. Full results go to $OUT.
# Usage: bench/gpu_check.sh [FOLDER] [WHAT] [WHEELS], defaults .carry, all and .whl. WHAT is names with spaces between them:
# rust and python for the tests of either ("tests" is both), demo, and any bench/NAME.py; "all" is "tests demo stack". WHEELS is
# what bench/peer_wheels.sh fetched. The tests run on $DEVICE, by default cuda:0. $ARGS goes to each bench/NAME.py. experts and
# little_ram run in a memory cgroup.
set -uo pipefail
cd "$(dirname "$0")/.."
bundle=$(realpath "${1:-.carry}")
what=${2:-all}
wheels=$(realpath --relative-to=. "${3:-.whl}")
out=${OUT:-target/gpu}
site=$(mktemp -d)
failures=$(mktemp -d)
mkdir -p "$out"
python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$bundle"/*.whl || exit 1
export PYTHONPATH=$site PYTHONUNBUFFERED=1 FOREBAY_TEST_DEVICE=${DEVICE:-cuda:0} FOREBAY_TEST_WATCHDOG=200

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    printf '%-28s %-6s %4d s  %s\n' "$name" "$([ $code = 0 ] && echo ok || echo "rc $code")" $((SECONDS - start)) \
        "$(grep -E '^test result|passed|failed' "$out/$name.log" | tail -n 1)"
    [ $code = 0 ] || touch "$failures/$name"
}

exec > >(tee "$out/summary.txt") 2>&1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
[ -x "$bundle/forebay" ] && "$bundle/forebay" doctor

rust() {
    local program programs=()
    # Four at a time: tests that time something fail where more share the card. What takes the whole card comes last.
    for program in "$bundle"/tests/*; do
        [[ $program = *-room ]] && continue
        while [ "$(jobs -rp | wc -l)" -ge 4 ]; do sleep 0.1; done
        step "$(basename "$program")" 240 "$program" &
        programs+=($!)
    done
    wait "${programs[@]}"
    step forebay-room 240 "$bundle"/tests/forebay-room
}

python() {
    local whole_card=(python/tests/test_other_process.py python/tests/test_allocations.py)
    step pytest 420 python3 -m pytest -q --timeout 120 -p no:cacheprovider -n 8 --dist loadfile python/tests \
        "${whole_card[@]/#/--ignore=}"
    step pytest-whole-card 240 python3 -m pytest -q --timeout 120 -p no:cacheprovider "${whole_card[@]}"
}

tests() {
    rust
    python
}

demo() {
    python3 - "$bundle/minilm" <<'E2'
import sys, torch
from transformers import BertConfig, BertModel
torch.manual_seed(3)
BertModel(BertConfig.from_json_file(sys.argv[1] + "/config.json")).save_pretrained("/tmp/random-bert")
E2
    cp "$bundle"/minilm/* /tmp/random-bert
    step demo 120 python3 examples/embed.py --model /tmp/random-bert --picture "$out/page-map.svg"
    cat "$out/demo.log"
}

benchmark() { # benchmark NAME [COMMAND THAT RUNS IT...]
    local name=$1
    shift
    case $name in
    peers | loaders | pressure) set -- "$@" python3 "bench/$name.py" --wheels "$wheels" --out "$out" ;;
    comfyui) set -- "$@" python3 "bench/$name.py" --out "$out" ;;
    *) set -- "$@" python3 "bench/$name.py" --out "$out/$name.json" ;;
    esac
    # shellcheck disable=SC2086 # words are meant to be split
    step "$name" 590 "$@" ${ARGS:-}
    cat "$out/$name.log"
}

capped() { # capped BYTES COMMAND...: in a memory cgroup of its own
    local root=/sys/fs/cgroup file=memory.max
    [ -f "$root/cgroup.controllers" ] || root=$root/memory file=memory.limit_in_bytes # version 1
    local group=$root/forebay-$1
    mkdir -p "$group" && echo "$1" >"$group/$file" && echo "$BASHPID" >"$group/cgroup.procs" && exec "${@:2}"
}
export -f capped

for one in ${what/#all/tests demo stack}; do
    case $one in
    tests | rust | python | demo) "$one" ;;
    experts) benchmark "$one" bash -c 'capped 32G "$@"' capped ;;
    little_ram) benchmark "$one" bash -c 'capped 2G "$@"' capped ;;
    *)
        if [ -f "bench/$one.py" ]; then
            benchmark "$one"
        else
            echo "nothing is called $one: tests, rust, python, demo, all, or a bench/NAME.py"
            touch "$failures/$one" "$out/$one.log"
        fi
        ;;
    esac
done
for name in $(ls "$failures"); do
    echo "--- $name"
    tail -n 40 "$out/$name.log"
done
tar -C "$out" -czf "$out/logs.tgz" --remove-files $(cd "$out" && ls *.log)
[ -z "$(ls "$failures")" ]
