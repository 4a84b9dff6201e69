"""Planar and radial layers (arXiv 1505.05770, section 4.1), constrained to be invertible, and with their inverse."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.nn._transform import Transform

BISECTIONS = 60  # halve any bracket of float64 down to its last digits


class _Amortised(Transform):
    """Base: a few raw parameters, learned, plus (with a context) a linear map of the context."""

    def __init__(self, features: int, start: Tensor, context: int) -> None:
        super().__init__()
        self.features = features
        self.parameters_ = nn.Parameter(start)
        self.amortised = nn.Linear(context, len(start), bias=False) if context else None
        if self.amortised is not None:
            nn.init.normal_(self.amortised.weight, std=1e-3)

    def raw(self, context: Tensor | None) -> Tensor:
        """(1, P), or with a context (N, P)."""
        if self.amortised is None or context is None:
            return self.parameters_[None]
        return self.parameters_ + self.amortised(context).to(self.parameters_.dtype)


class Planar(_Amortised):
    """f(x) = x + u tanh(w x + b) of vectors (N, D): arXiv 1505.05770, equation 10. u is moved along w so that w u > -1:
    appendix A.1. A context (N, C) is mapped linearly to what is added to w, u and b.

    The inverse solves a = w y - (w u) tanh(a + b) for a = w x, which grows with a and so has one root, by bisection. It
    is ill-conditioned where w u is near -1. The inverse is differentiable to second order.
    """

    def __init__(self, features: int, context: int = 0) -> None:
        w = torch.randn(features) / features**0.5
        # softplus(w u) = 1 here, so that it starts near the identity.
        u = math.log(math.e - 1) * w / w.square().sum() + 0.01 * torch.randn(features)
        super().__init__(features, torch.cat([w, u, torch.zeros(1)]), context)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w, u, b, and 1 + w u, which is above 0 though it may be lost in the rounding of w u."""
        raw = self.raw(context)
        features = raw.shape[1] // 2
        w, u, b = raw[:, :features], raw[:, features:-1], raw[:, -1]
        wu, ww = (w * u).sum(1), w.square().sum(1)
        share = 1 / ww.clamp(min=1e-12)
        least = F.softplus(wu)
        u = u + (share * (least - 1 - wu))[:, None] * w
        return w, u, b, torch.lerp(1 + wu, least, share * ww)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, u, b, least = self._parts(context)
        h = torch.tanh((w * x).sum(1) + b)
        return x + u * h[:, None], self._slope(least, h).log()

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, u, b, least = self._parts(context)
        wy, wu = (w * y).sum(1), least - 1
        with torch.no_grad():
            low, high = wy - wu.abs(), wy + wu.abs()
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = middle + wu * torch.tanh(middle + b) < wy
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            a = (low + high) / 2
        # A Newton step has the root's derivatives, two have the second ones. Their value is left out: the slope may be
        # near 0.
        for _ in range(2):
            h = torch.tanh(a + b)
            residual = a + wu * h - wy
            a = a - (residual - residual.detach()) / self._slope(least, h).detach()
        h = torch.tanh(a + b)
        return y - u * h[:, None], -self._slope(least, h).log()

    @staticmethod
    def _slope(least: Tensor, h: Tensor) -> Tensor:
        """1 + (w u) (1 - h^2), from 1 + w u and without cancellation."""
        return h * h + least * (1 - h * h)


class Radial(_Amortised):
    """f(x) = x + b h (x - x0) of vectors (N, D), with h = 1 / (a + |x - x0|): arXiv 1505.05770, equation 14. a > 0 and
    b > -a: appendix A.2. A context (N, C) is mapped linearly to what is added to x0 and to the raw a and b.

    In the distance r from x0 it is r (s + r) / (a + r) with s = a + b, whose inverse is the root of a quadratic
    equation. Written with s > 0 nothing cancels where b is near -a.
    """

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__(features, torch.cat([torch.randn(features), torch.zeros(2)]), context)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.raw(context)
        return raw[:, :-2], F.softplus(raw[:, -2]), F.softplus(raw[:, -1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, a, s = self._parts(context)
        offset = x - centre
        r = torch.linalg.vector_norm(offset, dim=1)
        return centre + ((s + r) / (a + r))[:, None] * offset, self._logdet(x.shape[1], a, s, r)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, a, s = self._parts(context)
        offset = y - centre
        distance = torch.linalg.vector_norm(offset, dim=1)
        p = s - distance  # r^2 + p r - a distance = 0; of its root's two forms, the one without cancellation
        root = (p * p + 4 * a * distance).sqrt()
        r = torch.where(p > 0, 2 * a * distance / (p.clamp(min=0) + root), (root - p) / 2)
        return centre + ((a + r) / (s + r))[:, None] * offset, -self._logdet(y.shape[1], a, s, r)

    @staticmethod
    def _logdet(features: int, a: Tensor, s: Tensor, r: Tensor) -> Tensor:
        across, along = (s + r) / (a + r), (a * s + 2 * a * r + r * r) / (a + r).square()
        return (features - 1) * across.log() + along.log()
