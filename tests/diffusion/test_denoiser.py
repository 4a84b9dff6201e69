"""A denoiser around any network: EDM's table 1, each target's D, contexts, guidance, copies, graphs."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from genfuse.diffusion import Denoiser, straight, variance_preserving
from genfuse.errors import SettingsError
from genfuse.nn import EMA

PREDICTS = {"noise": variance_preserving, "x0": variance_preserving, "v": variance_preserving, "velocity": straight}
every_target = pytest.mark.parametrize("predict", PREDICTS)


class Network(nn.Module):
    """A small one, whose context is optional."""

    def __init__(self, context=0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 + context, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x, log_sigma, context=None):
        given = [] if context is None else [context]
        return self.layers(torch.cat([x, log_sigma[:, None], *given], -1))


class Oracle(nn.Module):
    """Predicts what D(x) = c2 / (c2 + sigma^2) x, of data N(0, c2), implies."""

    def __init__(self, predict, c2, sigma_data, alpha):
        super().__init__()
        self.settings = predict, c2, sigma_data, alpha

    def forward(self, x_t, log_sigma):
        predict, c2, sigma_data, alpha = self.settings
        s = log_sigma[:, None].exp()
        x, sigma = x_t / alpha(s), s * sigma_data  # x in units of sigma_data
        x0 = c2 / (c2 + sigma**2) * x
        eps = (x - x0) / s
        return {"noise": eps, "x0": x0, "v": alpha(s) * (eps - s * x0), "velocity": eps - x0}[predict]


@pytest.mark.parametrize("alpha", [variance_preserving, straight])
@pytest.mark.parametrize("sigma_data", [1.0, 0.3])
@every_target
def test_the_denoiser_and_score_of_a_gaussian_follow_from_what_is_predicted(predict, sigma_data, alpha):
    denoiser = Denoiser(Oracle(predict, 0.7, sigma_data, alpha), predict, sigma_data, alpha=alpha)
    x = torch.randn(4, 2, dtype=torch.float64)
    for sigma in (0.02, 0.9, 30.0):
        for given in (sigma, torch.full((4,), sigma).double(), torch.tensor(sigma).double()):
            torch.testing.assert_close(denoiser(x, given), 0.7 / (0.7 + sigma**2) * x)
            torch.testing.assert_close(denoiser.score(x, given), -x / (0.7 + sigma**2), rtol=1e-6, atol=1e-9)


def test_the_coefficients_of_the_default_are_edm_s_but_for_the_sign_of_the_network():
    denoiser, d = Denoiser(Network()), 0.5
    for sigma in (0.002, 0.5, 80.0):
        both = sigma**2 + d**2
        assert denoiser.sigma_data == d
        assert denoiser.c_skip(sigma) == pytest.approx(d**2 / both)
        assert denoiser.c_out(sigma) == pytest.approx(-sigma * d / math.sqrt(both))
        assert denoiser.c_in(sigma) == pytest.approx(1 / math.sqrt(both))
        assert denoiser.c_noise(sigma) == pytest.approx(math.log(sigma / d))


@every_target
def test_the_loss_is_the_denoiser_s_error_over_c_out_squared(predict):
    torch.manual_seed(0)
    denoiser = Denoiser(Network(), predict, 0.5, alpha=PREDICTS[predict]).double()
    x0, sigma = torch.randn(20_000, 2, dtype=torch.float64), torch.rand(20_000, dtype=torch.float64) + 0.3
    noisy = x0 + sigma[:, None] * torch.randn_like(x0)
    expected = ((denoiser(noisy, sigma) - x0) / torch.as_tensor(denoiser.c_out(sigma[:, None]))).square()
    torch.testing.assert_close(denoiser.loss(x0, sigma), expected.mean(), rtol=0.05, atol=0)


def test_contexts_are_embedded_dropped_in_training_alone_and_led_towards():
    torch.manual_seed(0)
    denoiser = Denoiser(Network(4), embedding=nn.Embedding(3, 4), context_dropout=0.5)
    x, y, sigma = torch.randn(6, 2), torch.arange(6) % 3, torch.full((6,), 0.8)
    free, towards = denoiser(x, 0.8, y, guidance=0.0), denoiser(x, 0.8, y)
    torch.testing.assert_close(denoiser(x, 0.8, y, guidance=2.5), free + 2.5 * (towards - free))
    torch.testing.assert_close(denoiser.given(y, guidance=2.5)(x, 0.8), denoiser(x, sigma, y, guidance=2.5))
    seen = []
    denoiser.network.register_forward_hook(lambda module, inputs, out: seen.append(inputs[2]))
    for mode in (True, False):
        denoiser.train(mode).loss(x.repeat(500, 1), 0.8, y.repeat(500))
    assert float((seen[0] == 0).all(1).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(seen[1], denoiser.embedding(y.repeat(500)))
    denoiser.loss(x, sigma, y).backward()
    assert all(p.grad is not None for p in denoiser.parameters())


def test_a_network_of_no_context_is_called_with_two_arguments():
    class Two(nn.Module):
        def forward(self, x, log_sigma):
            return x * log_sigma[:, None]

    assert Denoiser(Two())(torch.ones(3, 2), 0.5).shape == (3, 2)


@every_target
def test_a_denoiser_pickles_copies_compiles_and_exports(predict):
    denoiser = Denoiser(Network(), predict, alpha=PREDICTS[predict]).eval()
    x, sigma = torch.randn(4, 2), torch.rand(4) + 0.1
    expected = denoiser(x, sigma)
    others = [copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser)), EMA(denoiser, 0.9)]
    others += [torch.compile(denoiser, backend="eager", fullgraph=True)]
    others += [torch.export.export(denoiser, (x, sigma)).module()]
    for other in others:
        torch.testing.assert_close(other(x, sigma), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict": "eps"}, "predict must be one of noise, x0, v, velocity, got 'eps'"),
        ({"sigma_data": 0.0}, "sigma_data must be above 0 and finite, got 0.0"),
    ],
)
def test_settings_that_make_no_denoiser_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        Denoiser(Network(), **settings)
