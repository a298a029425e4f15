"""Starting an unmodified ComfyUI: a checkout in small that imports, asks and ends as the real one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAIN = """
import sys
import comfy_aimdo.control
import importlib.metadata

if __name__ == "__main__":
    import multiprocessing, os
    import folder_paths
    import comfy_aimdo.model_vbar
    from comfy_aimdo import torch as aimdo_torch
    assert "torch" not in sys.modules
    assert comfy_aimdo.control.init() and comfy_aimdo.control.lib
    assert sys.modules["comfy_aimdo.control"] is sys.modules["forebay.comfyui.aimdo.control"]
    assert comfy_aimdo.control.__spec__.name == "forebay.comfyui.aimdo.control"
    print("arguments", sys.argv)
    print("version", importlib.metadata.version("comfy-aimdo"))
    print("file", __file__, sys.path[0])
    import subprocess
    code = "import comfy_aimdo.host_buffer, importlib.metadata; print('process', importlib.metadata.version('comfy-aimdo'))"
    subprocess.run([sys.executable, "-c", code], check=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("child", pool.map(folder_paths.child, [1]))
    if "--raise" in sys.argv:
        raise ValueError("as ComfyUI does")
    sys.exit(7)
"""

FOLDER_PATHS = """
def child(number):
    import comfy_aimdo.model_vbar
    return comfy_aimdo.model_vbar.__name__, number
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text(MAIN)
    (folder / "folder_paths.py").write_text(FOLDER_PATHS)
    (folder / "comfy" / "model_management.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.33.0"\n')
    (folder / "requirements.txt").write_text("torch\ncomfy-kitchen==0.2.31\ncomfy-aimdo==0.4.13\n")
    return folder


def launch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forebay.comfyui", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_comfyui_finds_forebay_in_place_of_its_own(checkout: Path) -> None:
    done = launch("--no-node", checkout / "main.py", "--listen", "--port", "1", cwd=checkout.parent)
    assert done.returncode == 7, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told["arguments"] == str([str(checkout / "main.py"), "--listen", "--port", "1"])
    assert told["version"] == told["process"] == "0.4.13"
    assert told["file"] == f"{checkout / 'main.py'} {checkout}"
    assert told["child"] == "[('forebay.comfyui.aimdo.model_vbar', 1)]"


def test_the_node_comes_with_it(checkout: Path) -> None:
    done = launch("main.py", "--cpu", cwd=checkout)
    assert done.returncode == 7, done.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("arguments"))
    assert "main.py', '--extra-model-paths-config'" in told and told.endswith("'--cpu']")
    config = Path(told.split("'")[5])
    folder = config.parent / config.read_text().split("custom_nodes:")[1].strip() / "ComfyUI-Forebay"
    assert (folder / "__init__.py").is_file()


def test_a_comfyui_that_moves_weights_by_itself_is_spared_copies(checkout: Path) -> None:
    def told(*arguments: str) -> str:
        done = launch(*arguments, cwd=checkout)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (checkout / "main.py").write_text("import sys; print(sys.argv[1:])")
    assert told("--no-node", "--no-native", "main.py", "--cpu") == "['--cpu']\n", "it does not know it"
    (checkout / "comfy" / "cli_args.py").write_text(
        'parser.add_argument("--fast-disk", action="store_true")\n'
    )
    assert told("--no-node", "--no-native", "main.py", "--cpu") == "['--fast-disk', '--cpu']\n"
    assert told("--no-node", "main.py", "--cpu") == "['--cpu']\n"
    for own in ("--fast-disk", "--high-ram", "--disable-dynamic-vram"):
        assert told("--no-node", "--no-native", "main.py", own) == f"['{own}']\n"


def test_what_comfyui_raises_ends_the_process_as_it_would(checkout: Path) -> None:
    done = launch(checkout / "main.py", "--raise")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ValueError: as ComfyUI does")


def test_a_newer_release_is_tried(checkout: Path) -> None:
    (checkout / "requirements.txt").write_text("comfy_aimdo>=0.9.1\n")
    done = launch(checkout / "main.py")
    assert done.returncode == 7
    assert "asks for comfy-aimdo 0.9.1, known here is 0.6.0" in done.stderr
    assert "version 0.9.1" in done.stdout


@pytest.mark.parametrize("requirements", ["torch\n", "comfy-aimdo==0.4.12\n", None])
def test_a_comfyui_that_is_too_old(checkout: Path, requirements: str | None) -> None:
    (checkout / "requirements.txt").unlink()
    if requirements is not None:
        (checkout / "requirements.txt").write_text(requirements)
    done = launch(checkout / "main.py")
    assert done.returncode == 2
    assert "too old" in done.stderr and "update it to 0.33 or later: 0.33.0" in done.stderr
    assert done.stdout == ""


def test_no_comfyui(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('not me')")
    for arguments, said in (
        ((), "which ComfyUI?"),
        ((tmp_path / "none.py",), "there is no such file"),
        ((tmp_path,), "there is no such file"),
        ((tmp_path / "main.py",), "this is no folder of ComfyUI"),
        (("--unknown", tmp_path / "main.py"), "unrecognized arguments: --unknown"),
    ):
        done = launch(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr


def test_pinned_memory_can_be_limited(checkout: Path) -> None:
    (checkout / "main.py").write_text("import os; print(os.environ['FOREBAY_COMFYUI_PINNED_GIB'])")
    assert launch("--pinned", 2.5, checkout / "main.py").stdout == "2.5\n"
    assert launch("--pinned=0", "--no-native", checkout / "main.py").stdout == "0.0\n"
    for wrong in ("-1", "much", "nan"):
        done = launch("--pinned", wrong, checkout / "main.py")
        assert done.returncode == 2
        assert f"argument --pinned: a number of GiB from 0 on is wanted: {wrong!r}" in done.stderr


def test_what_the_environment_says_of_it_is_looked_at_before_comfyui_starts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "main.py").write_text("print('started')")
    monkeypatch.setenv("FOREBAY_COMFYUI_PINNED_GIB", "much")
    done = launch(checkout / "main.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "FOREBAY_COMFYUI_PINNED_GIB: a number of GiB from 0 on is wanted: 'much'" in done.stderr
    assert launch("--pinned", 1, checkout / "main.py").stdout == "started\n"


def test_loading_kernels_before_they_are_used_can_be_switched_off(checkout: Path) -> None:
    (checkout / "main.py").write_text("import os; print(os.environ.get('FOREBAY_COMFYUI_WARM'))")
    assert launch("--no-warm", checkout / "main.py").stdout == "0\n"
    assert launch(checkout / "main.py").stdout == launch("--warm", checkout / "main.py").stdout == "None\n"


def test_a_comfyui_that_native_mode_does_not_know_runs_with_its_own_casting(checkout: Path) -> None:
    (checkout / "comfy" / "model_patcher.py").write_text("ModelPatcher = 1\n")
    (checkout / "main.py").write_text("import comfy.model_patcher as p; print(p.ModelPatcher)")
    done = launch(checkout / "main.py")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "native mode does not know this ComfyUI" in done.stderr
    done = launch("--no-native", checkout / "main.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_help_and_version(checkout: Path) -> None:
    done = launch("--help")
    assert done.returncode == 0 and "MAIN.PY [ComfyUI's arguments]" in done.stdout
    assert launch("--version").stdout.startswith("forebay ")


def test_a_module_that_was_imported_before_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "comfy_aimdo.py").touch()
    code = "import comfy_aimdo\nfrom forebay.comfyui import substitute\nsubstitute.install()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "RuntimeError: comfy_aimdo was imported before" in done.stderr


def test_the_distribution_that_provides_the_module() -> None:
    folder = Path(__file__).parents[2] / "comfy-aimdo"
    code = "import comfy_aimdo.control as c, comfy_aimdo, importlib.metadata as m\n"
    code += "print(c.__name__, comfy_aimdo.__name__, m.version('comfy-aimdo'), m.version('forebay'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout.split()[:3] == ["forebay.comfyui.aimdo.control", "forebay.comfyui.aimdo", "0.6.0"], (
        done.stderr
    )
