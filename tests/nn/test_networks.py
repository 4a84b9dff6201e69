import pytest
import torch
from torch import nn

from genfuse.nn import ConvDecoder, conv_encoder, mlp

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
