"""What libraries print at a start: nothing about quantization unless it is used."""

import subprocess
import sys

import pytest

# As on a CPU with AVX-512 BF16: bitsandbytes looks for a kernel there when it is imported, which this one may be.
IMPORT = """
import importlib, sys
import {module}
import bitsandbytes.functional
if not bitsandbytes.functional.has_avx512bf16():
    bitsandbytes.functional.has_avx512bf16 = lambda: True
    importlib.reload(importlib.import_module("bitsandbytes.backends.cpu.ops"))
sys.stderr.write("imported\\n")
if {used}:
    from dama.train.setup import quantization_config
    quantization_config(load_8bit=False, skipped=())
"""


def errors_of(module, used):
    program = IMPORT.format(module=module, used=used)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    return done.stderr.partition("imported\n")[::2]


@pytest.mark.parametrize("module", ["llava.train.train_mem", "llava.serve.cli"])
def test_a_start_says_nothing_about_quantization(module):
    before, after = errors_of(module, used=False)
    assert "gemm_4bit_forward" not in before + after


def test_the_notice_comes_once_quantized_weights_are_used():
    before, after = errors_of("llava", used=True)
    assert "gemm_4bit_forward" not in before
    assert after.count("Failed to load CPU gemm_4bit_forward") == 1
