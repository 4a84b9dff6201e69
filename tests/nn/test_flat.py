import copy
import io

import pytest
import torch
from torch import nn

from genfuse.nn import EMA, Together, flatten


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def test_parameters_stay_what_they_are_and_lie_in_one_tensor():
    model, before = network(), network()
    names, parameters = list(model.state_dict()), list(model.parameters())
    (flat,) = flatten(model.parameters())
    assert list(model.state_dict()) == names
    assert all(now is was for now, was in zip(model.parameters(), parameters, strict=True))
    for now, was in zip(model.parameters(), before.parameters(), strict=True):
        assert type(now) is nn.Parameter
        assert now.requires_grad
        assert now.is_leaf
        assert torch.equal(now, was)
        assert now.data_ptr() % 64 == flat.data_ptr() % 64
    flat.zero_()
    assert not any(parameter.any() for parameter in model.parameters())
    assert flatten(model.parameters()) == []  # they are


def test_states_are_saved_and_loaded_as_ever():
    model, other = network(), network()
    flatten(model.parameters())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        model[0].weight.add_(1)
    model.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert model[0].weight.all()


def test_gradients_and_moves_are_as_ever():
    x = torch.randn(4, 3)
    model, plain = network(), network()
    flatten(model.parameters())
    for each in (model, plain):
        each(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.double()
    plain.double()
    assert torch.equal(model(x.double()), plain(x.double()))


def test_each_dtype_has_a_tensor_of_its_own():
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(5)]
    assert [(flat.dtype, float(flat.sum())) for flat in flatten(tensors)] == [(torch.float32, 8), (torch.float64, 2)]


def tied():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight.data = one.weight.data  # two parameters of one memory
    return [one.weight, two.weight]


@pytest.mark.parametrize(
    "tensors",
    [
        tied,
        lambda: [nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last))],
        lambda: [nn.Parameter(torch.ones(8)[2:5])],
        lambda: list(nn.LazyLinear(3).parameters()),
        lambda: [nn.Parameter(torch.ones(0))],
        lambda: [torch.eye(3).to_sparse()],
    ],
    ids=["tied", "channels last", "a view", "lazy", "empty", "sparse"],
)
def test_what_does_not_fit_is_left_alone(tensors):
    tensors = tensors()
    assert flatten(tensors) == []


def test_memory_that_an_array_shares_is_left_to_it():
    weight = nn.Parameter(torch.zeros(3))
    array = weight.detach().numpy()
    assert flatten([weight]) == []
    with torch.no_grad():
        weight.add_(1)
    assert array.tolist() == [1, 1, 1]


def test_tensors_are_seen_as_the_runs_that_lie_side_by_side():
    a, b, c, d = (torch.full((n,), float(n)) for n in (3, 16, 5, 2))
    assert Together([a, b]).merged()[1] is b
    flatten([a, b, c])
    seen = Together([a, b, d, c])
    assert [len(each) for each in seen.merged()] == [32, 2, 5]
    assert seen.merged()[1] is d
    for each in seen.merged():
        each.mul_(-1)
    assert [float(each[-1]) for each in (a, b, c, d)] == [-3, -16, -5, -2]
    assert [len(each) for each in Together([b, a]).merged()] == [16, 3]
    b.data = torch.zeros(16)  # moved since
    assert [len(each) for each in seen.merged()] == [3, 16, 2, 5]
    assert seen.merged()[1] is b


@pytest.mark.parametrize("laid_out", [True, False])
def test_a_moving_average_is_the_same_wherever_the_weights_lie(laid_out):
    model = network()
    average = EMA(model, 0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if laid_out:
        flatten(model.parameters())
    for n in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[1].running_mean.add_(1)
        if n == 4:  # found anew
            average.train()
            model[2].weight = nn.Parameter(torch.ones(2, 5))
        average.update(model)
        step = 1 - min((1 + n) / (10 + n), 0.9)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] += step * (tensor - expected[name])
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_copy_of_an_average_averages_its_own_weights():
    model = network()
    average = EMA(model, 0.5)
    flatten(model.parameters())
    average.update(model)
    twin = copy.deepcopy(average)
    with torch.no_grad():
        model[0].weight.fill_(7)
    kept = average.module[0].weight.clone()
    twin.update(model)
    assert torch.equal(average.module[0].weight, kept)
    assert not torch.equal(twin.module[0].weight, kept)


@pytest.mark.parametrize(
    "replace",
    [
        lambda net: net.load_state_dict({k: torch.full_like(v, 3) for k, v in net.state_dict().items()}, assign=True),
        lambda net: setattr(net, "0", nn.Linear(2, 2)),
        lambda net: setattr(net[1], "running_mean", torch.full((2,), 3.0)),
    ],
)
def test_an_average_moves_towards_what_has_replaced_weights_layers_and_buffers(replace):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = EMA(net, 0.5)
    average.update(net)
    replace(net)
    for _ in range(60):
        average.update(net)
    for ours, theirs in zip(average.module.state_dict().values(), net.state_dict().values(), strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs)


def test_an_average_takes_nothing_of_a_functional_call_along():
    net = nn.Linear(2, 2)
    average = EMA(net, 0.5)

    class Followed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            average.follow(self.net)

    torch.func.functional_call(Followed(), {"net.weight": torch.full((2, 2), 9.0)}, ())
    average.follow(net)
    assert torch.equal(average.module.weight, net.weight)
    average.update(net)
    assert torch.equal(average.module.weight, net.weight)
