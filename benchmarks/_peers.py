"""The flows of nflows, normflows and zuko, and pythae's VAE, as their users write them. A library is imported where it
is used."""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributions import Transform

LIBRARIES = ("nflows", "normflows", "zuko")


@dataclass(frozen=True)
class Flow:
    """A flow of any library: what is trained, log p(x) (N,) of x (N, D), and of a context (N, C) if it was made for
    one, and n samples (n, D)."""

    model: nn.Module
    log_prob: Callable[..., Tensor]
    sample: Callable[[int], Tensor]


def absent(side: str) -> str:
    """Why there is nothing to compare with; empty where the library, the first word of a side, is installed."""
    library = side.split(",")[0]
    try:
        version(library)
    except PackageNotFoundError:
        return f"{library} is not installed; `pip install '.[peers]'` brings it"
    return ""


def versions() -> str:
    names = (*LIBRARIES, "pythae", "jax", "optax")
    return ", ".join(f"{name} {'(absent)' if absent(name) else version(name)}" for name in names)


Spline = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def nflows_spline(bins: int, bound: float, inverse: bool) -> Spline:
    """x (N, D) and raw parameters (N, D, 3 bins - 1) -> y and the log-determinant (N,); and the same of zuko below."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raw = params.split([bins, bins, bins - 1], -1)
        y, logdet = unconstrained_rational_quadratic_spline(x, *raw, inverse=inverse, tails="linear", tail_bound=bound)
        return y, logdet.sum(-1)

    return spline


def zuko_spline(bins: int, bound: float, inverse: bool) -> Spline:
    from zuko.transforms import MonotonicRQSTransform

    def spline(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        transform = MonotonicRQSTransform(*params.split([bins, bins, bins - 1], -1), bound=bound)
        y, logdet = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, logdet.sum(-1)

    return spline


def _nflows(layers: Sequence[nn.Module], features: int) -> Flow:
    from nflows.distributions import StandardNormal
    from nflows.flows.base import Flow as Density
    from nflows.transforms import CompositeTransform

    flow = Density(CompositeTransform(layers), StandardNormal([features]))
    return Flow(flow, flow.log_prob, flow.sample)


def _nflows_linear(features: int) -> nn.Module:
    from nflows.transforms import CompositeTransform, LULinear, RandomPermutation

    return CompositeTransform([RandomPermutation(features), LULinear(features, identity_init=True)])


def _nflows_nsf(features: int, *, dropout: float = 0.0, hidden: tuple[int, ...] = (128, 128), context: int = 0) -> Flow:
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform
    from nflows.utils import create_alternating_binary_mask

    def network(inputs: int, outputs: int) -> nn.Module:
        return ResidualNet(
            inputs, outputs, hidden_features=hidden[0], num_blocks=len(hidden), dropout_probability=dropout,
            context_features=context or None,
        )  # fmt: skip

    layers = []
    for i in range(5):
        mask = create_alternating_binary_mask(features, even=i % 2 == 0)
        coupling = PiecewiseRationalQuadraticCouplingTransform(
            mask, network, num_bins=8, tails="linear", tail_bound=3.0
        )
        layers += [_nflows_linear(features), coupling]
    return _nflows([*layers, _nflows_linear(features)], features)


def _nflows_maf(features: int, *, hidden: tuple[int, ...] = (256, 256), context: int = 0) -> Flow:
    from nflows.transforms import MaskedAffineAutoregressiveTransform, ReversePermutation

    layers = []
    for _ in range(5):  # a block is a hidden layer here, and the first layer is another one
        made = MaskedAffineAutoregressiveTransform(
            features, hidden[0], context_features=context or None, num_blocks=len(hidden) - 1, use_residual_blocks=False
        )
        layers += [ReversePermutation(features), made]
    return _nflows(layers, features)


def _nflows_nsf_ar(features: int, *, hidden: tuple[int, ...] = (256, 256), context: int = 0) -> Flow:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform

    layers = []
    for _ in range(5):
        spline = MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            features, hidden[0], context_features=context or None, num_blocks=len(hidden) - 1,
            use_residual_blocks=False, num_bins=8, tails="linear", tail_bound=3.0,
        )  # fmt: skip
        layers += [_nflows_linear(features), spline]
    return _nflows([*layers, _nflows_linear(features)], features)


def _normflows_nsf(features: int, *, dropout: float = 0.0, equal: bool = False) -> Flow:
    import normflows as nf

    layers = [nf.flows.LULinearPermute(features)]
    for i in range(5):
        coupling = nf.flows.CoupledRationalQuadraticSpline(
            features, 2, 128, num_bins=8, tail_bound=3.0, dropout_probability=dropout, reverse_mask=i % 2 == 1
        )
        if equal:
            coupling.prqct.unconditional_transform = None  # splines of the other half, which the others lack
        layers += [coupling, nf.flows.LULinearPermute(features)]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), layers)
    return Flow(flow, flow.log_prob, lambda n: flow.sample(n)[0])


def _zuko(flow: nn.Module) -> Flow:
    return Flow(flow, lambda x, context=None: flow(context).log_prob(x), lambda n: flow().sample((n,)))


def _zuko_realnvp(features: int) -> Flow:
    import zuko

    return _zuko(zuko.flows.RealNVP(features, transforms=10, hidden_features=(256, 256)))


def _zuko_maf(features: int, *, hidden: tuple[int, ...] = (256, 256), context: int = 0) -> Flow:
    import zuko

    return _zuko(zuko.flows.MAF(features, context, transforms=5, hidden_features=hidden))


def _zuko_nsf_ar(features: int, *, hidden: tuple[int, ...] = (256, 256), context: int = 0) -> Flow:
    import zuko

    return _zuko(zuko.flows.NSF(features, context, transforms=5, bins=8, hidden_features=hidden))


MODELS: dict[str, dict[str, Callable[..., Flow]]] = {  # by our name of the model, and by library
    "nsf": {
        "nflows": _nflows_nsf,
        "normflows": _normflows_nsf,
        "normflows, equal model": partial(_normflows_nsf, equal=True),
    },
    "realnvp": {"zuko": _zuko_realnvp},
    "maf": {"nflows": _nflows_maf, "zuko": _zuko_maf},
    "nsf-ar": {"nflows": _nflows_nsf_ar, "zuko": _zuko_nsf_ar},
}


def pythae_vae(shape: tuple[int, ...], hidden: tuple[int, ...], latent: int) -> nn.Module:
    """Called with {"data": x}, of which ``loss`` is minus the ELBO; with a Bernoulli likelihood."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    def mlp(*widths: int) -> nn.Sequential:
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Flatten(), mlp(math.prod(shape), *hidden, 2 * latent))

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.network(x).chunk(2, -1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(mlp(latent, *hidden[::-1], math.prod(shape)), nn.Sigmoid())

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.network(z).view(-1, *shape))

    return VAE(VAEConfig(input_dim=shape, latent_dim=latent, reconstruction_loss="bce"), Encoder(), Decoder())


