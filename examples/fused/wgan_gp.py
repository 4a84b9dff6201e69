"""A Wasserstein GAN with gradient penalty (arXiv 1704.00028) of scikit-learn's handwritten digits."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch
from genfuse import ops
from sklearn.datasets import load_digits
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Equation 3 of the paper, without its weight."""
    return ops.gradient_penalty(critic, real, fake)


class WGANGP(nn.Module):
    """Generator and critic of images (N, pixels) in [0, 1]."""

    def __init__(self, pixels: int = 784, hidden: int = 256, latent: int = 100) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(mlp(latent, hidden, hidden, pixels), nn.Sigmoid())
        self.critic = mlp(pixels, hidden, hidden, 1)

    def fake(self, real: Tensor) -> Tensor:
        """As many images as ``real`` has."""
        return self.generator(torch.randn(len(real), self.latent, device=real.device))

    def critic_loss(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.fake(real)
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * gradient_penalty(self.critic, real, fake)

    def generator_loss(self, real: Tensor) -> Tensor:
        return -self.critic(self.fake(real)).mean()


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """How far two samples are apart: 0 in the limit where they are of one distribution."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def main(epochs: int = 100) -> float:
    """Train, print and return the distance of generated images to some that the training does not see."""
    torch.manual_seed(0)
    train, test = torch.tensor(load_digits().data / 16, dtype=torch.float32).split([1500, 297])
    model = WGANGP(pixels=64)
    critic = torch.optim.Adam(model.critic.parameters(), lr=5e-4, betas=(0.0, 0.9), fused=True)
    generator = torch.optim.Adam(model.generator.parameters(), lr=5e-4, betas=(0.0, 0.9), fused=True)
    start = time.perf_counter()
    for _ in range(epochs):
        for step, index in enumerate(torch.randperm(len(train)).split(64), start=1):
            update(model.critic_loss(train[index]), critic)
            if step % 5 == 0:
                update(model.generator_loss(train[index]), generator)
    took = time.perf_counter() - start
    with torch.no_grad():
        distance = energy_distance(model.fake(test), test)
    print(f"{epochs} epochs in {took:.1f} s; energy distance of samples to the test images {distance:.3f}")
    return distance


if __name__ == "__main__":
    main()
