"""The forward process of diffusion: noise, noisy sample and target in one pass."""

import math
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genfuse.ops import _op, _philox
from genfuse.ops._op import _C

Target = Literal["x0", "noise", "v", "velocity"]
TARGETS: tuple[Target, ...] = get_args(Target)  # as math.h numbers them


def formula(x0: Tensor, alpha: Tensor, sigma: Tensor, eps: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """Of x0 and eps (N, ...), with alpha and sigma that expand to them."""
    x_t = alpha * x0 + sigma * eps
    if target == "v":
        return x_t, alpha * eps - sigma * x0
    return x_t, {"x0": lambda: x0, "noise": lambda: eps, "velocity": lambda: eps - x0}[target]()


def gradient(gx_t: Tensor, gv: Tensor | None, x0: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Of alpha and sigma, for x0 (N, M); gv is None unless the target is v."""
    galpha, gsigma = gx_t * x0, gx_t * eps
    if gv is not None:
        galpha, gsigma = galpha + gv * eps, gsigma - gv * x0
    return galpha.sum(-1), gsigma.sum(-1)


def eager(
    x0: Tensor, alpha: Tensor, sigma: Tensor, *, target: str = "noise", noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    alpha, sigma = (t.view(-1, *[1] * (x0.dim() - 1)) for t in (alpha, sigma))
    return formula(x0, alpha, sigma, torch.randn_like(x0) if noise is None else noise, target)


def _outputs(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str
) -> tuple[Tensor, Tensor]:
    return _op.like(x0), x0.new_empty((0,)) if target == "x0" else _op.like(x0)


def _gradients(gx_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return gx_t.new_empty(gx_t.shape[:1], dtype=_op.wide(gx_t)), gx_t.new_empty(gx_t.shape[:1], dtype=_op.wide(gx_t))


def _eps(x0: Tensor, seed: Tensor | None, noise: Tensor | None) -> Tensor:
    if noise is not None:
        return noise.to(_op.wide(x0))
    assert seed is not None
    return _philox.normal(seed, tuple(x0.shape), _op.wide(x0))


def reference(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str
) -> tuple[Tensor, Tensor]:
    eps = _eps(x0, seed, noise)
    x_t, of_target = formula(x0.to(eps.dtype), alpha.unsqueeze(-1), sigma.unsqueeze(-1), eps, target)
    stored = x0.new_empty((0,)) if target == "x0" else of_target.to(x0.dtype).contiguous()
    return x_t.to(x0.dtype).contiguous(), stored


def backward_reference(
    gx_t: Tensor, gv: Tensor | None, x0: Tensor, seed: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    eps = _eps(x0, seed, noise)
    return gradient(gx_t.to(eps.dtype), None if gv is None else gv.to(eps.dtype), x0.to(eps.dtype), eps)


def _problem(x0: Tensor, seed: Tensor | None, noise: Tensor | None) -> tuple[tuple, tuple]:
    """What both compiled kernels take first, and the tensors whose addresses stand in it."""
    x0, stride = _op.rows(x0)
    noise = None if noise is None else noise.contiguous()
    return (
        _op.DTYPES[x0.dtype], x0.data_ptr(), stride,
        0 if seed is None else seed.data_ptr(), 0 if noise is None else noise.data_ptr(), *x0.shape,
    ), (x0, noise)  # fmt: skip


def _native(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str
) -> tuple[Tensor, Tensor]:
    x_t, of_target = _outputs(x0, alpha, sigma, seed, noise, target)
    alpha, sigma = alpha.contiguous(), sigma.contiguous()
    problem, _alive = _problem(x0, seed, noise)
    addresses = (t.data_ptr() for t in (alpha, sigma, x_t, of_target))
    _C.diffuse(*problem, TARGETS.index(target), *addresses, *_op.place(x0))
    return x_t, of_target


def _native_backward(
    gx_t: Tensor, gv: Tensor | None, x0: Tensor, seed: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    galpha, gsigma = _gradients(gx_t)
    gx_t, gv = gx_t.contiguous(), None if gv is None else gv.contiguous()
    problem, _alive = _problem(x0, seed, noise)
    addresses = (0 if t is None else t.data_ptr() for t in (gx_t, gv, galpha, gsigma))
    _C.diffuse_backward(*problem, *addresses, *_op.place(x0))
    return galpha, gsigma


_forward = _op.define(
    "diffuse(Tensor x0, Tensor alpha, Tensor sigma, Tensor? seed, Tensor? noise, str target) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    native=_native,
    triton="diffuse:forward",
)
_backward = _op.define(
    "diffuse_backward(Tensor gx_t, Tensor? gv, Tensor x0, Tensor? seed, Tensor? noise) -> (Tensor, Tensor)",
    reference=backward_reference,
    fake=_gradients,
    native=_native_backward,
    triton="diffuse:backward",
)


class Diffuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, alpha: Tensor, sigma: Tensor, seed: Tensor | None, noise: Tensor | None, target: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x0, alpha, sigma, seed, noise)
        ctx.target = target
        ctx.set_materialize_grads(False)
        x_t, of_target = _forward(x0, alpha, sigma, seed, noise, target)
        if target in ("x0", "noise"):
            ctx.mark_non_differentiable(of_target)
        return x_t, of_target

    @staticmethod
    def backward(ctx: Any, gx_t: Tensor | None, gtarget: Tensor | None) -> tuple[Tensor | None, ...]:
        x0, alpha, sigma, seed, noise = ctx.saved_tensors
        # Grad mode is on in here only under create_graph=True: then stay differentiable.
        forward, backward = (reference, backward_reference) if torch.is_grad_enabled() else (_forward, _backward)
        of_x0, of_alpha, of_sigma, _, of_noise, _ = ctx.needs_input_grad
        one = torch.ones_like(alpha)
        to_x0, to_noise = (-sigma, alpha) if ctx.target == "v" else (-one, one)  # how the target depends on them
        if gx_t is None:
            gx_t = torch.zeros_like(x0)

        def combine(a: Tensor, b: Tensor) -> Tensor:
            """a gx_t + b gtarget: itself a noisy sample, of gradients."""
            if gtarget is None:
                return (a.unsqueeze(-1) * gx_t).to(x0.dtype)
            return forward(gx_t, a, b, None, gtarget, "x0")[0]

        galpha = gsigma = None
        if of_alpha or of_sigma:
            galpha, gsigma = backward(gx_t, gtarget if ctx.target == "v" else None, x0, seed, noise)
        return (
            combine(alpha, to_x0) if of_x0 else None,
            galpha if of_alpha else None,
            gsigma if of_sigma else None,
            None,
            combine(sigma, to_noise) if of_noise else None,
            None,
        )


def diffuse(
    x0: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
    *,
    target: Target = "noise",
    generator: torch.Generator | None = None,
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
        noise: epsilon, of x0's shape, dtype and device, in place of drawn noise. It may require grad.

    Returns:
        x_t and the target, of x0's shape and dtype, contiguous. The targets "x0", and "noise" where it is given, are
        those tensors themselves.

    Raises:
        ValueError: for arguments whose shapes, dtypes or devices do not go together, or another target.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    _op.complain_unless_like(x0, "x0", **({} if noise is None else {"noise": (noise, x0.shape)}))
    alpha, sigma = _per_example(x0, alpha, "alpha"), _per_example(x0, sigma, "sigma")
    flat = x0 if x0.dim() == 2 else x0.reshape(x0.shape[0], math.prod(x0.shape[1:]))
    if noise is None:
        x_t, of_target = Diffuse.apply(flat, alpha, sigma, _philox.seed(x0, generator), None, target)
    else:
        stored = "x0" if target == "noise" else target  # nothing is: the noise is there already
        x_t, of_target = Diffuse.apply(flat, alpha, sigma, None, noise.reshape(flat.shape), stored)
        if target == "noise":
            return x_t.view(x0.shape), noise
    return x_t.view(x0.shape), x0 if target == "x0" else of_target.view(x0.shape)


def _per_example(x0: Tensor, value: Tensor | float, name: str) -> Tensor:
    """(N,), in the dtype that is computed in."""
    wide = _op.wide(x0)
    if not isinstance(value, Tensor):
        return x0.new_full(x0.shape[:1], value, dtype=wide)
    value = value if value.dim() else value.expand(x0.shape[0])
    if value.shape != x0.shape[:1] or value.dtype not in (x0.dtype, wide) or value.device != x0.device:
        _op.complain_unless_like(x0, "x0", **{name: (value, x0.shape[:1], wide)})
    return value.to(wide)


def _example(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    make = torch.Generator().manual_seed(1)
    x0, angle = torch.randn(size, generator=make), math.pi / 2 * torch.rand(size[0], generator=make)
    return {name: t.to(device, dtype) for name, t in (("x0", x0), ("alpha", angle.cos()), ("sigma", angle.sin()))}


def _learned(size: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {name: t.requires_grad_() for name, t in _example(size, dtype, device).items()}


def _replay(arguments: dict[str, Any]) -> dict[str, Any]:
    x0 = arguments["x0"]
    return {"noise": _philox.normal(_philox.seed(x0), tuple(x0.shape))}


def _moved(size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    n, elements = size[0], math.prod(size)
    # x0, x_t, the target, alpha and sigma; the gradients of all of these, and x0 and alpha and sigma again
    return (3 * elements + 2 * n) * itemsize, (4 * elements + 4 * n) * itemsize


# As a model is trained; and with a learned schedule and data that are another network's, which is differentiated.
for _name, _target, _make, _kernels in (
    ("diffuse", "noise", _example, (_forward,)),
    ("diffuse_learned", "v", _learned, (_forward, _backward)),
):
    _op.OPERATORS[_name] = _op.Operator(
        name=_name,
        function=partial(diffuse, target=_target),
        eager=partial(eager, target=_target),
        kernels=_kernels,
        sizes=((1, 8), (256, 2), (512, 784), (128, 3, 32, 32)),
        example=_make,
        moved=_moved,
        replay=_replay,
    )
