"""Flows of the papers, ready made. Each is a `Flow` of vectors (N, D), or of examples of any shape as vectors."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, TypedDict, get_args

from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import Unpack

from genfuse import nn as blocks
from genfuse.errors import SettingsError
from genfuse.flows._flow import Flow, StandardNormal
from genfuse.nn import Transform
from genfuse.ops import Scale

# What makes a coupling's network of its numbers of inputs, outputs and context features: any module (x, context) -> raw
# parameters, x being (N, inputs), or of images (N, inputs, H, W), and the context (N, C) or None.
Conditioner = Callable[[int, int, int], nn.Module]
CouplingKind = Literal["affine", "additive"]
Shape = int | Sequence[int]


class Options(TypedDict, total=False):
    """What every flow takes, as `Flow` does."""

    base: Distribution | nn.Module | None
    embedding: nn.Module | None
    reversible: bool


def _shape(features: Shape) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


class _ReadyMade(Flow):
    """Base: layers that take vectors, or with ``images`` examples as they are, to vectors."""

    def __init__(
        self, features: Shape, context: int, layers: Iterable[Transform], options: Options, *, images: bool = False
    ) -> None:
        shape = _shape(features)
        flatten = [blocks.Flatten(shape)] if len(shape) > 1 and not images else []
        if options.get("base") is None:
            options = {**options, "base": StandardNormal(math.prod(shape))}
        super().__init__([*flatten, *layers], context=context, **options)


class NSF(_ReadyMade):
    """Neural spline flow with couplings, RQ-NSF (C) of arXiv 1906.04032: half of the features decide on the splines of
    the others; before each coupling, and after the last, stands a linear layer by LU, which starts as a random
    permutation that lets the features that were moved last decide next.

    >>> flow = NSF(2, context=16, embedding=network)  # which makes (..., 16) of what is given
    >>> loss = -flow(x).log_prob(theta).mean()

    Args:
        features: D, or the shape of an example.
        context: C, the features of the context (N, C) that all depends on, or 0; with an ``embedding`` those that it
            makes.
        transforms: how many couplings.
        bins: of each spline.
        bound: the splines are in [-bound, bound], in the units of x, and the identity outside.
        damped: how slowly bins move, in [0, 1]: raw widths and heights are divided by the network's width to the power
            ``damped`` / 2. nflows has 1; at 0.25 tables of few rows are overfitted less than at 0.
        hidden: width of each residual block of the couplings' networks, all the same.
        dropout: share of the units that each block drops while it is trained.
        squash: whether networks see features squashed, as in `genfuse.nn.MLPConditioner`, so that a row far outside of
            the data is not led further away.
        network: makes the couplings' networks, if they are to be others: see `Conditioner`. Its outputs are 3 ``bins``
            - 1 raw parameters for each feature, those of a feature beside each other.
        options: ``base``, ``embedding`` and ``reversible`` of `Flow`.

    Raises SettingsError for fewer than 2 features, or dropout in a reversible flow, which computes each layer twice.
    """

    def __init__(
        self,
        features: Shape,
        context: int = 0,
        *,
        transforms: int = 5,
        bins: int = 8,
        bound: float = 3.0,
        damped: float = 0.25,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        squash: bool = True,
        network: Conditioner | None = None,
        **options: Unpack[Options],
    ) -> None:
        if dropout and options.get("reversible"):
            raise SettingsError("reversible computes each layer twice, and dropout would differ: set dropout to 0")
        make = network or partial(blocks.ResidualMLP, hidden=hidden, dropout=dropout, squash=squash)
        d = math.prod(_shape(features))
        kept = blocks.split_size(d)

        def layers() -> Iterator[Transform]:
            for i in range(transforms):
                yield blocks.LULinear(d, first=d - kept if i else 0)  # no feature is kept, or moved, by all couplings
                conditioner = make(kept, (d - kept) * (3 * bins - 1), context)
                yield blocks.SplineCoupling(conditioner, split=kept, bins=bins, bound=bound, damped=damped)
            yield blocks.LULinear(d)

        super().__init__(features, context, layers(), options)


class NSFAR(_ReadyMade):
    """Autoregressive neural spline flow, RQ-NSF (AR) of arXiv 1906.04032: each feature's spline is decided by the
    features before it. The density takes one pass; so does sampling, by one sweep over the hidden units.

    Args:
        features, context, bins, bound, damped, options: as in `NSF`.
        transforms: how many autoregressive layers; before each, and after the last, stands a linear layer by LU.
        hidden: widths of each masked network's hidden layers.
        squash: whether the networks see features squashed, as in `genfuse.nn.MADE`.
    """

    def __init__(
        self,
        features: Shape,
        context: int = 0,
        *,
        transforms: int = 5,
        bins: int = 8,
        bound: float = 3.0,
        damped: float = 0.0,
        hidden: Sequence[int] = (256, 256),
        squash: bool = True,
        **options: Unpack[Options],
    ) -> None:
        d = math.prod(_shape(features))

        def layers() -> Iterator[Transform]:
            for _ in range(transforms):
                yield blocks.LULinear(d)
                yield blocks.AutoregressiveSpline(
                    d, hidden, context=context, bins=bins, bound=bound, damped=damped, squash=squash
                )
            yield blocks.LULinear(d)

        super().__init__(features, context, layers(), options)


class MAF(_ReadyMade):
    """Masked autoregressive flow (arXiv 1705.07057): feature by feature z_i = x_i exp(s_i) + t_i, with s_i and t_i made
    of the features of x before i. The density takes one pass; so does sampling, by one sweep over the hidden units.

    Args:
        features, context, options: as in `NSF`.
        transforms: how many autoregressive layers; the order of the features is reversed between two.
        hidden: widths of each masked network's hidden layers.
        scale: how the log-scales are bounded, as in `genfuse.nn.AutoregressiveAffine`.
        actnorm: whether to normalise activations between layers, where the paper has batch normalisation.
        squash: as in `NSFAR`.
    """

    def __init__(
        self,
        features: Shape,
        context: int = 0,
        *,
        transforms: int = 5,
        hidden: Sequence[int] = (256, 256),
        scale: Scale = "softclip",
        actnorm: bool = True,
        squash: bool = True,
        **options: Unpack[Options],
    ) -> None:
        d = math.prod(_shape(features))

        def layers() -> Iterator[Transform]:
            for i in range(transforms):
                if i:
                    yield blocks.Permutation.reversed(d)
                if i and actnorm:
                    yield blocks.ActNorm(d)
                layer = blocks.AutoregressiveAffine(d, hidden, context=context, scale=scale, squash=squash)
                yield self._autoregressive(layer)

        super().__init__(features, context, layers(), options)

    @staticmethod
    def _autoregressive(layer: Transform) -> Transform:
        return layer


class IAF(MAF):
    """Inverse autoregressive flow (arXiv 1606.04934): `MAF` with data and noise exchanged in each layer. Sampling is
    the direct pass; the density, with its gradients, takes the sweep."""

    @staticmethod
    def _autoregressive(layer: Transform) -> Transform:
        return blocks.Inverse(layer)


class Planar(_ReadyMade):
    """Planar flow (arXiv 1505.05770) from the data to the base: each layer bends space along a direction. The density
    is one pass; sampling solves for one number a layer.

    Args:
        features, context, options: as in `NSF`.
        transforms: how many layers.
    """

    layer: type[blocks.Planar | blocks.Radial] = blocks.Planar

    def __init__(self, features: Shape, context: int = 0, *, transforms: int = 32, **options: Unpack[Options]) -> None:
        d = math.prod(_shape(features))
        super().__init__(features, context, (self.layer(d, context) for _ in range(transforms)), options)


class Radial(Planar):
    """Radial flow (arXiv 1505.05770) from the data to the base: each layer bends space around a point, and is inverted
    in closed form. Its arguments are those of `Planar`."""

    layer = blocks.Radial


def _as_image(features: Shape, scales: int, halvings: int) -> tuple[int, int, int]:
    """The shape of images whose height and width can be halved so often."""
    shape = _shape(features)
    if scales < 1:
        raise SettingsError(f"scales must be at least 1, got {scales}")
    if len(shape) != 3:
        raise SettingsError(f"several scales need images, shape (C, H, W), got {shape}")
    if any(side % 2**halvings for side in shape[1:]):
        raise SettingsError(
            f"scales would halve height and width {halvings} times, but the images are {shape[1]}x{shape[2]}: use "
            "fewer scales, or network 'mlp' (multiscale=False)"
        )
    return shape[0], shape[1], shape[2]


class RealNVP(_ReadyMade):
    """Real-valued non-volume-preserving transformations (arXiv 1605.08803): affine couplings.

    Vectors: couplings that keep one half, which linear layers choose. Images: at each scale three checkerboard
    couplings, a squeeze and three couplings of channels; then half of the channels leave, with a learned prior given
    those that stay. The last scale has four checkerboard couplings. Activation normalisation stands in the place of the
    paper's batch normalisation, so that an example's density does not depend on the others of its batch.

    Args:
        features, context, options: as in `NSF`.
        transforms: how many couplings of vectors.
        hidden: widths of the hidden layers of each network of vectors.
        scales: of images, at least 1; between two, height and width are halved and half of the cells leave.
        channels: width of each residual block of the networks of images, all the same.
        scale: how the log-scales are bounded, as in `genfuse.nn.AffineCoupling`.
        linear: of vectors, whether activations are normalised before each coupling, as those of images, and mixed by a
            learned linear layer by LU; without, couplings keep the first half and the last in turn.
        interleaved: of images as vectors, whether these halves are the two colours of a checkerboard, so that a cell is
            moved given those beside it, rather than the upper half of the image given the lower one.
        squash: of vectors, as in `NSF`.
        network: makes the couplings' networks, if they are to be others: see `Conditioner`. Its outputs are first all
            log-scales, then all shifts.
        multiscale: whether examples are images at several scales, or vectors; by default those of shape (C, H, W) are.

    Raises SettingsError for fewer than 2 features, or images that cannot be halved so often.
    """

    def __init__(
        self,
        features: Shape,
        context: int = 0,
        *,
        transforms: int = 10,
        hidden: Sequence[int] = (256, 256),
        scales: int = 2,
        channels: Sequence[int] = (64, 64),
        scale: Scale = "softclip",
        linear: bool = True,
        interleaved: bool = False,
        squash: bool = True,
        network: Conditioner | None = None,
        multiscale: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        images = len(_shape(features)) == 3 if multiscale is None else multiscale

        def vectors(d: int) -> Iterator[Transform]:
            make, kept = network or partial(blocks.MLPConditioner, hidden=hidden, squash=squash), blocks.split_size(d)
            if interleaved and not linear and len(shape := _shape(features)) == 3:
                colours = blocks.checkerboard(shape[1], shape[2], True).expand(shape).flatten()
                yield blocks.Permutation(colours.int().argsort(stable=True))
            for i in range(transforms):
                conditioner = make(kept, 2 * (d - kept), context)
                if linear:
                    yield blocks.ActNorm(d)
                    yield blocks.LULinear(d, first=d - kept if i else 0)
                split = -kept if i % 2 and not linear else kept
                yield blocks.AffineCoupling(conditioner, split=split, scale=scale)

        make = network or partial(blocks.ConvConditioner, channels=channels, residual=True)
        make_prior = network or partial(blocks.ConvConditioner, channels=channels[:1])

        def by_mask(channels: int, masks: Sequence[Tensor]) -> Iterator[Transform]:
            for mask in masks:
                conditioner = make(channels, 2 * channels, context)
                yield blocks.ActNorm(channels)
                yield blocks.AffineCoupling(conditioner, mask=mask, scale=scale)

        def by_channel(channels: int) -> Iterator[Transform]:
            half = channels // 2
            for split in (half, -half, half):
                conditioner = make(half, channels, context)
                yield blocks.ActNorm(channels)
                yield blocks.AffineCoupling(conditioner, split=split, scale=scale)

        def at_scale(shape: tuple[int, int, int], scales: int) -> Iterator[Transform]:
            """From images of this shape to vectors."""
            channels, height, width = shape
            masks = [blocks.checkerboard(height, width, bool(i % 2)) for i in range(4)]
            if scales == 1:
                yield from by_mask(channels, masks)
                yield blocks.Flatten(shape)
                return
            yield from by_mask(channels, masks[:3])
            yield blocks.Squeeze()
            yield from by_channel(4 * channels)
            half = 2 * channels
            prior = blocks.AffineCoupling(make_prior(half, 2 * half, context), split=half, scale="tanh")
            smaller = height // 2, width // 2
            yield _leave(prior, at_scale((half, *smaller), scales - 1), (2 * half, *smaller), options)

        d = math.prod(_shape(features))
        layers = at_scale(_as_image(features, scales, scales - 1), scales) if images else vectors(d)
        super().__init__(features, context, layers, options, images=images)


class Glow(_ReadyMade):
    """Generative flow with invertible 1x1 convolutions (arXiv 1807.03039).

    Each step is an activation normalisation, an invertible linear map of the channels, and a coupling. Images: each
    scale begins with a squeeze, and at its end half of the channels leave, with a learned prior given those that stay.
    Vectors: the same steps with dense networks, at one scale.

    Args:
        features, context, options: as in `NSF`.
        transforms: how many steps, at each scale.
        coupling: "affine", or "additive": y = x + t.
        scale: how the log-scales of affine ones are bounded, as in `genfuse.nn.AffineCoupling`; "sigmoid" is the
            paper's code, whose inverse has no bound: samples of a flow that has learned little may overflow.
        hidden: widths of the hidden layers of each network of vectors.
        scales: of images, at least 1; each halves height and width.
        channels: width of the networks of images, one number.
        squash: of vectors, as in `NSF`.
        network: makes the couplings' networks, if they are to be others: see `Conditioner`. Its outputs are first all
            log-scales, then all shifts; or shifts alone.
        multiscale: whether examples are images at several scales, or vectors; by default those of shape (C, H, W) are.

    Raises SettingsError for fewer than 2 features, images that cannot be halved so often, or an unknown coupling.
    """

    def __init__(
        self,
        features: Shape,
        context: int = 0,
        *,
        transforms: int = 8,
        coupling: CouplingKind = "affine",
        scale: Scale = "sigmoid",
        hidden: Sequence[int] = (256, 256),
        scales: int = 2,
        channels: Sequence[int] = (64,),
        squash: bool = True,
        network: Conditioner | None = None,
        multiscale: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        if coupling not in get_args(CouplingKind):
            raise SettingsError(f"coupling must be one of {', '.join(get_args(CouplingKind))}, got {coupling!r}")
        images = len(_shape(features)) == 3 if multiscale is None else multiscale
        default = partial(blocks.MLPConditioner, hidden=hidden, squash=squash)
        make = network or (partial(blocks.ConvConditioner, channels=channels) if images else default)

        def steps(d: int) -> Iterator[Transform]:
            kept = blocks.split_size(d)
            for _ in range(transforms):
                yield blocks.ActNorm(d)
                yield blocks.LULinear(d, "rotation")
                if coupling == "affine":
                    yield blocks.AffineCoupling(make(kept, 2 * (d - kept), context), split=kept, scale=scale)
                else:
                    yield blocks.AdditiveCoupling(make(kept, d - kept, context), split=kept)

        def at_scale(shape: tuple[int, int, int], scales: int) -> Iterator[Transform]:
            """From images of this shape to vectors."""
            squeezed = (4 * shape[0], shape[1] // 2, shape[2] // 2)
            yield blocks.Squeeze()
            yield from steps(squeezed[0])
            if scales == 1:
                yield blocks.Flatten(squeezed)
            else:
                half = squeezed[0] // 2
                last = "exp" if scale == "sigmoid" else scale
                prior = blocks.AffineCoupling(make(half, 2 * half, context), split=half, scale=last)
                yield _leave(prior, at_scale((half, *squeezed[1:]), scales - 1), squeezed, options)

        layers = at_scale(_as_image(features, scales, scales), scales) if images else steps(math.prod(_shape(features)))
        super().__init__(features, context, layers, options, images=images)


def _leave(
    prior: Transform, rest: Iterator[Transform], shape: tuple[int, int, int], options: Options
) -> blocks.MultiscaleSplit:
    """Half of the channels of images of this shape leave; the others go on through the ``rest``."""
    return blocks.MultiscaleSplit(prior, blocks.Composite([*rest], reversible=options.get("reversible", False)), shape)
