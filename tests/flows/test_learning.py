"""What flows are used for: densities given a context, and reverse KL in plain PyTorch and in Pyro."""

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from genfuse.flows import IAF, MAF, NSF, RealNVP

# theta ~ N(0, I), x = A theta + noise of this variance: p(theta | x) is a Gaussian, known in closed form.
A = torch.tensor([[1.0, 0.5], [-0.4, 1.2], [0.8, 0.8]])
NOISE = 0.25


def simulate(n):
    theta = torch.randn(n, 2)
    return theta, theta @ A.T + NOISE**0.5 * torch.randn(n, 3)


def posterior(x):
    covariance = torch.linalg.inv(torch.eye(2) + A.T @ A / NOISE)
    return MultivariateNormal(x @ A @ covariance / NOISE, covariance)


class Embedding(nn.Module):
    """Makes 8 features of x, and is trained with the flow."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NSF(2, 8, transforms=2, hidden=(32,), embedding=Embedding()),
        lambda: MAF(2, 3, transforms=2, hidden=(64,)),
        lambda: RealNVP(2, 8, transforms=4, hidden=(64,), embedding=Embedding()),
    ],
    ids=["nsf", "maf", "realnvp"],
)
def test_the_posterior_of_a_linear_gaussian_model_is_found(make):
    torch.manual_seed(0)
    flow, steps = make(), 600
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        theta, x = simulate(256)
        loss = -flow(x).log_prob(theta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    theta, x = simulate(2000)
    with torch.no_grad():
        found, exact = flow(x).log_prob(theta), posterior(x).log_prob(theta)
        assert 0 <= (exact - found).mean() + 0.01 < 0.06  # nats, the mean of KL(p(theta | x) || flow) over x
        x = torch.tensor([[1.0, -0.5, 2.0], [0.0, 0.0, 0.0]])
        draws = flow(x).sample((20_000,))
    wanted = posterior(x)
    torch.testing.assert_close(draws.mean(0), wanted.mean, rtol=0, atol=0.1)
    for i in range(2):
        torch.testing.assert_close(draws[:, i].T.cov(), wanted.covariance_matrix[i], rtol=0, atol=0.02)


TARGET = MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))


def test_reverse_kl_is_minimised_by_draws_with_their_density():
    torch.manual_seed(0)
    flow = IAF(2, transforms=2, hidden=(32,), actnorm=False)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(250):
        x, log_q = flow().rsample_and_log_prob((256,))
        loss = (log_q - TARGET.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    draws = flow().sample((20_000,))
    found = MultivariateNormal(draws.mean(0), draws.T.cov())
    assert kl_divergence(found, TARGET) < 0.02


def test_pyro_takes_a_flow_as_guide_and_as_model():
    pyro = pytest.importorskip("pyro")
    from pyro.contrib.zuko import ZukoToPyro

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    flow = IAF(2, transforms=2, hidden=(32,), actnorm=False)

    def model():
        pyro.sample("z", pyro.distributions.MultivariateNormal(TARGET.loc, TARGET.covariance_matrix))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", ZukoToPyro(flow()))

    elbo = pyro.infer.Trace_ELBO(num_particles=64, vectorize_particles=True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    for _ in range(250):
        loss = svi.step()
    assert abs(loss) < 0.1
    draws = flow().sample((20_000,))
    torch.testing.assert_close(draws.mean(0), TARGET.loc, rtol=0, atol=0.1)

    conditional = MAF(2, 3, hidden=(8,)).eval()

    def observed(x, c):
        with pyro.plate("rows", len(c)):
            pyro.sample("x", ZukoToPyro(conditional(c)), obs=x)

    x, c = torch.randn(5, 2), torch.randn(5, 3)
    trace = pyro.poutine.trace(observed).get_trace(x, c)
    torch.testing.assert_close(trace.log_prob_sum(), conditional.log_prob(x, c).sum())
