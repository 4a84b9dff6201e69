import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfuse.nn import Residual, WithContext


def test_a_residual_block_is_the_sum_of_its_parts():
    branch, shortcut, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    torch.testing.assert_close(Residual(branch, shortcut)(x), branch(x) + shortcut(x))
    square = nn.Linear(3, 3)
    torch.testing.assert_close(Residual(square)(x), square(x) + x)


@pytest.mark.parametrize("part", ["branch", "shortcut"])
def test_no_part_of_a_residual_block_overwrites_what_the_other_reads(part):
    parts = {"branch": nn.Linear(3, 3), "shortcut": nn.Identity()}
    parts[part] = nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=rf"{part} must not overwrite its input: it begins with ReLU\(inplace=True\)"):
        Residual(**parts)


def test_context_is_more_features_or_channels():
    x, context = torch.randn(2, 3, 4, 5), F.one_hot(torch.tensor([1, 0]), 2)
    features = WithContext(nn.Identity(), planes=False)(x, context)
    assert torch.equal(features, torch.cat([x.flatten(1), context], 1))
    planes = WithContext(nn.Identity(), planes=True)(x, context)
    assert torch.equal(planes[:, :3], x)
    assert torch.equal(planes[:, 3:], context[:, :, None, None].expand(2, 2, 4, 5))
