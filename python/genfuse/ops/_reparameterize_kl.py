"""Reparameterised sample and its KL divergence, in one pass over the latent."""

import torch
from torch import Tensor

from genfuse.ops import _op, _philox


def formula(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    sigma = (0.5 * logvar).exp()  # (..., D)
    if noise is None:
        assert seed is not None
        noise = _philox.normal(seed, _shape(mu, samples), mu.dtype)  # ([samples], ..., D)
    return mu + sigma * noise, _kl(mu, logvar, sigma).sum(-1)


def _kl(mu: Tensor, logvar: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * (mu**2 + sigma**2 - 1 - logvar)


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each element, in nats, in plain PyTorch (arXiv 1312.6114, appendix B).

    For what needs the terms of `reparameterize_kl`'s sum one by one. mu, logvar and the
    result are of one shape.
    """
    return _kl(mu, logvar, (0.5 * logvar).exp())


def _shape(mu: Tensor, samples: int | None) -> tuple[int, ...]:
    return tuple(mu.shape) if samples is None else (samples, *mu.shape)


def _results(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    z = _op.like(mu) if samples is None else mu.new_empty((samples, *mu.shape))
    return z, _op.sums(mu, *mu.shape[:-1])


def _problem(mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None) -> tuple:
    noise = None if noise is None else noise.contiguous()
    rows, cols = mu.shape[:-1].numel(), mu.shape[-1]
    partial = _op.pieces(mu) if mu.is_cuda else None
    return _op.DTYPES[mu.dtype], *_op.rows(mu), *_op.rows(logvar), seed, noise, rows, cols, samples or 1, partial


def _takes(mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None) -> tuple:
    if not mu.dim() or (samples is not None and samples < 1):
        raise ValueError(f"mu must have at least one axis, and samples be at least 1, got {mu.dim()} and {samples}")
    kind = mu.shape, _op.storage(mu)
    return kind, kind, *_philox.takes(seed, noise, _shape(mu, samples), mu.dtype)


_fused = _op.fused(
    "reparameterize_kl(Tensor mu, Tensor logvar, Tensor? seed, Tensor? noise, SymInt? samples) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=_problem,
    triton="genfuse.ops._triton.reparameterize_kl",
    wrt=2,
    others={3: lambda gz, gkl, mu, logvar, *rest: (gz * (0.5 * logvar).exp()).to(gz.dtype)},
    takes=_takes,
)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sample a diagonal Gaussian by reparameterisation, with its KL divergence from the standard normal.

    .. math::
        z = \mu + e^{\mathrm{logvar} / 2} \epsilon, \qquad
        \mathrm{KL} = \tfrac12 \sum_d \left( \mu_d^2 + e^{\mathrm{logvar}_d} - 1 - \mathrm{logvar}_d \right)

    Kingma & Welling, "Auto-Encoding Variational Bayes" (arXiv 1312.6114), section 2.4 and appendix B. The noise is made
    inside the kernel and made again in the backward pass, never stored. Differentiable to any order.

    Args:
        mu: mean, (..., D), of any strides; float32, float64, float16 or bfloat16.
        logvar: log-variance, as mu.
        samples: how many samples z holds of each example; None for one, without an axis of its own.
        generator: of mu's device; default PyTorch's own, which `torch.manual_seed` rules. One seed gives the same
            noise on every device and implementation, to rounding.
        noise: epsilon, of z's shape, dtype and device, in place of drawn noise. It may require grad.

    Returns:
        z, of mu's shape, or (samples, ..., D), and of mu's dtype; and the KL divergence, (...), in nats, float64 for
        float64 and float32 for all others.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together.
    """
    if (
        mu.shape != logvar.shape
        or mu.dtype is not logvar.dtype
        or mu.device != logvar.device
        or mu.dtype not in _op.DTYPES
        or not mu.dim()
    ):
        _op.check_alike(mu, "mu", logvar=(logvar, tuple(mu.shape)))
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be None or at least 1, got {samples}")
    if noise is None:
        return _fused(mu, logvar, _philox.seed(mu, generator), None, samples)
    _op.check_alike(mu, "mu", noise=(noise, _shape(mu, samples)))
    return _fused(mu, logvar, None, noise, samples)
