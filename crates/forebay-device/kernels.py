"""Compiles src/cuda/kernels.cu to src/cuda/kernels.ptx, which is committed: building Forebay needs no CUDA.

Run by ``make kernels``; needs no GPU. NVRTC is that of CUDA 12.0, whose PTX the oldest supported driver takes. With
``--check``, tells whether the committed file is what the compiler makes now.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import nvidia.cuda_nvrtc

HERE = Path(__file__).parent / "src" / "cuda"
OPTIONS = [b"--gpu-architecture=compute_75", b"--std=c++17", b"--fmad=false"]


def fnv1a(data: bytes) -> int:
    """The hash that a test compares with the source's (FNV-1a, 64 bits)."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def compile_ptx(source: bytes) -> str:
    """The source as PTX.

    Raises:
        SystemExit: With the compiler's messages.
    """
    library = Path(next(iter(nvidia.cuda_nvrtc.__path__))) / "lib" / "libnvrtc.so.12"
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()

    def check(code: int) -> None:
        if code:
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise SystemExit(f"NVRTC gave {code}:\n{log.value.decode()}")

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None))
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    check(nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options))
    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
    ptx = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetPTX(program, ptx))
    code = ptx.value.decode()
    head = f"// Made of kernels.cu ({fnv1a(source):016x}) by `make kernels`.\n"
    return head + code[code.index(".version") :].rstrip() + "\n"


def main() -> None:
    ptx = compile_ptx((HERE / "kernels.cu").read_bytes())
    target = HERE / "kernels.ptx"
    if "--check" not in sys.argv[1:]:
        target.write_text(ptx)
    elif target.read_text() != ptx:
        raise SystemExit(f"{target} is not what kernels.cu compiles to; run `make kernels`")


if __name__ == "__main__":
    main()
