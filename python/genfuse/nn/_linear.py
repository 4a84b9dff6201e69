"""Linear layers of flows: permutations, learned linear maps by LU, activation normalisation."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse import ops
from genfuse.nn._mlp import untouched
from genfuse.nn._transform import Movement, Transform

# Features in another order. The gradient is put in order by a copy too, where PyTorch's would add up.
_reorder: Callable = ops.fused(
    "reorder(Tensor x, Tensor order, Tensor back) -> Tensor",
    formula=lambda x, order, back: x.index_select(1, order),
    results=lambda x, order, back: torch.empty_like(x, memory_format=torch.contiguous_format),
    backward=lambda needed, cotangents, x, order, back, outputs: (_reorder(cotangents[0], back, order), None, None),
    saved=lambda needed, x, order, back: (None, order, back),
)


class Permutation(Movement):
    """Features (of images: channels) in another order; feature i of the result is feature ``order[i]``, (D,) int64."""

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.features = len(order)
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    @classmethod
    def reversed(cls, features: int) -> "Permutation":
        """The last feature first."""
        return cls(torch.arange(features).flip(0))

    @classmethod
    def random(cls, features: int) -> "Permutation":
        """An order drawn from torch's global generator."""
        return cls(torch.randperm(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _reorder(x, self.order, self.back), x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _reorder(y, self.back, self.order), y.new_zeros(y.shape[0])

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        return x.index_select(1, self.back if inverse else self.order)  # `Exact` knows no operator but PyTorch's own


class LULinear(Transform):
    """y = W x + b of vectors (N, D), or of the channels of images (N, C, H, W): Glow's 1x1 convolution.

    W = L U P with a fixed permutation P, L unit lower and U upper triangular (arXiv 1807.03039, section 3.2). The
    logarithms of U's diagonal are parameters, so that the log-determinant is their sum, and the inverse is two
    triangular solves. The diagonal's signs are fixed.

    It starts as a random permutation, or ("rotation") as a random rotation. With ``first`` k, the permutation puts the
    last k features, those that a coupling before it moved, among the first ones, which the coupling after it keeps.
    """

    order: Tensor
    back: Tensor
    signs: Tensor
    _inverted: Tensor | None = None  # W^-1 in advance, of weights that change no more

    def __init__(
        self, features: int, start: Literal["permutation", "rotation"] = "permutation", *, first: int = 0
    ) -> None:
        super().__init__()
        self.features = features
        chance = torch.randperm(features)
        order = torch.cat([chance[chance >= features - first], chance[chance < features - first]])
        p, lower, upper = torch.eye(features)[order], torch.eye(features), torch.eye(features)
        if start == "rotation":
            rotation = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
            p, lower, upper = (t.to(upper.dtype) for t in torch.linalg.lu(rotation.T))
            # rotation.T = P L U, so rotation = U^T L^T P^T: its transposed factors, scaled to a unit lower triangle
            diagonal = upper.diagonal()
            p, lower, upper = p.T, (upper / diagonal[:, None]).T, (lower * diagonal).T
        self.register_buffer("order", p.argmax(1))  # P x = x[order]
        self.register_buffer("back", p.argmax(0))  # x = (P x)[back]
        self.register_buffer("signs", upper.diagonal().sign())
        self.triangles = nn.Parameter(lower.tril(-1) + upper.triu(1))  # L below the diagonal, U above it
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())
        self.bias = nn.Parameter(torch.zeros(features))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L, without its diagonal of ones, and U, (D, D) each."""
        return ops.lu_factors(self.triangles, self.log_diagonal, self.signs)

    @torch.no_grad()
    def _solve(self) -> None:
        """Keep W^-1, so that `inverse` is a product, for programs that have no solver."""
        self._inverted = None
        every = torch.eye(len(self.bias), dtype=torch.float64, device=self.bias.device)
        self._inverted = self._undone(every).to(self.bias.dtype)

    def _undone(self, columns: Tensor) -> Tensor:
        """W^-1 of columns (D, N)."""
        if self._inverted is not None:
            return self._inverted @ columns
        wide = torch.promote_types(columns.dtype, torch.float32)  # there are no solvers of 16 bits
        lower, upper = (factor.to(wide) for factor in self.factors())
        half = torch.linalg.solve_triangular(lower, columns.to(wide), upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True).index_select(0, self.back).to(columns.dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # rounded, W has another inverse
            with torch.autocast(x.device.type, enabled=False):
                return self.forward(x)
        weight, logdet = ops.lu_product(self.triangles, self.log_diagonal, self.signs, self.back, self.order)
        return _mapped(x, weight, self.bias, logdet)

    def joined(self, before: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """An `ActNorm` that nobody listens to and this layer are one product of x."""
        if (
            not (untouched(before, ActNorm) and untouched(self, LULinear))
            or not (before.features == self.features == x.shape[1])
            or not (before.shift.dtype is self.bias.dtype is x.dtype)
            or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        ):
            return None
        before.prepare(x)
        numbers = self.log_diagonal, before.log_scale, before.shift, self.bias, self.signs
        return _mapped(x, *ops.lu_affine(self.triangles, *numbers, self.back, self.order))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        columns = y.movedim(1, 0).flatten(1) - self.bias[:, None]
        solved = self._undone(columns)
        return solved.view(solved.shape[0], y.shape[0], *y.shape[2:]).movedim(0, 1), -self._logdet(y)

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        """W as L, the diagonal of U, and U with ones on its diagonal: only the diagonal changes volume."""
        rows = x.movedim(1, -1)
        flat, scale = rows.flatten(0, -2), torch.exp(self.log_diagonal)
        d = len(self.bias)
        below = torch.arange(d)[:, None] > torch.arange(d)
        lower = torch.where(below, self.triangles, 0.0)
        upper = torch.where(below.T, self.triangles, 0.0) / (scale * self.signs)
        if inverse:
            flat = _solved(coder, flat - coder.on_grid(self.bias), lower, range(d))
            flat = _solved(coder, flat, upper, range(d - 1, -1, -1)) * self.signs
            flat = coder.affine(flat, scale, inverse=True).index_select(1, self.back)
        else:
            flat = coder.affine(flat.index_select(1, self.order), scale) * self.signs
            for triangle in (upper, lower):
                flat = flat + coder.on_grid(F.linear(flat, triangle))
            flat = flat + coder.on_grid(self.bias)
        return flat.view(rows.shape).movedim(-1, 1)

    def _logdet(self, x: Tensor) -> Tensor:
        return (math.prod(x.shape[2:]) * self.log_diagonal.sum()).expand(x.shape[0])


def _mapped(x: Tensor, weight: Tensor, bias: Tensor, logdet: Tensor) -> tuple[Tensor, Tensor]:
    """W x + b of vectors or of the channels of images, and the log-determinant of each example."""
    if x.dim() == 2:
        return ops.mlp(x, [weight], [bias]), logdet.expand(x.shape[0])
    if x.is_cpu:  # where a convolution of few channels takes three times as long as these products
        cells = x.flatten(2)  # (N, C, H W)
        y = torch.baddbmm(bias[:, None], weight.expand(x.shape[0], -1, -1), cells).view(x.shape)
    else:
        y = F.conv2d(x, weight[:, :, None, None], bias)
    return y, (math.prod(x.shape[2:]) * logdet).expand(x.shape[0])


def _solved(coder: Any, y: Tensor, triangle: Tensor, order: range) -> Tensor:
    """x (N, D) of y = x + the nearest numbers on the grid to x T', T without a diagonal, its coordinates in order."""
    x = torch.zeros_like(y)
    for i in order:
        x[:, i] = y[:, i] - coder.on_grid(F.linear(x, triangle))[:, i]
    return x


class ActNorm(Transform):
    """y = x exp(s) + t per feature of vectors (N, D), or per channel of images (N, C, H, W): arXiv 1807.03039, section
    3.1.

    s and t are parameters; the first batch in training mode sets them so that its features have mean 0 and variance 1.
    A feature that is constant in that batch is only shifted. With several processes the batch is that of all of them.
    A layer that is trained by its inverse first, as by reverse KL, starts as the identity.
    """

    started: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._asked = False  # whether `started` is known to be true, without waiting for the device

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._asked = False

    def prepare(self, x: Tensor) -> None:
        """Start by a first batch, before anything is made of it."""
        if self.training and not self._asked and x.shape[0]:
            if not self.started:
                self._start(x.detach())
            self._asked = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.prepare(x)
        return ops.actnorm(x, self.log_scale, self.shift)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self._asked and y.shape[0] and torch.is_grad_enabled():
            self.started.fill_(True)  # data that comes later must not change what was trained
            self._asked = True
        return ops.actnorm(y, self.log_scale, self.shift, inverse=True)

    def code(self, coder: Any, x: Tensor, inverse: bool = False) -> Tensor:
        scale, shift = (each.view(-1, *[1] * (x.dim() - 2)) for each in (torch.exp(self.log_scale), self.shift))
        return coder.affine(x, scale, shift, inverse)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        values = x.movedim(1, 0).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        mean = _over_processes(values.mean(1))
        std = _over_processes((values - mean[:, None]).square().mean(1)).sqrt()
        log_scale = torch.where(std > 1e-6 * mean.abs(), -std.log(), 0.0)
        self.log_scale.copy_(log_scale)
        self.shift.copy_(-mean * log_scale.exp())
        self.started.fill_(True)


def _over_processes(means: Tensor) -> Tensor:
    """Their mean over all processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(means)
        means /= torch.distributed.get_world_size()
    return means
