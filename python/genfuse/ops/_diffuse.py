"""The forward process of diffusion: noise, noisy sample and target in one pass."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genfuse.ops import _op, _philox

Target = Literal["x0", "noise", "v", "velocity"]
TARGETS: tuple[Target, ...] = get_args(Target)  # as math.h numbers them


def formula(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str
) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha[:, None], sigma[:, None]  # (N, 1)
    eps = _eps(x0, seed, noise)  # (N, D)
    x_t = alpha * x0 + sigma * eps
    if target == "x0":
        return x_t, x0.new_empty((0,))  # nothing: it is there
    if target == "v":
        return x_t, alpha * eps - sigma * x0
    return x_t, eps - x0 if target == "velocity" else eps


def reductions(
    gx_t: Tensor, gv: Tensor | None, x0: Tensor, seed: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of alpha and sigma; gv is None unless the target is v."""
    eps = _eps(x0, seed, noise)
    galpha, gsigma = gx_t * x0, gx_t * eps
    if gv is not None:
        galpha, gsigma = galpha + gv * eps, gsigma - gv * x0
    return galpha.sum(-1), gsigma.sum(-1)


def _eps(x0: Tensor, seed: Tensor | None, noise: Tensor | None) -> Tensor:
    if noise is not None:
        return noise
    assert seed is not None
    return _philox.normal(seed, x0.shape, x0.dtype)


