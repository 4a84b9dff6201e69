import copy

import pytest
import torch

from genfuse.nn import EMA, DenoisingMLP, UNet


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (2, 1, 1), (1, 1, 9), (3, 32, 17)], ids=str)
@pytest.mark.parametrize("attention", [(), (0, 2)], ids=str)
def test_images_of_any_size_keep_it(shape, attention):
    network = UNet(shape[0], (8, 16, 16), attention=attention, context=3)
    x = torch.randn(2, *shape)
    out = network(x, torch.tensor([-3.0, 2.0]), torch.eye(3)[:2])
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    "make", [lambda: UNet(2, (8, 8), attention=(1,), context=3), lambda: DenoisingMLP(24, (16, 16, 16), context=3)]
)
def test_an_example_depends_on_its_own_noise_level_and_context_alone(make):
    network = make().eval()
    x, log_sigma, context = torch.randn(4, 2, 3, 4), torch.tensor([-3.0, -1.0, 0.0, 2.0]), torch.eye(4)[:, :3]
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn_like(p)
        whole = network(x, log_sigma, context)
        each = torch.cat([network(x[i : i + 1], log_sigma[i : i + 1], context[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(whole, each, rtol=1e-4, atol=1e-5)
        assert (network(x, log_sigma + 1, context) - whole).abs().flatten(1).amax(1).min() > 1e-4
        assert (network(x, log_sigma, 1 - context) - whole).abs().flatten(1).amax(1).min() > 1e-4


def test_transforms_of_torch_func_give_what_a_loop_gives():
    network = UNet(2, (4, 4), attention=(1,), context=3).double().eval()
    x, context, weights = torch.randn(3, 2, 3, 4).double(), torch.eye(3).double(), dict(network.named_parameters())
    with torch.no_grad():
        for p in weights.values():
            p += 0.1 * torch.randn_like(p)
    weights = {name: p.detach() for name, p in weights.items()}

    def of_one(weights, x, context):
        log_sigma = torch.zeros(1, dtype=torch.float64)
        return torch.func.functional_call(network, weights, (x[None], log_sigma, context[None])).square().sum()

    for of in (torch.func.grad(of_one), torch.func.grad(of_one, argnums=1), torch.func.hessian(of_one, argnums=1)):
        found = torch.vmap(of, in_dims=(None, 0, 0))(weights, x, context)
        each = [of(weights, *one) for one in zip(x, context, strict=True)]
        wanted = torch.utils._pytree.tree_map(lambda *several: torch.stack(several), *each)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    hessian = torch.autograd.functional.hessian(lambda x: of_one(weights, x, context[0]), x[0])
    torch.testing.assert_close(hessian, wanted[0], rtol=1e-8, atol=1e-9)


def test_attention_sees_the_whole_image():
    network = UNet(1, (8,), attention=(0,))
    x = torch.randn(1, 1, 24, 24, requires_grad=True)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn_like(p)
    network(x, torch.zeros(1))[0, 0, 0, 0].backward()
    assert x.grad[0, 0, -1, -1] != 0


def test_the_average_is_exponential_with_a_decay_that_grows():
    network = torch.nn.Linear(2, 2)
    average = EMA(network, 0.6)
    expected = network.weight.detach().clone()
    for n in range(1, 20):
        with torch.no_grad():
            network.weight += 1
        average.update(network)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average.module.weight, expected)
    assert not any(p.requires_grad for p in average.parameters())


def test_the_average_goes_on_from_its_state_bit_for_bit():
    network = torch.nn.Linear(2, 2)
    average = EMA(network, 0.99)
    average.update(torch.nn.Linear(2, 2))
    other = EMA(network, 0.99)
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    nxt = torch.nn.Linear(2, 2)
    for each in (average, other):
        each.update(nxt)
    assert torch.equal(average.module.weight, other.module.weight)
    assert torch.equal(average(torch.ones(1, 2)), other(torch.ones(1, 2)))
