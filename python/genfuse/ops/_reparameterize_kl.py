"""Reparameterised sample and its KL divergence, in one pass over the latent."""

from typing import Any

import torch
from torch import Tensor

from genfuse.ops import _op, _philox
from genfuse.ops._op import _C


def formula(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    sigma = (0.5 * logvar).exp()
    return mu + sigma * eps, _kl(mu, logvar, sigma).sum(-1)


def _kl(mu: Tensor, logvar: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * (mu**2 + sigma**2 - 1 - logvar)


def kl_per_dimension(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each element, in nats, in plain PyTorch (arXiv 1312.6114, appendix B).

    For what needs the terms of `reparameterize_kl`'s sum one by one. mu, logvar and the
    result are of one shape.
    """
    return _kl(mu, logvar, (0.5 * logvar).exp())


def gradient(gz: Tensor, gkl: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    sigma, gkl, gz_eps = (0.5 * logvar).exp(), gkl.unsqueeze(-1), gz * eps
    if gz.dim() > mu.dim():  # over the samples
        gz, gz_eps = gz.sum(0), gz_eps.sum(0)
    # (gkl sigma) sigma, not gkl sigma^2: finite also where sigma^2 overflows.
    return gz + gkl * mu, 0.5 * (gz_eps * sigma + (gkl * sigma) * sigma - gkl)


def eager(mu: Tensor, logvar: Tensor, samples: int | None = None, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if noise is None:
        noise = torch.randn(_shape(mu, samples), dtype=mu.dtype, device=mu.device)
    return formula(mu, logvar, noise)


def _shape(mu: Tensor, samples: int | None) -> tuple[int, ...]:
    return tuple(mu.shape) if samples is None else (samples, *mu.shape)


def _outputs(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    z = _op.like(mu) if samples is None else mu.new_empty((samples, *mu.shape))
    return z, mu.new_empty((*mu.shape[:-1],), dtype=_op.wide(mu))


def _gradients(gz: Tensor, gkl: Tensor, mu: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(mu), _op.like(mu)


def _eps(mu: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None) -> Tensor:
    if noise is not None:
        return noise.to(_op.wide(mu))
    assert seed is not None
    return _philox.normal(seed, _shape(mu, samples), _op.wide(mu))


def reference(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    wide = _op.wide(mu)
    z, kl = formula(mu.to(wide), logvar.to(wide), _eps(mu, seed, noise, samples))
    return z.to(mu.dtype).contiguous(), kl.contiguous()


def backward_reference(
    gz: Tensor, gkl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    wide = _op.wide(mu)
    gmu, glogvar = gradient(gz.to(wide), gkl, mu.to(wide), logvar.to(wide), _eps(mu, seed, noise, samples))
    return gmu.to(mu.dtype).contiguous(), glogvar.to(mu.dtype).contiguous()


def _problem(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[list, tuple]:
    """What both compiled kernels take first, and the tensors whose addresses stand in it."""
    mu, mu_stride = _op.rows(mu)
    logvar, logvar_stride = _op.rows(logvar)
    noise = None if noise is None else noise.contiguous()
    cols = mu.shape[-1]
    rows = mu.numel() // cols if cols else mu.shape[:-1].numel()
    return [
        _op.DTYPES[mu.dtype],
        mu.data_ptr(), mu_stride, logvar.data_ptr(), logvar_stride,
        0 if seed is None else seed.data_ptr(), 0 if noise is None else noise.data_ptr(),
        rows, cols, 1 if samples is None else samples,
    ], (mu, logvar, noise)  # fmt: skip


def _native(
    mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    z, kl = _outputs(mu, logvar, seed, noise, samples)
    problem, _alive = _problem(mu, logvar, seed, noise, samples)
    _C.reparameterize_kl(*problem, z.data_ptr(), kl.data_ptr(), *_op.place(mu))
    return z, kl


def _native_backward(
    gz: Tensor, gkl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
) -> tuple[Tensor, Tensor]:
    gmu, glogvar = _gradients(gz, gkl, mu)
    gz, gkl = gz.contiguous(), gkl.contiguous()
    problem, _alive = _problem(mu, logvar, seed, noise, samples)
    _C.reparameterize_kl_backward(
        *problem, gz.data_ptr(), gkl.data_ptr(), gmu.data_ptr(), glogvar.data_ptr(), *_op.place(mu)
    )
    return gmu, glogvar


_forward = _op.define(
    "reparameterize_kl(Tensor mu, Tensor logvar, Tensor? seed, Tensor? noise, SymInt? samples) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    native=_native,
    triton="reparameterize_kl:forward",
)
_backward = _op.define(
    "reparameterize_kl_backward(Tensor gz, Tensor gkl, Tensor mu, Tensor logvar, Tensor? seed, Tensor? noise, "
    "SymInt? samples) -> (Tensor, Tensor)",
    reference=backward_reference,
    fake=_gradients,
    native=_native_backward,
    triton="reparameterize_kl:backward",
)


class ReparameterizeKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mu: Tensor, logvar: Tensor, seed: Tensor | None, noise: Tensor | None, samples: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mu, logvar, seed, noise)
        ctx.samples = samples
        return _forward(mu, logvar, seed, noise, samples)

    @staticmethod
    def backward(ctx: Any, gz: Tensor, gkl: Tensor) -> tuple[Tensor | None, ...]:
        mu, logvar, seed, noise = ctx.saved_tensors
        gnoise = gz * (0.5 * logvar).exp() if ctx.needs_input_grad[3] else None
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        if not torch.is_grad_enabled():
            return *_backward(gz, gkl, mu, logvar, seed, noise, ctx.samples), None, gnoise, None
        if noise is None:  # made again: the sample of a standard normal
            zero = torch.zeros_like(mu, dtype=_op.wide(mu), requires_grad=False)
            noise, _ = _forward(zero, zero, seed, None, ctx.samples)
        wide = _op.wide(mu)
        gmu, glogvar = gradient(gz.to(wide), gkl, mu.to(wide), logvar.to(wide), noise.to(wide))
        return gmu.to(mu.dtype), glogvar.to(mu.dtype), None, gnoise, None


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
        _op.complain_unless_like(mu, "mu", logvar=(logvar, tuple(mu.shape)))
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be None or at least 1, got {samples}")
    if noise is None:
        return ReparameterizeKL.apply(mu, logvar, _philox.seed(mu, generator), None, samples)
    _op.complain_unless_like(mu, "mu", noise=(noise, _shape(mu, samples)))
    return ReparameterizeKL.apply(mu, logvar, None, noise, samples)


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    make = torch.Generator().manual_seed(1)
    mu, logvar = torch.randn((2, *size), generator=make).to(device, dtype)
    return {"mu": mu.detach().requires_grad_(), "logvar": logvar.detach().requires_grad_()}


def _replay(arguments: dict[str, Any]) -> dict[str, Any]:
    mu, samples = arguments["mu"], arguments.get("samples")
    return {"noise": _philox.normal(_philox.seed(mu), _shape(mu, samples))}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, d = size
    return (3 * n * d + n) * itemsize, (
        5 * n * d + n
    ) * itemsize  # mu, logvar, z, kl; gz, mu, logvar, gmu, glogvar, gkl


_op.OPERATORS["reparameterize_kl"] = _op.Operator(
    name="reparameterize_kl",
    function=reparameterize_kl,
    eager=eager,
    kernels=(_forward, _backward),
    sizes=((1, 8), (128, 32), (1024, 128), (16384, 256)),
    example=_example,
    moved=_moved,
    replay=_replay,
)
