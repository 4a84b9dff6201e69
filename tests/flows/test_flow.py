"""Flows as distributions: shapes, contexts, bases, round trips, gradients, and densities that are known otherwise."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
    constraints,
)
from torch.distributions.transforms import ComposeTransform, TanhTransform

from genfuse.errors import SettingsError
from genfuse.flows import IAF, MAF, NSF, NSFAR, Flow, Glow, Planar, Radial, RealNVP, StandardNormal
from genfuse.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    AutoregressiveSpline,
    Composite,
    ConvConditioner,
    Flatten,
    Inverse,
    Logit,
    LULinear,
    MLPConditioner,
    SplineCoupling,
    Squeeze,
    Transform,
)


class OwnNetwork(nn.Module):
    """A conditioner that has nothing but a forward, and whose layers stand in another order than they are called in."""

    def __init__(self, inputs, outputs, context):
        super().__init__()
        self.out, self.by_context = nn.Linear(8, outputs), nn.Linear(context, 8) if context else None
        self.into = nn.Linear(inputs, 8)

    def forward(self, x, context):
        h = self.into(x) if self.by_context is None else self.into(x) * self.by_context(context)
        return 0.3 * self.out(h.tanh())


def own_images(inputs, outputs, context):
    return OwnConv(inputs, outputs, context)


class OwnConv(nn.Module):
    def __init__(self, inputs, outputs, context):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(inputs + context, 4, 1), nn.Tanh(), nn.Conv2d(4, outputs, 3, padding=1))

    def forward(self, x, context):
        if context is not None:
            x = torch.cat([x, context[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        return self.net(x)


IMAGE = (1, 4, 4)
FLOWS = {
    "nsf": (3, lambda c, **o: NSF(3, c, transforms=2, bins=4, hidden=(16,), **o)),
    "nsf-own": (3, lambda c, **o: NSF(3, c, transforms=2, bins=4, network=OwnNetwork, **o)),
    "nsf-ar": (3, lambda c, **o: NSFAR(3, c, transforms=2, bins=4, hidden=(16,), **o)),
    "maf": (3, lambda c, **o: MAF(3, c, transforms=3, hidden=(16,), **o)),
    "iaf": (3, lambda c, **o: IAF(3, c, transforms=3, hidden=(16,), **o)),
    "realnvp": (3, lambda c, **o: RealNVP(3, c, transforms=4, hidden=(16,), **o)),
    "realnvp-own": (3, lambda c, **o: RealNVP(3, c, transforms=4, network=OwnNetwork, **o)),
    "glow": (3, lambda c, **o: Glow(3, c, transforms=3, hidden=(16,), **o)),
    "planar": (3, lambda c, **o: Planar(3, c, transforms=5, **o)),
    "radial": (3, lambda c, **o: Radial(3, c, transforms=5, **o)),
    "realnvp-images": (IMAGE, lambda c, **o: RealNVP(IMAGE, c, channels=(4,), **o)),
    "realnvp-images-own": (IMAGE, lambda c, **o: RealNVP(IMAGE, c, network=own_images, **o)),
    "realnvp-vectors": (IMAGE, lambda c, **o: RealNVP(IMAGE, c, transforms=2, hidden=(8,), multiscale=False, **o)),
    "glow-images": (IMAGE, lambda c, **o: Glow(IMAGE, c, transforms=2, channels=(4,), coupling="additive", **o)),
    "glow-images-own": (IMAGE, lambda c, **o: Glow(IMAGE, c, transforms=1, network=own_images, **o)),
}
every_flow = pytest.mark.parametrize("name", FLOWS)
with_and_without_context = pytest.mark.parametrize("context", [0, 5])


def shape_of(name):
    shape = FLOWS[name][0]
    return (shape,) if isinstance(shape, int) else shape


def made(name, context=0, dtype=torch.float64, size=0.1, **options):
    """With noise on all parameters, so that none is where it starts, and activations normalised by no data."""
    torch.manual_seed(0)
    flow = FLOWS[name][1](context, **options).to(dtype).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p += size * torch.randn_like(p)
    return flow


def given(context, *lead, dtype=torch.float64):
    return (torch.randn(*lead, context, dtype=dtype),) if context else ()


# What zuko asks of its own flows.


@every_flow
@with_and_without_context
def test_densities_and_draws_have_their_shapes_and_reach_all_parameters(name, context):
    flow, shape = made(name, context), shape_of(name)
    x = torch.randn(256, *shape, dtype=torch.float64)
    density = flow(*given(context)).log_prob(x)
    assert density.shape == (256,)
    density.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    assert flow(*given(context)).sample((32,)).shape == (32, *shape)
    flow.zero_grad()
    flow(*given(context)).rsample((4,)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


@every_flow
@with_and_without_context
def test_a_flow_is_invertible(name, context):
    flow, c = made(name, context), given(context, 100)
    x = torch.randn(100, *shape_of(name), dtype=torch.float64)
    z, logdet = flow.transform(x, *c)
    again, back = flow.transform.inverse(z, *c)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back, -logdet, rtol=0, atol=1e-8)


@every_flow
@with_and_without_context
def test_a_density_is_that_of_the_base_and_the_jacobian(name, context):
    flow, c = made(name, context), given(context)
    x = torch.randn(shape_of(name), dtype=torch.float64)
    rows = tuple(each[None] for each in c)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.transform(x[None], *rows)[0].flatten(), x)
    z = flow.transform(x[None], *rows)[0]
    expected = Normal(0, 1).log_prob(z).sum() + torch.linalg.slogdet(jacobian.view(z.numel(), -1)).logabsdet
    torch.testing.assert_close(flow(*c).log_prob(x), expected, rtol=0, atol=1e-9)


@every_flow
@with_and_without_context
def test_pickles_and_copies_are_the_same_flow_and_print(name, context):
    flow, c = made(name, context, torch.float32), given(context, dtype=torch.float32)
    x = torch.randn(7, *shape_of(name))
    torch.save(flow, file := io.BytesIO())
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(flow), copy.deepcopy(flow(*c)).flow):
        assert torch.equal(other(*c).log_prob(x), flow(*c).log_prob(x))
        other.load_state_dict(flow.state_dict())
    assert type(flow).__name__ in repr(flow)
    assert repr(flow(*c))


@every_flow
def test_a_draw_comes_with_its_own_density(name):
    flow = made(name, 5)
    p = flow(*given(5, 2))
    torch.manual_seed(1)
    x, density = p.rsample_and_log_prob((3,))
    assert (x.shape, density.shape) == ((3, 2, *shape_of(name)), (3, 2))
    torch.testing.assert_close(density, p.log_prob(x), rtol=0, atol=1e-8)
    torch.manual_seed(1)
    assert torch.equal(p.sample((3,)), x)
    assert x.requires_grad
    assert not p.sample().requires_grad


@every_flow
def test_a_draw_in_training_comes_with_its_own_density(name):
    flow, (c,) = FLOWS[name][1](5), given(5, dtype=torch.float32)
    x, density = flow(c).rsample_and_log_prob((6,))
    torch.testing.assert_close(density, flow(c).log_prob(x), rtol=1e-4, atol=1e-3)


# Shapes of contexts, of examples, and of what `expand` makes.


@pytest.mark.parametrize("name", ["nsf", "maf", "realnvp-images"])
@pytest.mark.parametrize(
    ("lead", "batch", "whole"),
    [
        ((), (), ()),
        ((7,), (), (7,)),
        ((), (7,), (7,)),
        ((7,), (7,), (7,)),
        ((4, 7), (7,), (4, 7)),
        ((4, 1), (7,), (4, 7)),
        ((7,), (4, 1), (4, 7)),
        ((0,), (1,), (0,)),
        ((2, 1, 3), (4, 1), (2, 4, 3)),
    ],
    ids=str,
)
def test_examples_and_contexts_are_broadcast(name, lead, batch, whole):
    flow, shape = made(name, 5), shape_of(name)
    x, (c,) = torch.randn(*lead, *shape, dtype=torch.float64), given(5, *batch)
    p = flow(c)
    assert (p.batch_shape, p.event_shape) == (batch, shape)
    assert p.sample((2, 1)).shape == (2, 1, *batch, *shape)
    assert p.sample((0,)).shape == (0, *batch, *shape)
    density = p.log_prob(x)
    assert density.shape == whole
    one_by_one = zip(
        x.expand(*whole, *shape).reshape(-1, *shape), c.expand(*whole, 5).reshape(-1, 5), density.flatten(), strict=True
    )
    for own_x, own_c, found in one_by_one:
        torch.testing.assert_close(flow.log_prob(own_x[None], own_c[None])[0], found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize("base", [None, MultivariateNormal(torch.ones(3), 2 * torch.eye(3))], ids=["normal", "mvn"])
def test_an_expanded_distribution_is_the_same_at_each_place(context, base):
    flow = made("maf", context, torch.float32, base=base)
    p = flow(*given(context, dtype=torch.float32))
    wide = p.expand((4, 3)).expand((2, 4, 3))
    assert (wide.batch_shape, wide.event_shape) == ((2, 4, 3), (3,))
    assert wide.sample((6,)).shape == (6, 2, 4, 3, 3)
    x = torch.randn(3)
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x).expand(2, 4, 3))
    with pytest.raises(RuntimeError, match="expand"):
        wide.expand((5, 3))


def test_arguments_are_validated_as_those_of_other_distributions():
    p = MAF(3)(validate_args=True)  # by default as of all distributions, until torch.compile turns it off
    with pytest.raises(ValueError, match="right-most"):
        p.log_prob(torch.randn(4))
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor([0.0, math.nan, 0.0]))
    assert MAF(3)(validate_args=False).log_prob(torch.tensor([0.0, math.nan, 0.0])).isnan()
    unit = Flow([Logit(0.1), MLPFree()], StandardNormal(3))(validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        unit.log_prob(torch.tensor([0.5, 1.5, 0.5]))
    assert isinstance(unit.support.base_constraint, constraints.interval)
    assert Flow([Inverse(Logit(0.1))], StandardNormal(3))().support.base_constraint is constraints.real
    assert Flow([AutoregressiveSpline(2, (4,), tails="none")])().support.base_constraint.upper_bound == 3
    for moment in ("mean", "variance"):
        with pytest.raises(NotImplementedError):
            getattr(p, moment)
    with pytest.raises(NotImplementedError):
        p.entropy()


class MLPFree(Transform):
    def forward(self, x, context=None):
        return x, x.new_zeros(len(x))

    inverse = forward


@pytest.mark.parametrize(
    ("flow", "context", "message"),
    [
        (MAF(3), torch.randn(2), r"made for no context, got \(2,\)"),
        (MAF(3, 4), None, r"made for a context \(..., 4\), got None"),
        (NSF(3, 4), torch.randn(7, 3), r"made for a context \(..., 4\), got \(7, 3\)"),
        (
            NSF(3, 4, embedding=nn.Linear(9, 5)),
            torch.randn(7, 9),
            r"made for a context \(..., 4\), got \(7, 5\) from its embed",
        ),
        (NSF(3, 4, embedding=nn.Linear(9, 4)), None, "made for a context, for its embedding, got None"),
    ],
)
def test_a_context_that_is_missing_or_not_foreseen_is_refused(flow, context, message):
    for call in (lambda: flow(context), lambda: flow.log_prob(torch.randn(7, 3), context)):
        with pytest.raises(ValueError, match=f"context: this flow was {message}"):
            call()


def test_an_embedding_makes_the_context_of_whatever_is_given():
    flow = MAF(2, 6, embedding=nn.Embedding(4, 6)).double()
    labels = torch.tensor([[0, 3], [1, 1], [2, 0]])
    p = flow(labels)
    assert p.batch_shape == (3, 2)
    p.log_prob(torch.randn(3, 2, 2, dtype=torch.float64)).sum().backward()
    assert flow.embedding.weight.grad.any(1).all()
    float64 = NSF(2, 3).double()(torch.randn(5, 3))  # a context of another type than the flow's
    assert float64.sample().dtype is torch.float64


# Densities that are known otherwise.


def test_linear_layers_make_the_gaussian_that_scipy_knows():
    flow = Flow([LULinear(4), ActNorm(4), LULinear(4, "rotation")]).double().eval()
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p)
    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    mean = flow.transform.inverse(zero)[0].detach()
    scale = (flow.transform.inverse(eye)[0] - mean).T.detach()
    x = 2 * torch.randn(50, 4, dtype=torch.float64)
    expected = multivariate_normal(mean[0].numpy(), (scale @ scale.T).numpy()).logpdf(x.numpy())
    np.testing.assert_allclose(flow().log_prob(x).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_elementwise_transforms_make_the_distribution_that_torch_knows():
    flow = Flow([Logit(0.05)], StandardNormal(3)).double()
    a = 0.05
    theirs = TransformedDistribution(
        Independent(Normal(torch.zeros(3).double(), 1.0), 1),
        [SigmoidTransform(), AffineTransform(-a / (1 - 2 * a), 1 / (1 - 2 * a))],
    )
    x = torch.rand(50, 3, dtype=torch.float64)
    torch.testing.assert_close(flow(validate_args=False).log_prob(x), theirs.log_prob(x), rtol=0, atol=1e-12)


BASES = {
    "by coordinate": Normal(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0])),
    "with covariance": MultivariateNormal(torch.ones(3), torch.eye(3) + 0.5),
    "mixture": MixtureSameFamily(
        Categorical(torch.tensor([0.2, 0.8])),
        Independent(Normal(torch.tensor([[0.0, 1.0, -1.0], [2.0, -0.5, 0.3]]), torch.ones(2, 3)), 1),
    ),
    "transformed": TransformedDistribution(
        Independent(Laplace(torch.full((3,), 2.0), torch.ones(3)), 1),
        [AffineTransform(torch.tensor([0.3, -0.2, 0.5]), torch.ones(3))],
    ),
    "composed": TransformedDistribution(
        Independent(Normal(torch.zeros(3), 1.0), 1),
        [
            ComposeTransform(
                [AffineTransform(torch.tensor([0.3, -0.2, 0.5]), torch.tensor([2.0, 0.5, 1.0])), TanhTransform()]
            )
        ],
    ),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("context", [0, 5])
def test_any_distribution_is_a_base_whose_tensors_move_with_the_flow(kind, context):
    base = BASES[kind]
    flow = Flow([ActNorm(3)], base, context=context).eval()
    c, x = given(context, 6, dtype=torch.float32), base.sample((6,))
    wanted = base.log_prob(x)
    wanted = wanted.sum(-1) if kind == "by coordinate" else wanted
    torch.testing.assert_close(flow(*c).log_prob(x), wanted)
    torch.testing.assert_close(flow.log_prob(x, *c), wanted)
    assert flow(*c).has_rsample == base.has_rsample
    double = copy.deepcopy(flow).double()
    draws = double(*c).sample((4000,))
    assert draws.dtype is torch.float64
    torch.testing.assert_close(double.float()(*c).log_prob(x), wanted)
    elsewhere = copy.deepcopy(flow).to("meta").base().sample((2,))  # fails if any tensor stayed behind
    assert elsewhere.device.type == "meta"
    spread = base.sample((4000,)).std(0)
    torch.testing.assert_close(draws.flatten(0, -2).std(0).float(), spread, rtol=0.15, atol=0)
    assert flow.state_dict().keys() == double.state_dict().keys()
    assert flow.base.state_dict()
    flow.load_state_dict(double.state_dict())
    if base.has_rsample:
        x, density = flow(*c).rsample_and_log_prob()
        torch.testing.assert_close(density, flow(*c).log_prob(x), rtol=0, atol=1e-4)
    else:
        with pytest.raises(NotImplementedError):
            flow(*c).rsample()


def test_a_base_may_be_made_of_inverses_and_be_used_elsewhere():
    normal = Independent(Normal(torch.zeros(3), 1.0), 1)
    base = TransformedDistribution(normal, [AffineTransform(torch.randn(3), torch.rand(3) + 1).inv])
    before, x = Flow([ActNorm(3)], base), torch.randn(6, 3)
    wanted = base.log_prob(x)
    for flow in (before, Flow([ActNorm(3)], base)):
        torch.testing.assert_close(flow.double().eval()().log_prob(x.double()), wanted.double(), rtol=1e-5, atol=1e-5)


def test_a_base_that_would_not_be_trained_is_refused():
    with pytest.raises(ValueError, match=r"base: the distribution's loc requires a gradient.*give a module"):
        Flow([ActNorm(2)], Normal(nn.Parameter(torch.zeros(2)), 1.0))
    with pytest.raises(ValueError, match=r"give base=StandardNormal\(features\)"):
        Flow([Logit(0.1)])


class LearnedBase(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.mean = nn.Linear(context, 3) if context else nn.Parameter(torch.randn(3))

    def forward(self, context):
        return Normal(self.mean if context is None else self.mean(context), 1.0)


@pytest.mark.parametrize("context", [0, 5])
def test_a_module_is_a_base_that_is_trained_and_may_depend_on_the_context(context):
    flow = MAF(3, context, hidden=(8,), base=LearnedBase(context)).eval()
    c = given(context, 6, dtype=torch.float32)
    p = flow(*c)
    assert p.batch_shape == ((6,) if context else ())
    assert p.sample((4,)).shape == (4, *p.batch_shape, 3)
    x, density = p.rsample_and_log_prob((4,))
    torch.testing.assert_close(density, p.log_prob(x), rtol=0, atol=1e-4)
    density.sum().backward()
    assert all(weight.grad.any() for weight in flow.base.parameters())
    z, logdet = flow.transform(x[0].reshape(-1, 3), *c)
    mean = flow.base.mean(*c) if context else flow.base.mean
    wanted = Normal(mean, 1.0).log_prob(z).sum(1) + logdet
    torch.testing.assert_close(p.log_prob(x[0]).reshape(-1), wanted)


def test_a_bounded_base_is_held_to_its_bounds():
    flow = Flow([AutoregressiveSpline(2, (8,), tails="circular")], Uniform(-3 * torch.ones(2), 3 * torch.ones(2)))
    with torch.no_grad():
        flow.transform.transforms[0].made.layers[-1].bias += torch.randn(2 * 24)
    x = flow().sample((5000,))
    assert x.abs().max() <= 3
    side = (torch.arange(200) + 0.5) / 200 * 6 - 3
    density = flow().log_prob(torch.cartesian_prod(side, side))
    assert density.std() > 0.1
    assert density.exp().mean().item() * 36 == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("transforms", "shape"),
    [
        ([AffineCoupling(MLPConditioner(2, 6), split=2)], (5,)),
        ([AffineCoupling(MLPConditioner(2, 6), split=-2), Logit(0.1)], (5,)),
        ([AffineCoupling(MLPConditioner(3, 6), mask=torch.tensor([True, False, True]))], (3,)),
        ([Inverse(LULinear(4))], (4,)),
        (Composite([Inverse(Composite([ActNorm(4), Inverse(LULinear(4))]))]), (4,)),
        ([Flatten((2, 3))], (2, 3)),
        ([Squeeze(), ActNorm(4), Flatten((4, 2, 3))], (1, 4, 6)),
        ([Squeeze(), ActNorm(8), Inverse(Squeeze()), ActNorm(2), Flatten((2, 4, 6))], (2, 4, 6)),
    ],
    ids=str,
)
def test_the_shape_of_an_example_follows_from_the_transforms(transforms, shape):
    p = Flow(transforms)()
    assert p.event_shape == shape
    x = p.sample((3,))
    assert x.shape == (3, *shape)
    assert p.log_prob(x.sigmoid()).shape == (3,)


def test_latents_may_be_images():
    flow = Flow(
        [ActNorm(2), AffineCoupling(ConvConditioner(1, 2, 3), split=1)], StandardNormal(2, 4, 4), context=3
    ).eval()
    p = flow(torch.randn(5, 3))
    assert p.event_shape == (2, 4, 4)
    x, density = p.rsample_and_log_prob()
    torch.testing.assert_close(density, p.log_prob(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(density, Normal(0, 1).log_prob(x).sum((1, 2, 3)), rtol=0, atol=0.5)


# Networks of the user's own.


@pytest.mark.parametrize("name", ["nsf-own", "realnvp-own", "realnvp-images-own", "glow-images-own"])
def test_a_flow_of_own_networks_is_made_of_them(name):
    flow = FLOWS[name][1](5)
    networks = [m for m in flow.modules() if isinstance(m, OwnNetwork | OwnConv)]
    couplings = [m for m in flow.modules() if hasattr(m, "conditioner")]
    assert [coupling.conditioner for coupling in couplings] == networks


class Bare(nn.Module):
    """A conditioner without layers."""

    def __init__(self, inputs, outputs, context):
        super().__init__()
        self.weight = nn.Parameter(1e-3 * torch.randn(inputs, outputs))

    def forward(self, x, context):
        return x @ self.weight


@pytest.mark.parametrize("own", [False, True])
def test_the_biases_of_a_splines_last_layer_start_as_the_identity(own):
    network = (lambda i, o, c: Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))) if own else None
    coupling = NSF(4, network=network).transform.transforms[1]
    *_, last = (layer for layer in coupling.modules() if isinstance(layer, nn.Linear))
    x = torch.randn(500, 4)
    assert 0.01 < (coupling(x)[0] - x).abs().max() < 1.5
    nn.init.zeros_(last.weight)
    y, logdet = coupling(x)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(logdet, torch.zeros(500), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_network_whose_last_layer_is_not_to_be_found_stays_as_it_is(lazy):
    network = (lambda i, o, c: Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(o))) if lazy else Bare
    flow, x = NSF(4, network=network), torch.randn(500, 4)
    y, _ = flow.transform.transforms[1](x)
    assert (y - x).abs().max() < 2.5
    torch.testing.assert_close(flow.transform.inverse(flow.transform(x)[0])[0], x, rtol=0, atol=1e-3)


class Sequential(nn.Sequential):
    def forward(self, x, context):
        return super().forward(x)


@pytest.mark.parametrize("coupling", [AffineCoupling, AdditiveCoupling, SplineCoupling])
def test_a_network_of_the_wrong_size_is_refused(coupling):
    with pytest.raises(ValueError, match=r"the conditioner must return \(N, \d+\), got \(7, 5\)"):
        coupling(Sequential(nn.Linear(2, 5)), split=2)(torch.randn(7, 4))


def test_networks_that_cannot_be_made_are_refused():
    for call in (lambda: NSF(4, hidden=(8, 9)), lambda: NSF(4, hidden=()), lambda: NSF(4, hidden=8)):
        with pytest.raises(SettingsError, match="hidden must be one positive width for each block"):
            call()
    with pytest.raises(SettingsError, match="channels must be one width unless the network is residual"):
        Glow((1, 4, 4), channels=(8, 8))
    with pytest.raises(SettingsError, match="coupling must be one of affine, additive"):
        Glow(4, coupling="spline")
    with pytest.raises(SettingsError, match="scales must be at least 1, got 0"):
        RealNVP((1, 4, 4), scales=0)
    with pytest.raises(SettingsError, match="hidden must be at least one positive width"):
        MAF(3, hidden=())
    with pytest.raises(ValueError, match="either split= or mask="):
        AffineCoupling(MLPConditioner(2, 4))


# With the rest of PyTorch.


@every_flow
def test_a_density_compiles_and_exports(name):
    flow, c = made(name, 5, torch.float32), given(5, 6, dtype=torch.float32)
    x = torch.randn(6, *shape_of(name))
    wanted = flow.log_prob(x, *c)
    exported = torch.export.export(Density(flow), (x, *c)).module()
    torch.testing.assert_close(exported(x, *c), wanted, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(flow.log_prob, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *c), wanted, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


class Density(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context):
        return self.flow.log_prob(x, context)


@pytest.mark.parametrize("name", ["nsf", "maf", "realnvp-images"])
def test_reversible_flows_have_the_gradients_of_ordinary_ones(name):
    plain, memory_free = made(name, 5), made(name, 5, reversible=True)
    memory_free.load_state_dict(plain.state_dict())
    x, (c,) = torch.randn(6, *shape_of(name), dtype=torch.float64), given(5, 6)
    found = []
    for flow in (plain, memory_free):
        flow(c).log_prob(x).sum().backward()
        found.append([p.grad for p in flow.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@every_flow
@with_and_without_context
def test_hessians_are_those_of_torch_func_reversible_or_not(name, context):
    plain, memory_free = made(name, context), made(name, context, reversible=True)
    x, c = torch.randn(2, *shape_of(name), dtype=torch.float64), given(context, 2)
    wanted = torch.func.hessian(lambda z: plain.log_prob(z, *c).sum())(x)
    for flow in (plain, memory_free):
        found = torch.autograd.functional.hessian(lambda z, flow=flow: flow.log_prob(z, *c).sum(), x)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@every_flow
@pytest.mark.parametrize("reversible", [False, True])
def test_scores_hessians_and_gradients_of_each_example_are_those_of_a_loop(name, reversible):
    flow = made(name, 5, reversible=reversible)
    x, (c,) = torch.randn(3, *shape_of(name), dtype=torch.float64), given(5, 3)

    def of_one(weights, x, c):
        return torch.func.functional_call(Density(flow), weights, (x[None], c[None]))[0]

    weights = {f"flow.{key}": p.detach() for key, p in flow.named_parameters()}
    for of in (
        torch.func.grad(of_one),
        torch.func.grad(of_one, argnums=1),
        torch.func.hessian(of_one, argnums=1),
    ):
        found = torch.vmap(of, in_dims=(None, 0, 0))(weights, x, c)
        each = [of(weights, *one) for one in zip(x, c, strict=True)]
        wanted = torch.utils._pytree.tree_map(lambda *several: torch.stack(several), *each)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


@every_flow
@with_and_without_context
def test_a_flow_is_made_and_trained_in_the_default_type(name, context):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        flow = FLOWS[name][1](context)
        assert all(p.dtype is torch.float64 for p in flow.parameters())
        density = flow.log_prob(torch.randn(6, *shape_of(name)), *given(context, 6))
        assert density.dtype is torch.float64
        density.sum().backward()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("features", [2, 3, 5])
def test_no_feature_of_a_spline_flow_is_left_alone_whatever_the_seed(features):
    for seed in range(30):
        torch.manual_seed(seed)
        flow = NSF(features, transforms=3, hidden=(8,))
        moved = torch.zeros(features, dtype=torch.bool)
        place = torch.arange(features)  # which feature stands where
        for transform in flow.transform.transforms:
            if hasattr(transform, "order"):
                place = place[transform.order]
            else:
                moved[place[features // 2 :]] = True
        assert moved.all()