def _results(x0: Tensor, alpha: Tensor, sigma: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _op.like(x0), x0.new_empty((0,)) if rest[-1] == "x0" else _op.like(x0)


def _problem(x0: Tensor, seed: Tensor | None, noise: Tensor | None, partial: Tensor | None, *further: Any) -> tuple:
    noise = None if noise is None else noise.contiguous()
    (rows, cols), (x0, stride) = x0.shape, _op.rows(x0)
    return _op.DTYPES[x0.dtype], x0, stride, seed, noise, rows, cols, partial, *further


def _backward(
    needed: tuple[bool, ...], cotangents: tuple[Tensor | None, Tensor | None], x0: Tensor, alpha: Tensor,
    sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str, outputs: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    gx_t, gtarget = cotangents
    gx_t = torch.zeros_like(x0) if gx_t is None else gx_t
    if target in ("x0", "noise"):
        gtarget = None  # torch.compile makes one even of what is not differentiable

    def combine(a: Tensor, b: Tensor, sign: int) -> Tensor:
        """a gx_t + sign b gtarget, with b = 1 unless the target is v: itself a noisy sample, of gradients."""
        if gtarget is None:
            return (a[:, None] * gx_t).to(x0.dtype)
        b = b if target == "v" else torch.ones_like(b)
        return _fused(gx_t, a, b if sign > 0 else -b, None, gtarget, "x0")[0]

    galpha = gsigma = None
    if needed[1] or needed[2]:
        galpha, gsigma = _reductions(gx_t, gtarget if target == "v" else None, x0, seed, noise)
    return (
        combine(alpha, sigma, -1) if needed[0] else None,
        galpha if needed[1] else None,
        gsigma if needed[2] else None,
        None,
        combine(sigma, alpha, 1) if needed[4] else None,
    )


def _takes(x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str) -> tuple:
    of_each = x0.shape[:1], _op.wide(x0)
    return _op.matrix(x0), of_each, of_each, *_philox.takes(seed, noise, *_op.matrix(x0))


_TRITON = "genfuse.ops._triton.diffuse"
_fused = _op.fused(
    "diffuse(Tensor x0, Tensor alpha, Tensor sigma, Tensor? seed, Tensor? noise, str target) -> (Tensor, Tensor)",
    formula=formula,
    results=_results,
    problem=lambda x0, alpha, sigma, seed, noise, target: _problem(
        x0, seed, noise, None, TARGETS.index(target), alpha.contiguous(), sigma.contiguous()
    ),
    triton=_TRITON,
    backward=_backward,
    constant=lambda *given: (1,) if given[-1] in ("x0", "noise") else (),
    takes=_takes,
)
_reductions = _op.fused(
    "diffuse_backward(Tensor gx_t, Tensor? gv, Tensor x0, Tensor? seed, Tensor? noise) -> (Tensor, Tensor)",
    formula=reductions,
    results=lambda gx_t, *rest: (_op.sums(gx_t, gx_t.shape[0]), _op.sums(gx_t, gx_t.shape[0])),
    problem=lambda gx_t, gv, x0, seed, noise: _problem(
        x0,
        seed,
        noise,
        _op.pieces(gx_t, 2) if gx_t.is_cuda else None,
        gx_t.contiguous(),
        None if gv is None else gv.contiguous(),
    ),
    triton=f"{_TRITON}:backward",
    takes=lambda gx_t, gv, x0, seed, noise: (
        *[_op.matrix(gx_t)] * 3,
        *_philox.takes(seed, noise, *_op.matrix(gx_t)),
    ),
)


def diffuse(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    target: Target = "noise",
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add noise to data as the forward process of diffusion does, and give what a network is to predict of it.

    .. math::
        x_t = \alpha x_0 + \sigma \epsilon, \qquad \epsilon \sim \mathcal N(0, I)

    DDPM (arXiv 2006.11239), equation 4, with :math:`\alpha = \sqrt{\bar\alpha_t}`,
    :math:`\sigma = \sqrt{1 - \bar\alpha_t}`; noise of scale sigma on data as it is (arXiv 2206.00364) with alpha = 1;
    the straight paths of flow matching (arXiv 2210.02747) with alpha = 1 - t, sigma = t, so that t = 1 is noise.

    The noise is made inside the kernel. It is written once, as the target, where it is the target, and never
    otherwise; a backward pass that needs it makes it again. Differentiable to any order in x0, alpha, sigma and a
    given noise.

    Args:
        x0: data, (N, ...), of any strides, though examples that are not in one piece are copied; float32, float64,
            float16 or bfloat16.
        alpha: scale of the data, (N,), of x0's dtype, or float32 beside 16 bits; or one number for all examples.
        sigma: scale of the noise, as alpha.
        target: "noise", epsilon; "x0", the data; "v", alpha epsilon - sigma x0 (arXiv 2202.00512, appendix D); or
            "velocity", epsilon - x0, which is d x_t / dt on a straight path.
        generator: of x0's device; default PyTorch's own, which `torch.manual_seed` rules. One seed gives the same
            noise on every device and implementation, to rounding.
        seed: 64 bits, int64, (), on x0's device, in place of a drawn one: each element of epsilon follows from it and
            the element's place.
        noise: epsilon, of x0's shape, dtype and device, in place of drawn noise. It may require grad.

    Returns:
        x_t and the target, of x0's shape and dtype, contiguous. The targets "x0", and "noise" where it is given, are
        those tensors themselves.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together, or another target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if noise is not None or x0.dtype not in _op.DTYPES or not x0.dim():
        _op.check_alike(x0, "x0", **({} if noise is None else {"noise": (noise, x0.shape)}))
    of_each = (x0.shape[0],), _op.wide(x0), x0.device
    alpha, sigma = _per_example(x0, alpha, "alpha", of_each), _per_example(x0, sigma, "sigma", of_each)
    flat, given = x0, noise
    if x0.dim() != 2:
        shape = (x0.shape[0], math.prod(x0.shape[1:]))
        flat, given = x0.reshape(shape), None if noise is None else noise.reshape(shape)
    if noise is not None:
        seed = None
    elif seed is None:
        seed = _philox.seed(x0, generator)
    elif seed.dtype is not torch.int64 or seed.dim() or seed.device != x0.device:
        got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"seed must be a scalar of torch.int64 on x0's device {x0.device}, got {got}")
    there = noise if target == "noise" else x0 if target == "x0" else None  # a target that need not be stored
    x_t, of_target = _fused(flat, alpha, sigma, seed, given, target if there is None else "x0")
    if x0.dim() != 2:
        x_t = x_t.view(x0.shape)
        of_target = of_target.view(x0.shape) if there is None else of_target
    return x_t, of_target if there is None else there


def _per_example(x0: Tensor, value: Tensor | float, name: str, of_each: tuple) -> Tensor:
    """(N,), in the dtype that is computed in, on x0's device: as ``of_each`` has them."""
    shape, wide, device = of_each
    if not isinstance(value, Tensor):
        return x0.new_full(shape, value, dtype=wide)
    if value.shape == shape and value.dtype is wide and value.device == device:
        return value
    value = value if value.dim() else value.expand(shape)
    _op.check_alike(x0, "x0", **{name: (value, shape, wide)})
    return value.to(wide)
