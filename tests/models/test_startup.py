"""Importing quickly leaves a process as an ordinary import does. In processes of their own: an import happens once."""

from __future__ import annotations

import subprocess
import sys

IMPORTED = """
import gc, sys
from finetune.models.startup import importing_libraries

with importing_libraries():
    assert not gc.isenabled()
    from finetune.training import train
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert "torch._inductor.compile_fx" not in sys.modules

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

assert torch.compile.__name__ != "compile_when_called"
weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
error = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight
assert error.abs().max() < 0.2, "what is compiled when it is called"

frozen = gc.get_freeze_count()
with importing_libraries():  # a second time there is nothing to import
    assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
"""
FAILED = """
import gc
from finetune.models.startup import importing_libraries

frozen = gc.get_freeze_count()  # not 0 from Python 3.12 on
try:
    with importing_libraries():
        raise KeyError
except KeyError:
    assert gc.isenabled() and gc.get_freeze_count() == frozen
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_what_was_imported_works_and_garbage_is_collected_again() -> None:
    assert run(IMPORTED) == ""


def test_an_import_that_fails_leaves_garbage_collection_on() -> None:
    run(FAILED)
