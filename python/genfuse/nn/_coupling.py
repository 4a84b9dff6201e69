"""Coupling layers: some coordinates pass through and decide what is done to the others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse import ops
from genfuse.errors import SettingsError
from genfuse.nn import _conditioners
from genfuse.nn._conditioners import MLPConditioner, ResidualMLP, output_layer
from genfuse.nn._mlp import untouched
from genfuse.nn._transform import Transform


def split_size(features: int) -> int:
    """How many of the features pass through a coupling: half of them, rounded down.

    Raises SettingsError for fewer than two, of which none would be left to decide what is done to the other.
    """
    if features < 2:
        raise SettingsError(f"a coupling needs at least 2 features, or channels, got {features}; a model of one: maf")
    return features // 2


def checkerboard(height: int, width: int, first: bool) -> Tensor:
    """Mask (H, W) of every other cell, the top left one included if ``first`` is true; True passes through."""
    return (torch.arange(height)[:, None] + torch.arange(width)).remainder(2).bool() != first


class Coupling(Transform):
    """Base: some coordinates of x, vectors (N, D) or images (N, C, H, W), pass through and decide about the others.

    ``split`` features (channels, of images) pass through, the first ones, or if it is negative the last ones; or those
    coordinates where the bool ``mask``, of the shape of an example or one that expands to it, is True.
    ``conditioner(kept, context)``, any module, makes the raw parameters of the features that move; with a mask it is
    shown all coordinates, the moved ones set to 0, and makes parameters for all.

    Raises ValueError unless one of ``split`` and ``mask`` is given.
    """

    parameters_each = 1  # raw parameters of a coordinate that moves
    mask: Tensor | None

    def __init__(self, conditioner: nn.Module, *, split: int | None = None, mask: Tensor | None = None) -> None:
        super().__init__()
        if (split is None) == (mask is None):
            raise ValueError(f"a coupling takes either split= or mask=; got {split} and {mask}")
        self.conditioner = conditioner
        self.split = split or 0
        self.register_buffer("mask", mask, persistent=False)
        if mask is not None:
            self.features = len(mask) if mask.dim() == 1 else None
        elif last := output_layer(conditioner, self.parameters_each):
            self.features = abs(self.split) + len(last.weight) // self.parameters_each

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a split keeps of x, and what it moves."""
        cut = self.split if self.split >= 0 else x.shape[1] + self.split
        first, last = x.split([cut, x.shape[1] - cut], 1)
        return (first, last) if self.split >= 0 else (last, first)

    def together(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Undo `halves`."""
        return torch.cat([kept, moved] if self.split >= 0 else [moved, kept], 1)

    def raw(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The conditioner's output, of x's type, which autocast may have narrowed."""
        if self.mask is not None:
            sizes = zip(self.mask.shape, x.shape[x.dim() - self.mask.dim() :], strict=False)
            if self.mask.dim() >= x.dim() or any(size not in (1, of_x) for size, of_x in sizes):
                raise ValueError(f"mask of shape {tuple(self.mask.shape)} does not go with x of {tuple(x.shape)}")
        kept = self.halves(x)[0] if self.mask is None else x * self.mask
        raw: Tensor = self.conditioner(kept, context)
        wanted = self.parameters_each * (x.shape[1] - abs(self.split))
        if raw.dim() != x.dim() or raw.shape[1] != wanted:
            cells = ", H, W" if x.dim() > 2 else ""
            raise ValueError(f"the conditioner must return (N, {wanted}{cells}), got {tuple(raw.shape)}")
        return raw.to(x.dtype)

    def network(self, x: Tensor, context: Tensor | None) -> ops.Network | None:
        """The conditioner, if the layer can be one node of autograd's graph; `raw` runs all others."""
        conditioner: Any = self.conditioner
        if x.dim() != 2 or self.mask is not None or type(self).raw is not Coupling.raw:
            return None
        if not any(untouched(conditioner, kind) for kind in (MLPConditioner, ResidualMLP)):
            return None
        moved = x.shape[1] - abs(self.split)
        if getattr(conditioner.last, "out_features", None) != self.parameters_each * moved:
            return None
        network: ops.Network | None = conditioner.network(context)
        return network

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """The moved features transformed, or with ``inverse`` put back, and the log-determinant (N,)."""
        raise NotImplementedError(f"{type(self).__name__} has no couple")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.couple(x, context, False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.couple(y, context, True)


class AffineCoupling(Coupling):
    """y = x exp(s) + t (RealNVP, arXiv 1605.08803, section 3.2); ``scale`` bounds s, as in `ops.affine_coupling`,
    "softclip" to [-2, 2].

    The conditioner makes 2 raw parameters per moved feature: first all log-scales, then all shifts.
    """

    parameters_each = 2

    def __init__(
        self, conditioner: nn.Module, *, split: int | None = None, mask: Tensor | None = None, scale: ops.Scale = "tanh"
    ) -> None:
        super().__init__(conditioner, split=split, mask=mask)
        self.scale: ops.Scale = scale

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        where = self.split if self.mask is None else self.mask
        slope = _conditioners.soft_slope(self.scale, 2)
        if network := self.network(x, context):
            return ops.affine_layer(x, network, self.split, scale=self.scale, slope=slope, inverse=inverse)
        return ops.affine_coupling(x, self.raw(x, context), where, scale=self.scale, slope=slope, inverse=inverse)

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        raw, shift = self.raw(x, None).chunk(2, 1)
        if self.scale == "softclip":
            raw = raw / (1 + (raw / 2).abs())
        elif self.scale == "tanh":
            raw = torch.tanh(raw)
        scale = torch.sigmoid(raw + 2) if self.scale == "sigmoid" else torch.exp(raw)
        if self.mask is not None:
            return coder.affine(x, scale, shift, inverse, ~self.mask)
        kept, moved = self.halves(x)
        return self.together(kept, coder.affine(moved, scale, shift, inverse))


class AdditiveCoupling(Coupling):
    """y = x + t, which keeps volume (NICE, arXiv 1410.8516): the conditioner makes one shift per moved feature."""

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self._moved(x, self.raw(x, context), inverse), x.new_zeros(x.shape[0])

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        return self._moved(x, coder.on_grid(self.raw(x, None)), inverse)

    def _moved(self, x: Tensor, shift: Tensor, inverse: bool) -> Tensor:
        shift = -shift if inverse else shift
        if self.mask is not None:
            return x + shift * ~self.mask
        kept, moved = self.halves(x)
        return self.together(kept, moved + shift)


class SplineCoupling(Coupling):
    """A rational-quadratic spline per moved feature (arXiv 1906.04032) of vectors, or of images by channels.

    The conditioner makes 3 ``bins`` - 1 raw parameters per moved feature, those of a feature beside each other. Outside
    [-bound, bound] the spline is the identity. The last linear or convolutional layer of the conditioner, if its size
    fits, starts near the identity; a conditioner without one stays as it is. Raw widths and heights are divided by
    that layer's inputs to the power ``damped`` / 2, in [0, 1]: at 1, as in the paper's code, bins move slowly.
    """

    def __init__(
        self, conditioner: nn.Module, *, split: int, bins: int = 8, bound: float = 3.0, damped: float = 0.0
    ) -> None:
        settings = _conditioners.spline_settings(bins, bound)
        self.parameters_each = settings.params  # 3 bins - 1
        super().__init__(conditioner, split=split)
        damping = _conditioners.start_spline(conditioner, settings, damped)
        self.spline = settings._replace(damping=damping)
        self.inverse_spline = self.spline._replace(inverse=True)  # here, as PyTorch 2.6 does not compile `_replace`
        self.settings: dict[str, Any] = {"bins": bins, "bound": bound, "damping": damping}

    def couple(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if network := self.network(x, context):
            return ops.spline_layer(x, network, self.split, self.inverse_spline if inverse else self.spline)
        kept, moved = self.halves(x)
        raw = self.raw(x, context).unflatten(1, (moved.shape[1], self.parameters_each)).movedim(2, -1)  # (N, C, ..., P)
        y, logdet = ops.rational_quadratic_spline(moved, raw, inverse=inverse, **self.settings)
        return self.together(kept, y), logdet.flatten(1).sum(1) if x.dim() > 2 else logdet

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        s, (kept, moved) = self.spline, self.halves(x)
        raw = self.raw(x, None).unflatten(1, (moved.shape[1], self.parameters_each)).movedim(2, -1)
        widths, heights, slopes = raw.split([s.bins, s.bins, s.bins - 1], -1)

        def shares(of: Tensor, least: float) -> Tensor:
            each = torch.exp(s.damping * of - (s.damping * of).amax(-1, keepdim=True) + 6.5)
            whole = each[..., 0]
            for k in range(1, s.bins):
                whole = whole + each[..., k]
            return least + (1 - least * s.bins) * each / whole[..., None]

        slopes = F.pad(s.min_derivative + F.softplus(slopes), (1, 1), value=1.0)
        of = shares(widths, s.min_width), shares(heights, s.min_height)
        return self.together(kept, coder.spline(moved, s.bound, *of, slopes, inverse))
