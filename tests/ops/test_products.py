"""The matrix products of `ops.mlp` at every level of x86-64 that this processor has, under sanitizers."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64")
def test_products_of_any_size_stride_and_mask_are_those_of_plain_loops(tmp_path):
    flags = ["-std=gnu++17", "-O1", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    includes = f"-I{HERE.parents[1] / 'csrc'}"
    subprocess.run(["g++", *flags, includes, HERE / "products.cpp", "-o", tmp_path / "products"], check=True)
    found = subprocess.run([tmp_path / "products"], check=True, capture_output=True, text=True).stdout
    for line in found.splitlines():
        name, single, double = line.split()
        assert float(single) < 2e-5, name
        assert float(double) < 1e-13, name
