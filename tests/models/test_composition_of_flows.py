"""The flows under torch.func: per-sample gradients, ensembles, tangents and curvature of log_prob."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import genfuse

SMALL = {
    "realnvp": {"layers": 2, "hidden": (8,)},
    "maf": {"layers": 2, "hidden": (8,)},
    "iaf": {"layers": 2, "hidden": (8,)},
    "nsf": {"layers": 2, "hidden": (8, 8), "bins": 4},
    "nsf-ar": {"layers": 2, "hidden": (8,), "bins": 4},
    "planar": {"layers": 3},
    "radial": {"layers": 3},
}


@pytest.fixture(params=SMALL)
def model(request):
    data = genfuse.load_data("toy:moons")
    model = genfuse.create(request.param, data, **SMALL[request.param]).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # flows begin as the identity, which hides mistakes
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def x():
    return torch.randn(6, 2, dtype=torch.float64)


def log_prob(model, x):
    """As a function of parameters and one example."""
    module = Scored(model)
    return lambda parameters, one: functional_call(module, parameters, (one[None],)).squeeze(0)


class Scored(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.log_prob(x)


def test_per_sample_gradients_are_those_of_one_example_at_a_time(model, x):
    parameters = {n: p.detach() for n, p in Scored(model).named_parameters()}
    ours = vmap(grad(log_prob(model, x)), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        loss = model.log_prob(one[None]).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        for a, b in zip(ours.values(), found, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-7, atol=1e-9)


def test_an_ensemble_by_stacked_parameters_is_its_models(model, x):
    models = [Scored(copy.deepcopy(model)) for _ in range(3)]
    with torch.no_grad():
        for i, m in enumerate(models):
            for p in m.parameters():
                p.mul_(1 + 0.1 * i)
    parameters, buffers = stack_module_state(models)
    one = lambda p, b, x: functional_call(models[0], (p, b), (x,))  # noqa: E731
    ours = vmap(one, (0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(ours, torch.stack([m(x) for m in models]), rtol=1e-7, atol=1e-9)


def test_tangents_jacobians_and_curvature_agree_with_reverse_mode(model, x):
    v = torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(leaf).sum(), leaf, create_graph=True)
    _, tangent = jvp(model.log_prob, (x,), (v,))
    torch.testing.assert_close(tangent, (gradient * v).sum(1), rtol=1e-7, atol=1e-9)
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(model.log_prob)(x).sum(1), gradient, rtol=1e-7, atol=1e-9)
    curvature = torch.autograd.grad((gradient * v).sum(), leaf)[0]
    ours = hessian(lambda x: model.log_prob(x).sum())(x)
    torch.testing.assert_close(torch.einsum("ijkl,ij->kl", ours, v), curvature, rtol=1e-6, atol=1e-8)


def test_a_density_is_exported_and_compiled_as_it_is(model, x):
    wanted = model.log_prob(x)
    torch.testing.assert_close(torch.export.export(Scored(model), (x,)).module()(x), wanted)
    torch.testing.assert_close(torch.compile(model.log_prob, backend="aot_eager", fullgraph=True)(x), wanted)
    torch._dynamo.reset()
