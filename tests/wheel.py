"""What a wheel must do in a bare environment, without pytest: `python tests/wheel.py`.

Compiled kernels run, agree with the reference, and use PyTorch's threads alone; a model is trained and sampled.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from genfuse import ops


def genfuse(*arguments):
    subprocess.run([sys.executable, "-m", "genfuse", *map(str, arguments)], check=True)


def main():
    genfuse("doctor")
    assert "native" in ops.available("cpu"), "the wheel's compiled kernels do not run here"
    mu, logvar = torch.randn(2, 64, 40).unbind()
    compiled, reference = [], []
    for implementation, results in (("native", compiled), ("reference", reference)):
        with ops.using(implementation):
            torch.manual_seed(0)
            results.extend(ops.reparameterize_kl(mu, logvar))
    for ours, theirs in zip(compiled, reference, strict=True):
        torch.testing.assert_close(ours, theirs)

    maps = Path("/proc/self/maps")
    if maps.exists():
        copies = set(re.findall(r"\S*/libgomp\S*", maps.read_text(encoding="utf-8")))
        assert len(copies) == 1, f"two runtimes of OpenMP are two pools of threads: {sorted(copies)}"
        assert "/torch" in next(iter(copies)), f"OpenMP is not PyTorch's: {copies}"

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        genfuse("train", "vae", "--data", "digits", "--out", run, "--steps", 20)
        genfuse("train", "--resume", run, "--steps", 30)
        genfuse("sample", run, "--n", 16, "--out", Path(folder) / "grid.png")
    print("the wheel works")


if __name__ == "__main__":
    main()
