"""A RealNVP flow (arXiv 1605.08803) of scikit-learn's two moons."""

import math
import time

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn


class Coupling(nn.Module):
    """Scales and shifts the second half of the coordinates by what it makes of the first."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.split = features // 2
        self.conditioner = nn.Sequential(
            nn.Linear(self.split, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 2 * (features - self.split)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and log |det dy/dx| of each example."""
        s, t = self.conditioner(x[:, : self.split]).chunk(2, dim=-1)
        s = torch.tanh(s)
        return torch.cat([x[:, : self.split], x[:, self.split :] * torch.exp(s) + t], dim=-1), s.sum(dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        s, t = self.conditioner(y[:, : self.split]).chunk(2, dim=-1)
        return torch.cat([y[:, : self.split], (y[:, self.split :] - t) * torch.exp(-torch.tanh(s))], dim=-1)


class RealNVP(nn.Module):
    """Couplings with the order of the coordinates turned around before each, so that all of them are moved."""

    def __init__(self, features: int = 43, hidden: int = 256, couplings: int = 10) -> None:
        super().__init__()
        self.features = features
        self.couplings = nn.ModuleList(Coupling(features, hidden) for _ in range(couplings))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of each example of x (N, features)."""
        logdet = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, change = coupling(x.flip(-1))
            logdet = logdet + change
        return logdet - 0.5 * x.square().sum(dim=-1) - 0.5 * self.features * math.log(2 * math.pi)

    def loss(self, x: Tensor) -> Tensor:
        """Negative log-likelihood in nats, a mean per example."""
        return -self.log_prob(x).mean()

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        x = torch.randn(n, self.features)
        for coupling in reversed(self.couplings):
            x = coupling.inverse(x).flip(-1)
        return x


def main(steps: int = 1000) -> float:
    """Train, print and return the negative log-likelihood of points that the training does not see."""
    torch.manual_seed(0)
    points = torch.tensor(make_moons(12_000, noise=0.05, random_state=0)[0], dtype=torch.float32)
    train, test = points.split([10_000, 2_000])
    model = RealNVP(features=2, hidden=64, couplings=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(train[torch.randint(len(train), (256,))]).backward()
        optimizer.step()
    took = time.perf_counter() - start
    with torch.no_grad():
        nats = model.loss(test).item()
    bits = nats / math.log(2) / model.features
    print(f"{steps} steps in {took:.1f} s; log-likelihood of the test points {-nats:.3f} nats, {bits:.3f} bits/dim")
    return nats


if __name__ == "__main__":
    main()