@contextmanager
def ours_inside(library: str) -> Iterator[None]:
    """Our operators in place of a library's own splines and affine transforms, in models made before too."""
    from genfuse.ops import affine_coupling, rational_quadratic_spline

    if library == "zuko":
        from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

        def affine(self: Any, shift: Tensor, scale: Tensor, slope: float = 1e-3) -> None:
            Transform.__init__(self)
            options: dict[str, Any] = {"scale": "softclip", "slope": slope, "by_element": True}
            self.run = partial(affine_coupling, params=(scale, shift), **options)

        def spline(self: Any, *raw: Tensor, bound: float = 5.0, slope: float = 1e-3) -> None:
            Transform.__init__(self)
            options: dict[str, Any] = {"bins": raw[0].shape[-1], "bound": bound, "slope": slope, "by_element": True}
            self.run = partial(rational_quadratic_spline, params=torch.cat(raw, -1), **options)

        methods = {
            "_call": lambda self, x: self.run(x)[0],
            "_inverse": lambda self, y: self.run(y, inverse=True)[0],
            "call_and_ladj": lambda self, x: self.run(x),
        }
        with (
            patch.multiple(MonotonicAffineTransform, __init__=affine, **methods, create=True),
            patch.multiple(MonotonicRQSTransform, __init__=spline, **methods),
        ):
            yield
        return

    def function(
        inputs: Tensor, unnormalized_widths: Tensor, unnormalized_heights: Tensor, unnormalized_derivatives: Tensor,
        inverse: bool = False, tails: str = "linear", tail_bound: float = 1.0, min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3, min_derivative: float = 1e-3,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return rational_quadratic_spline(
            inputs, torch.cat([unnormalized_widths, unnormalized_heights, unnormalized_derivatives], -1),
            bins=unnormalized_widths.shape[-1], bound=tail_bound, tails=tails, inverse=inverse, by_element=True,
            min_width=min_bin_width, min_height=min_bin_height, min_derivative=min_derivative,
        )  # fmt: skip

    name = "unconstrained_rational_quadratic_spline"
    with ExitStack() as patches:
        for module in [m for n, m in sys.modules.items() if n.startswith(library) and hasattr(m, name)]:
            patches.enter_context(patch.object(module, name, function))
        yield


def fit(
    flow: Flow, train: Tensor, validation: Tensor, *, steps: int, batch_size: int, lr: float, grad_clip: float
) -> None:
    """Maximum likelihood with Adam, the learning rate falling to 0 along a cosine; leaves the weights of the best
    validation of those at the end of each epoch: what `genfuse.Trainer` does with the same options."""
    optimizer = torch.optim.Adam(flow.model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    lowest, best, step = math.inf, flow.model.state_dict(), 0
    while step < steps:
        flow.model.train()
        for index in torch.randperm(len(train), device=train.device).split(batch_size)[: steps - step]:
            optimizer.zero_grad()
            (-flow.log_prob(train[index]).mean()).backward()
            torch.nn.utils.clip_grad_norm_(flow.model.parameters(), grad_clip)
            optimizer.step()
            schedule.step()
            step += 1
        loss = -log_likelihood(flow, validation)
        if loss < lowest:
            lowest, best = loss, copy.deepcopy(flow.model.state_dict())
    flow.model.load_state_dict(best)
    flow.model.eval()


@torch.no_grad()
def log_likelihood(flow: Flow, x: Tensor) -> float:
    """The mean over all rows, in nats, 1,000 of them at a time."""
    flow.model.eval()
    return float(torch.cat([flow.log_prob(part).double() for part in x.split(1000)]).mean())
