"""What a model is given beside its examples, as the context (N, C) that networks see."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.errors import DataError
from genfuse.ops import transformed


class OneHot(nn.Module):
    """Labels (N,), integers in 0..classes - 1, as one-hot vectors (N, classes), float32.

    Raises DataError for anything else; on a GPU, where the answer has to be waited for, labels outside are not noticed.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, y: Tensor) -> Tensor:
        if y.dim() != 1 or y.dtype.is_floating_point:
            raise DataError(f"labels y must be integers (N,), one for each example; got {y.dtype} {tuple(y.shape)}")
        looked_at = y.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
        if len(y) and looked_at and not 0 <= y.min() <= y.max() < self.classes:
            raise DataError(f"labels y must be in 0..{self.classes - 1}; got {int(y.min())}..{int(y.max())}")
        return F.one_hot(y.long(), self.classes).float()


class Features(nn.Module):
    """A context (N, features) of floats, as it is. Raises DataError for anything else."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[1] != self.features or not y.dtype.is_floating_point:
            raise DataError(f"y must be a context (N, {self.features}) of floats; got {y.dtype} {tuple(y.shape)}")
        return y
