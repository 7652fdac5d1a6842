"""The kernels for AMX where there is none: compiled against `emulated/immintrin.h`, which computes it in software."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.kernels import native
from finetune.machine import KERNEL_SWITCH

HEADER = Path(__file__).parent / "emulated" / "immintrin.h"
# The flags are part of the compiled kernels' name, the header is not.
FLAGS = (
    *(flag for flag in native.FLAGS if not flag.startswith("-m")),
    *("-mavx2", "-mfma", "-D__AMX_BF16__", "-D__AVX512BF16__", "-Wno-psabi", f"-I{HEADER.parent}"),
    f"-DEMULATION={hashlib.sha256(HEADER.read_bytes()).hexdigest()}",
)
# Not those that start a process of their own or compile something else.
CHOSEN = "not the_kernels and not the_compiler"


def can_emulate() -> bool:
    if (sys.platform, platform.machine()) != ("linux", "x86_64") or shutil.which("g++") is None:
        return False
    return {"avx2", "fma"} <= set(native._processor().split())


def has_amx() -> bool:
    return hasattr(native.library(), "request_amx") and native.computes_products()


@pytest.mark.slow
@pytest.mark.skipif(has_amx(), reason="the kernels for AMX are what runs here anyway")
@pytest.mark.skipif(not can_emulate(), reason="needs g++ on Linux and a processor with AVX2")
def test_the_kernels_for_amx_hold_in_software() -> None:
    here = Path(__file__).parent
    tests = map(str, (here / "test_native.py", here.parent / "models" / "test_fused.py"))
    script = (
        "import sys, pytest; from finetune.kernels import native\n"
        f"native.FLAGS = {FLAGS!r}\n"
        "assert hasattr(native.library(), 'request_amx'), native.why_missing()\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    chosen = ["-q", "-n", "0", "-p", "no:cacheprovider", *tests, "-k", CHOSEN]
    done = subprocess.run(
        [sys.executable, "-c", script, *chosen],
        env={key: value for key, value in os.environ.items() if key != KERNEL_SWITCH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, (done.stdout + done.stderr)[-3000:]
