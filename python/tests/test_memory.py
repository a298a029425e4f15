"""Anonymous memory does not grow with the model."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from support import DEVICE

GIB = 1 << 30
SIZE = 4 * GIB

SCRIPT = """
import json, os, struct, sys, threading
import torch
from torch import nn
import forebay

path, size, device = sys.argv[1], int(sys.argv[2]), sys.argv[3]
width = 4096
layers = size // (width * width * 2)
names = [f"{i}.weight" for i in range(layers)]
bytes_ = width * width * 2
entries = {n: {"dtype": "BF16", "shape": [width, width], "data_offsets": [i * bytes_, (i + 1) * bytes_]}
           for i, n in enumerate(names)}
text = json.dumps(entries).encode()
text += b" " * (-len(text) % 8)
block = (torch.randn(width * width) * 0.02).bfloat16().view(torch.int16).numpy().tobytes()
with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for i in range(layers):
        file.write(block[i * 512:] + block[: i * 512])  # every layer is different
del block


def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
model.requires_grad_(False)
on = "cpu" if device == "host" else device
x = torch.randn(1, width, device=on).bfloat16()
one = nn.Linear(width, width, bias=False, dtype=torch.bfloat16).to(on)
with torch.no_grad():
    one(x)  # what torch itself takes at its first product
del one
before = peak = anonymous()
done = threading.Event()


def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())


watcher = threading.Thread(target=watch)
watcher.start()
model.load_state_dict(forebay.load(path), assign=True)
with torch.no_grad(), forebay.attach(model, device, budget=256 << 20) as attachment:
    outs = [model(x).clone() for _ in range(2)]
    peak = max(peak, anonymous())
    filled = attachment.stats()[0]["filled"]
done.set()
watcher.join()
assert torch.equal(*outs)
print(json.dumps({"grown": peak - before, "filled": filled, "layers": layers}))
"""


def test_a_model_of_4_gib_takes_no_anonymous_memory(tmp_path) -> None:
    if shutil.disk_usage(tmp_path).free < 6 * GIB:
        pytest.skip("less than 6 GiB of disk are free")
    path = tmp_path / "large.safetensors"
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(SIZE), DEVICE],
            capture_output=True,
            text=True,
            timeout=240,
        )
    finally:
        path.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    import json

    found = json.loads(done.stdout)
    print(found)
    assert found["filled"] >= SIZE
    assert found["grown"] < 128 << 20
