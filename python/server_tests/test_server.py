"""The real ComfyUI on Forebay, without a GPU: it starts, makes an image, and its page shows live figures.

``make comfyui COMFYUI=PATH`` runs this over a checkout whose requirements are installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import answers, browser, free_port, until
from checkout import CHECKOUT, environment

PICTURE = os.environ.get("FOREBAY_PANEL_PICTURE")
HERE = Path(__file__).parent
GIB = 1 << 30

WORKFLOW = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny.safetensors", "weight_dtype": "default"}},
    "2": {"class_type": "RandomConditioning", "inputs": {"seed": 5}},
    "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 7,
            "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        },
    },
    "5": {"class_type": "VAELoader", "inputs": {"vae_name": "tiny.safetensors"}},
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["5", 0]}},
    "7": {"class_type": "StreamedLayers", "inputs": {"image": ["6", 0], "passes": 1}},
    "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "forebay"}},
}  # fmt: skip


class Server:
    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def run(self, workflow: Any) -> dict[str, Any]:
        """Posts a workflow and waits for what came of it."""
        prompt = self.post("/prompt", {"prompt": workflow})["prompt_id"]
        done = until(lambda: self.get(f"/history/{prompt}"), "the workflow ends", 240)[prompt]
        assert done["status"]["status_str"] == "success", done["status"]
        outputs: dict[str, Any] = done["outputs"]
        return outputs


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    # Not the first time: no templates are offered in front of the page.
    (base / "user" / "default").mkdir()
    (base / "user" / "default" / "comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
    (base / "custom_nodes" / "forebay_tests").symlink_to(HERE / "nodes" / "forebay_tests")
    settings = environment(base)
    script = [sys.executable, HERE / "make_models.py", base / "models"]
    subprocess.run(
        script,
        check=True,
        cwd=CHECKOUT,
        env={**settings, "PYTHONPATH": f"{settings['PYTHONPATH']}{os.pathsep}{CHECKOUT}"},
    )
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "forebay.comfyui",
        str(CHECKOUT / "main.py"),
        "--cpu",
        "--port",
        str(port),
    ]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    log = base / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=settings, cwd=base)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{url}/forebay/state") or process.poll() is not None, "the server starts", 180)
        assert process.poll() is None, log.read_text()[-4000:]
        yield Server(url, log)
    finally:
        process.terminate()
        process.wait(30)


def test_a_workflow_runs_to_an_image(server: Server) -> None:
    image = server.run(WORKFLOW)["8"]["images"][0]
    query = f"/view?filename={image['filename']}&type=output&subfolder={image['subfolder']}"
    with urllib.request.urlopen(server.url + query, timeout=60) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
    log = server.log.read_text()
    assert "comfy-aimdo version: " in log
    assert "custom_nodes/ComfyUI-Forebay" in log and "IMPORT FAILED: forebay" not in log


def test_the_state_is_told_and_the_headroom_set(server: Server) -> None:
    server.run(WORKFLOW)
    state = server.get("/forebay/state")
    assert state["mode"] == "off" and state["ram"]["anonymous"] > 0
    (device,) = state["devices"]
    assert device["name"] == "host" and device["headroom"] is None and device["budget"] == 16 << 20
    (model,) = device["models"]
    assert model["name"] == "streamed layers" and model["bytes"] > 48 << 20 and len(model["map"]) > 20
    assert model["streamed"] == state["streamed"] > 48 << 20
    assert 0 < device["held"] <= 16 << 20
    told = server.post("/forebay/headroom", {"device": "host", "bytes": 3 * GIB})
    assert told["devices"][0]["headroom"] == 3 * GIB
    for wrong in (
        {"device": "cuda:9", "bytes": 1},
        {"device": "host", "bytes": -1},
        {"device": "host"},
        {"bytes": "x", "device": "host"},
        [],
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/forebay/headroom", wrong)
        assert refused.value.code == 400 and json.load(refused.value)["error"]
    assert server.get("/forebay/state")["devices"][0]["headroom"] == 3 * GIB


def test_the_panel_shows_live_figures(server: Server, tmp_path: Path) -> None:
    server.run(WORKFLOW)
    with browser() as page:
        page.open(server.url)
        page.wait_for("return document.querySelector('.forebay-tab-button')")
        page.run("document.querySelector('.forebay-tab-button').click()")
        text = "return document.querySelector('.forebay')?.innerText"
        shown = page.wait_for(f"const text = {text[7:]}; return text?.includes('streamed layers') && text")
        assert (
            "host, host memory" in shown and "Forebay 0." in shown and "anonymous, of this process" in shown
        )
        coloured = """
            const canvas = document.querySelector('.forebay canvas');
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 3).join())).size;
        """
        assert page.wait_for(coloured) > 1
        streamed = "return Number(document.querySelector('.forebay > div').dataset.streamed)"
        before = page.wait_for(streamed)
        more = json.loads(json.dumps(WORKFLOW))
        more["7"]["inputs"]["passes"] = 3
        server.run(more)
        page.wait_for(f"return ({streamed[7:]}) > {before}")
        page.run(
            """
            const input = document.querySelector('.forebay input');
            input.focus();
            input.value = '2.5';
            input.dispatchEvent(new Event('change'));
            """
        )
        until(
            lambda: server.get("/forebay/state")["devices"][0]["headroom"] == 2.5 * GIB, "the headroom is set"
        )
        page.wait_for("return document.querySelector('.forebay input').value === '2.50'")
        picture = Path(PICTURE) if PICTURE else tmp_path / "panel.png"
        page.save_picture(picture)
        assert picture.stat().st_size > 10_000
