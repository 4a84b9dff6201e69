"""The operators as tests and benchmarks see them: what they are held against, at which sizes, on which arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from genfuse import ops
from genfuse.ops import _affine_coupling, _bernoulli_nll, _mixed_log_prob, _op, _philox, _rational_quadratic_spline
from genfuse.ops import _standard_normal_log_prob as _normal

Size = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """A public operator, and the same as one writes it in plain PyTorch."""

    name: str
    function: Callable
    eager: Callable  # takes also what `replay` returns
    kernels: tuple[str, ...]  # names of the torch operators that it runs
    sizes: tuple[Size, ...]  # from launch-bound to bandwidth-bound
    example: Callable[[Size], dict[str, Any]]  # arguments of `function`
    moved: Callable[[Size, int], tuple[int, int]]  # (size, itemsize) -> bytes that must move, forward, backward
    replay: Callable[[dict[str, Any]], dict[str, Any]] = lambda arguments: {}  # the noise of the next call, in float64
    learned: tuple[str, ...] = ()  # the arguments that are differentiated
    widest: int = 1 << 30  # of examples that `eager` takes in reasonable time

    def arguments(self, size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Those of `function`, for a size of which the first is the number of examples."""
        made = {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in self.example(size).items()
        }
        for name in self.learned:
            made[name] = made[name].detach().requires_grad_()
        return made

    def error(self, size: Size, dtype: torch.dtype, device: str, *, eager: bool = False) -> float:
        """Largest error of outputs and gradients against float64, of `function` or of `eager`, each as a share of the
        largest value of its tensor (of 1, if all are smaller).

        In float64 the eager formula would be held against itself: it gets as many roundings as it makes in float32.
        """
        if eager and dtype is torch.float64:
            return self.error(size, torch.float32, device, eager=True) * 2.0**-29
        arguments = self.arguments(size, dtype, device)
        torch.manual_seed(0)
        noise = self.replay(arguments)
        torch.manual_seed(0)
        cast = {name: value.to(dtype) for name, value in noise.items()}
        ours = _results(self.eager, {**arguments, **cast}) if eager else _results(self.function, arguments)
        exact = {name: _double(value) for name, value in arguments.items()}
        truth = _results(self.eager, {**exact, **noise})
        shares = [
            (a.double() - b).abs().max() / b.detach().abs().max().clamp(min=1)
            for a, b in zip(ours, truth, strict=True)
            if b.numel()
        ]
        return float(torch.stack(shares).max()) if shares else 0.0  # Python's max would drop a NaN

    def eager_error(self, size: Size, dtype: torch.dtype, device: str, ours: float) -> float:
        """That of `eager`, or if ours is more than twice as large, the largest of it and of 32 neighbours: where
        rounding errors grow a hundredfold, one of few numbers may be small by chance."""
        eager = self.error(size, dtype, device, eager=True)
        if ours <= 2 * eager:
            return eager
        near = Near(**{field.name: getattr(self, field.name) for field in fields(self)})
        Near.chance.manual_seed(0)
        return max(eager, *(near.error(size, dtype, device, eager=True) for _ in range(32)))


