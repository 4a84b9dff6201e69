"""What the compiled functions take for a tensor."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genfuse.ops import _op

pytestmark = pytest.mark.skipif(_op._C is None, reason="no compiled kernels")


def log_prob(logdet):
    z = torch.ones(3, 2)
    result = torch.empty(3)
    _op._C.standard_normal_log_prob(0, z, 2, *z.shape, logdet, None, result, -1, 0)
    return result


def test_none_is_no_tensor():
    without = log_prob(None)
    torch.testing.assert_close(without, torch.distributions.Normal(0, 1).log_prob(torch.ones(3, 2)).sum(-1))
    torch.testing.assert_close(log_prob(torch.arange(3.0)), without + torch.arange(3.0))


@pytest.mark.parametrize("wrong", [0, 1.5, "logdet", [1.0, 2.0, 3.0]])
def test_what_is_no_tensor_is_a_type_error_that_says_what_it_got(wrong):
    with pytest.raises(TypeError, match=f"expected a tensor or None, got {type(wrong).__name__}"):
        log_prob(wrong)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_does_not_stand_for_none():
    with FakeTensorMode():
        fake = torch.empty(3)
    for logdet in (fake, torch.empty(3, device="meta"), torch._efficientzerotensor(3)):
        message = rf"{type(logdet).__name__} has no memory \(a fake, sparse or zero tensor\)"
        with pytest.raises(BufferError, match=message):
            log_prob(logdet)
    with pytest.raises(BufferError, match="Tensor has no memory"):
        log_prob(torch.ones(3).to_sparse())


def test_tensors_inside_a_transform_are_refused():
    with pytest.raises(BufferError, match="Tensor has no memory"):
        torch.func.vmap(log_prob)(torch.ones(4, 3))


def test_a_tensor_of_no_elements_needs_no_memory():
    empty = torch.empty(0)
    _op._C.standard_normal_log_prob(0, torch.empty(0, 2), 2, 0, 2, empty, None, empty, -1, 0)
