"""Fixtures: device, dtype and implementation; data that may be absent."""

import os
import signal
from pathlib import Path

import pytest
import torch
from required import DEVICES, skip

# Read when Triton is first imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ignored in the background, and then by all programs that are started: tests of interrupts would wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed():
    """What a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Classifiers that comparisons train are found by later tests, and not by the user."""
    os.environ["GENFUSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        skip("cuda", "no CUDA device")
    return request.param


@pytest.fixture(params=["native", "triton", "reference"])
def implementation(request, device):
    from genfuse import ops

    if request.param not in ops.available(device):
        reasons = {why for kernel in ops._op.KERNELS.values() for _, why in [kernel.find(request.param, device)]}
        skip(request.param, f"no {request.param} on {device}: {'; '.join(sorted(reasons))}")
    with ops.using(request.param):
        yield request.param


@pytest.fixture
def data_root() -> Path:
    root = os.environ.get("GENFUSE_DATA")
    if not root:
        skip("data", "GENFUSE_DATA is not set: no real data")
    return Path(root)
