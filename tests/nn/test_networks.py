import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import genfuse
from genfuse import ops
from genfuse.nn import ActNorm, AffineCoupling, Composite, ConvDecoder, LULinear, MLPConditioner, conv_encoder, mlp

SHAPES = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (3, 33, 20), (1, 1, 9), (2, 7, 1), (4, 1, 1), (1, 5, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels", [(6,), (4, 6, 8)], ids=str)
def test_the_convolutional_pair_takes_images_of_any_size(shape, channels):
    x = torch.rand(3, *shape)
    h = conv_encoder(shape, channels, (10,), 6)(x)
    assert h.shape == (3, 6)
    params = ConvDecoder(6, (10,), channels, shape, 2)(torch.stack([h, h]))
    assert params.shape == (2, 3, *shape, 2)
    torch.testing.assert_close(params[0], params[1])


def test_the_decoder_takes_a_single_latent():
    assert ConvDecoder(6, (10,), (4,), (3, 5, 7))(torch.randn(6)).shape == (3, 5, 7, 1)


def test_cells_read_the_channels_of_their_parameters():
    decoder = ConvDecoder(2, (), (3,), (2, 4, 4), 5)
    channels = decoder.layers(z := torch.randn(1, 2))
    assert torch.equal(decoder(z)[0, 1, :, :, 3], channels[0, 1 * 5 + 3])


def test_two_sizes_make_one_linear_layer():
    layers = mlp([3, 4])
    assert [type(layer) for layer in layers] == [nn.Linear]
    assert [type(layer) for layer in mlp([3, 4, 5])] == [nn.Linear, nn.ReLU, nn.Linear]


def flow_of_vectors(name, **settings):
    model = genfuse.create(name, shape=(5,), levels=None, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


FEW = {"layers": 2}
FLOWS = [
    ("realnvp", FEW), ("realnvp", {"network": "mlp", **FEW}), ("nsf", {"dropout": 0.5, **FEW}), ("maf", FEW),
    ("iaf", FEW), ("nsf-ar", FEW), ("glow", {"steps": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), FLOWS)
def test_hooks_of_a_flows_inner_layers_are_called_and_change_nothing(name, settings):
    model, layers = flow_of_vectors(name, **settings)
    x, seen = torch.randn(6, 5).double(), set()
    expected = model.log_prob(x)
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: seen.add(layer))
    torch.testing.assert_close(model.log_prob(x), expected)
    assert seen == set(layers)
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "settings"), FLOWS)
def test_layers_whose_hooks_make_their_weights_are_trained_and_sampled(name, settings):
    """Those of torch.nn.utils.prune are of that kind."""
    model, layers = flow_of_vectors(name, **settings)
    x = torch.randn(6, 5).double()
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=0.3)
    (-model.log_prob(x).mean()).backward()
    with torch.no_grad():
        for layer in layers:
            layer.weight_orig -= 0.1 * layer.weight_orig.grad
    pruned = model.log_prob(x)
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=1e-6, atol=1e-6)
    for layer in layers:
        prune.remove(layer, "weight")
    torch.testing.assert_close(pruned, model.log_prob(x))


@pytest.mark.parametrize(("name", "settings"), FLOWS)
def test_layers_whose_weights_are_parametrized_use_what_these_make(name, settings):
    model, layers = flow_of_vectors(name, **settings)
    other, x = copy.deepcopy(model), torch.randn(6, 5).double()
    others = [layer for layer in other.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, plain in zip(layers, others, strict=True):
            parametrizations.weight_norm(layer)
            layer.parametrizations.weight.original0 *= 1.5
            plain.weight *= 1.5
    torch.testing.assert_close(model.log_prob(x), other.log_prob(x))
    torch.testing.assert_close(model.decode(model.encode(x)), x, rtol=1e-6, atol=1e-6)


def test_a_last_layer_of_another_kind_is_called():
    conditioner, x = MLPConditioner(2, 4), torch.randn(6, 4)
    coupling = AffineCoupling(conditioner, split=2)
    expected = coupling(x)
    conditioner.last = nn.Sequential(conditioner.last, nn.Identity())
    torch.testing.assert_close(coupling(x), expected)


def test_layers_with_a_forward_of_their_own_are_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(6, 3)
    network = mlp((3, 4, 1))
    torch.testing.assert_close(network(x), network[2](torch.relu(network[0](x))))
    by_class, by_instance = copy.deepcopy(network), copy.deepcopy(network)
    by_class[0].__class__ = Doubled
    by_instance[0].forward = lambda x: 2 * F.linear(x, by_instance[0].weight, by_instance[0].bias)
    expected = network[2](torch.relu(2 * network[0](x)))
    torch.testing.assert_close(by_class(x), expected)
    torch.testing.assert_close(by_instance(x), expected)

    conditioner = MLPConditioner(3, 4, hidden=(8, 8))
    conditioner.layers[0][1] = nn.Tanh()
    first, _, second = conditioner.layers[0]
    expected = conditioner.last(torch.relu(second(torch.tanh(first(x)))))
    torch.testing.assert_close(conditioner(x), expected)
    torch.testing.assert_close(AffineCoupling(conditioner, split=3)(F.pad(x, (0, 2)))[0][:, 3:], expected[:, 2:])


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_critic_with_a_forward_of_its_own_is_called(where):
    class Tripled(type(mlp((1, 1)))):
        def forward(self, x):
            return 3 * super().forward(x)

    plain = mlp((3, 8, 1)).double()
    critic = Tripled(*plain) if where == "class" else type(plain)(*plain)
    if where == "instance":
        critic.forward = lambda x: 3 * plain(x)
    x, y = torch.randn(2, 6, 3).double()

    def of(critic):
        return ops.scores_and_penalty(critic, x, y, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(of(critic), of(lambda x: 3 * plain(x)))


def test_a_linear_map_with_a_forward_of_its_own_is_called_after_actnorm():
    class Shifted(LULinear):
        def forward(self, x, context=None):
            y, logdet = super().forward(x, context)
            return y + 1, logdet

    torch.manual_seed(0)
    plain = LULinear(3)
    shifted = Shifted(3)
    shifted.load_state_dict(plain.state_dict())
    norm, x = ActNorm(3), torch.randn(6, 3)
    y, _ = Composite([norm, plain])(x)
    torch.testing.assert_close(Composite([norm, shifted])(x)[0], y + 1)


def test_a_coupling_that_makes_raw_parameters_of_its_own_keeps_to_them():
    class Still(AffineCoupling):
        def raw(self, x, context):
            return 0 * super().raw(x, context)

    x = torch.randn(6, 4)
    torch.testing.assert_close(Still(MLPConditioner(2, 4), split=2)(x), (x, torch.zeros(6)))


def test_hooks_of_all_modules_see_inner_layers():
    network, seen = mlp((3, 4, 1)), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(layer))
    try:
        network(torch.randn(2, 3))
    finally:
        handle.remove()
    assert {network[0], network[1], network[2]} <= set(seen)
