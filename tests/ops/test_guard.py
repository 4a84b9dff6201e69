"""What kernels leave unwritten, or write where they must not, is found: see conftest.py."""

import ctypes

import pytest
import torch

from genfuse import ops


@pytest.fixture
def bands(guard):
    if guard.sanitized:
        pytest.skip("a sanitizer watches in place of bands")
    return guard


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_is_left_unwritten_is_nan(dtype, guard):
    assert guard.empty(torch.zeros(3, 5, dtype=dtype), "a test").isnan().all()


@pytest.mark.parametrize(("shift", "where"), [(-1, "wrote 1 bytes before"), (1002, "wrote to byte 2 beyond")])
def test_a_byte_beside_a_tensor_is_found(shift, where, bands):
    y = bands.empty(torch.zeros(250), "a test")
    ctypes.memset(y.data_ptr() + shift, 0, 1)
    with pytest.raises(AssertionError, match=rf"{where} a tensor of shape \(250,\) of torch.float32.*a test"):
        bands.check()


def test_a_kernel_that_goes_one_element_too_far_is_found(device, implementation, bands):
    if device != "cpu" or implementation == "reference":
        pytest.skip("what kernels fill on the CPU is watched")
    x = ops.interpolate(*torch.randn(2, 3, 7))
    ctypes.memset(x.data_ptr() + x.nbytes, 0, x.element_size())  # as a kernel with <= for < would
    with pytest.raises(AssertionError, match=r"byte 0 beyond a tensor of shape \(3, 7\).*_interpolate.py:"):
        bands.check()