class Near(Operator):
    """One whose tensors differ by at most a unit in the last place, by chance."""

    chance = torch.Generator()  # as what is drawn for an operator is the same each time

    def arguments(self, size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
        made = super().arguments(size, dtype, device)
        for name, t in made.items():
            if isinstance(t, Tensor) and t.is_floating_point():
                step = torch.randint(-1, 2, t.shape, generator=self.chance).to(t)
                made[name] = (t.detach() * (1 + torch.finfo(t.dtype).eps * step)).requires_grad_(t.requires_grad)
        return made


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _results(function: Callable, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients, for cotangents that differ from element to element and are the same in every dtype."""
    outputs = function(**arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    if not leaves:
        return outputs
    cotangents = [
        torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o.device, o.dtype) for o in outputs
    ]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents))


def _normals(*sizes: Size) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(1)
    return tuple(torch.randn(size, generator=make) for size in sizes)


def _actnorm(x: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    axes = (slice(None), *[None] * (x.dim() - 2)) if x.dim() == 4 else ()
    cells = math.prod(x.shape[2:]) if x.dim() == 4 else 1
    s, t = log_scale[axes], shift[axes]
    y = (x - t) * (-s).exp() if inverse else x * s.exp() + t
    logdet = (cells * log_scale.sum()).expand(x.shape[:1] if x.dim() == 4 else x.shape[:-1])
    return y, -logdet if inverse else logdet


def _affine(
    x: Tensor, params: Tensor, mask_or_split: Tensor | int, *, scale: str = "tanh", inverse: bool = False
) -> tuple[Tensor, Tensor]:
    mask = mask_or_split if isinstance(mask_or_split, Tensor) else None
    split = 0 if mask is not None else int(mask_or_split)
    slope = _affine_coupling.SLOPE if scale == "softclip" else 0.0
    return _affine_coupling.formula(x, params, None, mask, split, scale, slope, inverse=inverse)


def _autoregressive(y: Tensor, bounds: list[list[int]], **layers: Tensor) -> tuple[Tensor, Tensor]:
    w, b = ([layers[f"{of}{i}"] for i in range(len(bounds) + 1)] for of in "wb")
    return ops.autoregressive_inverse(y, w, b, bounds)


def _masks(y: Tensor, bounds: list[list[int]]) -> list[Tensor]:
    """Of each layer of a masked network, 1 between what may see each other (arXiv 1502.03509, equations 13 and 14)."""
    inputs = torch.arange(y.shape[1], device=y.device)
    hidden = [inputs.repeat_interleave(torch.tensor(starts, device=y.device).diff()) for starts in bounds]
    return [(b[:, None] >= a).to(y) for a, b in pairwise([inputs + 1, *hidden, inputs.repeat(2)])]


def _autoregressive_eager(y: Tensor, bounds: list[list[int]], **layers: Tensor) -> tuple[Tensor, Tensor]:
    """A pass of the whole network for each coordinate, as it is usually written."""
    masks, x, raw = _masks(y, bounds), torch.zeros_like(y), y[:, :0]
    for k in range(y.shape[1]):
        h = x
        for i, mask in enumerate(masks):
            h = torch.nn.functional.linear(h.relu() if i else h, layers[f"w{i}"] * mask, layers[f"b{i}"])
        raw, shift = h.chunk(2, -1)
        x = torch.cat([x[:, :k], ((y - shift) * (-raw.tanh()).exp())[:, k : k + 1], x[:, k + 1 :]], 1)
    return x, -raw.tanh().sum(1)


def _network(size: Size) -> dict[str, Any]:
    columns, units = size[1], min(size[1], 16)
    degrees = [i * columns // units for i in range(units)]
    bounds = [[sum(g < k for g in degrees) for k in range(columns + 1)]] * 2
    y = _normals(size)[0]
    made: dict[str, Any] = {"y": y, "bounds": bounds}
    for i, mask in enumerate(_masks(y, bounds)):
        w, b = _normals(mask.shape, mask.shape[:1])
        made[f"w{i}"], made[f"b{i}"] = 0.3 * w * mask, 0.3 * b
    return made


def _bernoulli(p: Tensor, noise: Tensor | None = None) -> Tensor:
    return torch.bernoulli(p) if noise is None else (noise <= p).to(p.dtype)


def _diffuse_eager(
    x0: Tensor, alpha: Tensor, sigma: Tensor, *, target: str = "noise", noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    alpha, sigma = (t.view(-1, *[1] * (x0.dim() - 1)) for t in (alpha, sigma))
    eps = torch.randn_like(x0) if noise is None else noise
    x_t = alpha * x0 + sigma * eps
    if target == "v":
        return x_t, alpha * eps - sigma * x0
    return x_t, eps - x0 if target == "velocity" else eps if target == "noise" else x0


def _penalty(gradient: Tensor, target: float = 1.0, one_sided: bool = False, reduction: str = "mean") -> Tensor:
    excess = gradient.flatten(1).norm(2, dim=1) - target
    penalty = (excess.clamp(min=0) if one_sided else excess) ** 2
    return penalty if reduction == "none" else getattr(penalty, reduction)()


def _interpolate(real: Tensor, fake: Tensor, epsilon: Tensor | None = None) -> Tensor:
    if epsilon is None:
        epsilon = torch.rand(real.shape[0], dtype=real.dtype, device=real.device)
    epsilon = epsilon.view(-1, *[1] * (real.dim() - 1))
    return epsilon * real + (1 - epsilon) * fake


def _spline(x: Tensor, params: Tensor, *, bins: int, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return _rational_quadratic_spline.formula(x, params, None, bins, bound, "linear", inverse, 1e-3, 1e-3, 1e-3)


def _reparameterize(
    mu: Tensor, logvar: Tensor, samples: int | None = None, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sigma = (0.5 * logvar).exp()
    if noise is None:
        noise = torch.randn(mu.shape if samples is None else (samples, *mu.shape), dtype=mu.dtype, device=mu.device)
    return mu + sigma * noise, 0.5 * (mu**2 + sigma**2 - 1 - logvar).sum(-1)


def _moved(
    forward: Callable[[int, int], int], backward: Callable[[int, int], int]
) -> Callable[[Size, int], tuple[int, int]]:
    """Of the number of examples n and of elements in all."""
    return lambda size, itemsize: tuple(f(size[0], math.prod(size)) * itemsize for f in (forward, backward))  # type: ignore[return-value]


def _normal_of(like: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def replay(arguments: dict[str, Any]) -> dict[str, Any]:
        shape, samples = tuple(arguments[like].shape), arguments.get("samples")
        key = _philox.seed(arguments[like])
        return {"noise": _philox.normal(key, shape if samples is None else (samples, *shape))}

    return replay


def _uniform_of_p(arguments: dict[str, Any]) -> dict[str, Any]:
    p = arguments["p"]
    # As rounded where it is compared: a draw is 0 or 1, and no tolerance would forgive another rounding.
    return {"noise": _philox.uniform(_philox.seed(p), tuple(p.shape)).to(_op.wide(p)).double()}


def _epsilon(arguments: dict[str, Any]) -> dict[str, Any]:
    real = arguments["real"]
    return {"epsilon": _philox.uniform(_philox.seed(real), tuple(real.shape[:1]))}


def _noised(size: Size) -> dict[str, Any]:
    make = torch.Generator().manual_seed(1)
    x0, angle = torch.randn(size, generator=make), math.pi / 2 * torch.rand(size[0], generator=make)
    return {"x0": x0, "alpha": angle.cos(), "sigma": angle.sin()}


def _table(size: Size) -> dict[str, Any]:
    """The columns of a table: of three in five a number with five components, of the others five choices each."""
    n, numbers = size[0], -(-3 * size[1] // 5)
    blocks, make = size[1] - numbers, torch.Generator().manual_seed(1)
    (raw,) = _normals((*size[:1], 15 * numbers + 5 * blocks))
    below, above = torch.rand(2, n, numbers, generator=make) + 0.1
    choices = torch.randint(5, (n, blocks), generator=make)
    return {
        "raw": raw,
        "low": -below,
        "high": above,
        "chosen": choices + 5 * torch.arange(blocks),
        "block": torch.arange(blocks).repeat_interleave(5),
    }


def _mixed(raw: Tensor, *rest: Tensor, **more: Tensor) -> Tensor:
    return _mixed_log_prob.formula(raw[None], *rest, **more)[0]


def _named(*names: str) -> Callable[[Size], dict[str, Any]]:
    """Normal draws of one size."""
    return lambda size: dict(zip(names, _normals(*[size] * len(names)), strict=True))


_FLOW = ((1, 8), (256, 32), (4096, 64), (65536, 64))
_CRITIC = ((64, 784), (256, 3072), (64, 49152))

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            name="actnorm",
            function=ops.actnorm,
            eager=_actnorm,
            kernels=("actnorm", "actnorm_backward"),
            sizes=_FLOW,
            example=lambda size: {
                name: scale * t
                for name, scale, t in zip(
                    ("x", "log_scale", "shift"), (1, 0.5, 0.5), _normals(size, size[1:], size[1:]), strict=True
                )
            },
            # x, y, logdet and the parameters; gy, x, gx, glogdet, the parameters and their gradients
            moved=_moved(lambda n, m: 2 * m + n + 2 * m // max(n, 1), lambda n, m: 3 * m + n + 4 * m // max(n, 1)),
            learned=("x", "log_scale", "shift"),
        ),
        Operator(
            name="affine_coupling",
            function=ops.affine_coupling,
            eager=_affine,
            kernels=("affine_coupling", "affine_coupling_backward"),
            sizes=_FLOW,
            example=lambda size: {
                **dict(zip(("x", "params"), _normals(size, (size[0], 2 * (size[1] - size[1] // 2))), strict=True)),
                "mask_or_split": size[1] // 2,
            },
            # x, params of as many, y and logdet; gy, glogdet, x, params and the gradients of the last two
            moved=_moved(lambda n, m: 3 * m + n, lambda n, m: 5 * m + n),
            learned=("x", "params"),
        ),
        Operator(
            name="autoregressive_inverse",
            function=_autoregressive,
            eager=_autoregressive_eager,
            kernels=(
                "autoregressive_inverse",
                "autoregressive_inverse_backward",
                "affine_coupling",
                "affine_coupling_backward",
            ),
            sizes=((1, 8), (256, 8), (256, 16)),
            example=_network,
            # y, x, logdet and the network of 16 units; backward about three times as much
            moved=_moved(
                lambda n, m: 2 * m + n + 48 * m // max(n, 1) + 256, lambda n, m: 6 * m + n + 144 * m // max(n, 1) + 768
            ),
            learned=("y", "w0", "b0", "w1", "b1", "w2", "b2"),
            widest=65,
        ),
        Operator(
            name="bernoulli",
            function=ops.bernoulli,
            eager=_bernoulli,
            kernels=("bernoulli",),
            sizes=((1, 8), (128, 784), (1024, 784), (16384, 784)),
            example=lambda size: {"p": torch.rand(size, generator=torch.Generator().manual_seed(1))},
            moved=_moved(lambda n, m: 2 * m, lambda n, m: 0),
            replay=_uniform_of_p,
        ),
        Operator(
            name="bernoulli_nll",
            function=ops.bernoulli_nll,
            eager=_bernoulli_nll.formula,
            kernels=("bernoulli_nll", "bernoulli_nll_backward"),
            sizes=((1, 8), (128, 784), (1024, 784), (16384, 784)),
            example=lambda size: {"logits": 3 * _normals(size)[0], "x": _normals(size)[0].cos().square()},
            moved=_moved(lambda n, m: 2 * m + n, lambda n, m: 3 * m + n),  # logits, x, the sums; g, and the gradient
            learned=("logits",),
        ),
        # As a model is trained; and with a learned schedule and data that are another network's.
        *(
            Operator(
                name=name,
                function=partial(ops.diffuse, target=target),
                eager=partial(_diffuse_eager, target=target),
                kernels=kernels,
                sizes=((1, 8), (256, 2), (512, 784), (128, 3, 32, 32)),
                example=_noised,
                # x0, x_t, the target, alpha and sigma; the gradients of all of these, and x0, alpha and sigma again
                moved=_moved(lambda n, m: 3 * m + 2 * n, lambda n, m: 4 * m + 4 * n),
                replay=_normal_of("x0"),
                learned=learned,
            )
            for name, target, kernels, learned in (
                ("diffuse", "noise", ("diffuse",), ()),
                ("diffuse_learned", "v", ("diffuse", "diffuse_backward"), ("x0", "alpha", "sigma")),
            )
        ),
        Operator(
            name="gradient_norm_penalty",
            function=ops.gradient_norm_penalty,
            eager=_penalty,
            kernels=("gradient_norm_penalty", "gradient_norm_penalty_backward"),
            sizes=_CRITIC,
            # Of norms near 1.5.
            example=lambda size: {"gradient": _normals(size)[0] * 1.5 / max(1, size[1]) ** 0.5},
            moved=_moved(lambda n, m: m + n, lambda n, m: 2 * m + n),  # gradient, norm; gradient, its gradient, norm
            learned=("gradient",),
        ),
        Operator(
            name="interpolate",
            function=ops.interpolate,
            eager=_interpolate,
            kernels=("interpolate", "interpolate_backward"),
            sizes=_CRITIC,
            example=_named("real", "fake"),
            moved=_moved(lambda n, m: 3 * m, lambda n, m: 3 * m),  # real, fake, x; g, both gradients
            replay=_epsilon,
            learned=("real", "fake"),
        ),
        Operator(
            name="mixed_log_prob",
            function=ops.mixed_log_prob,
            eager=_mixed,
            kernels=("mixed_log_prob", "mixed_log_prob_backward"),
            sizes=((1, 5), (256, 16), (4096, 16), (16384, 50)),
            example=_table,
            # 11 numbers a column of raw, on average, its edges or choice, and the result; the same and the gradient
            moved=_moved(lambda n, m: 13 * m + n, lambda n, m: 24 * m + n),
            learned=("raw",),
        ),
        *(
            Operator(
                name=name,
                function=partial(ops.rational_quadratic_spline, bins=8, bound=3.0, inverse=inverse),
                eager=partial(_spline, bins=8, bound=3.0, inverse=inverse),
                kernels=("rational_quadratic_spline", "rational_quadratic_spline_backward"),
                sizes=((1, 8), (128, 16), (4096, 32)),
                example=lambda size: {
                    name: scale * t  # some of x in the tails
                    for name, scale, t in zip(("x", "params"), (1.5, 0.1), _normals(size, (*size, 23)), strict=True)
                },
                # x, params, y, logdet; gy, glogdet, x, params, gx, gparams
                moved=_moved(lambda n, m: (2 + 23) * m + n, lambda n, m: (3 + 2 * 23) * m + n),
                learned=("x", "params"),
            )
            for name, inverse in (("rational_quadratic_spline", False), ("rational_quadratic_spline_inverse", True))
        ),
        Operator(
            name="reparameterize_kl",
            function=ops.reparameterize_kl,
            eager=_reparameterize,
            kernels=("reparameterize_kl", "reparameterize_kl_backward"),
            sizes=((1, 8), (128, 32), (1024, 128), (16384, 256)),
            example=_named("mu", "logvar"),
            # mu, logvar, z, kl; gz, mu, logvar, gmu, glogvar, gkl
            moved=_moved(lambda n, m: 3 * m + n, lambda n, m: 5 * m + n),
            replay=_normal_of("mu"),
            learned=("mu", "logvar"),
        ),
        Operator(
            name="standard_normal_log_prob",
            function=ops.standard_normal_log_prob,
            eager=_normal.formula,
            kernels=("standard_normal_log_prob", "standard_normal_log_prob_backward"),
            sizes=_FLOW,
            example=lambda size: dict(zip(("z", "logdet"), _normals(size, size[:-1]), strict=True)),
            # z, logdet, the result; z, its gradient, g
            moved=_moved(lambda n, m: m + 2 * n, lambda n, m: 2 * m + n),
            learned=("z", "logdet"),
        ),
    )
}
