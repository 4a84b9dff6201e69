"""WGAN-GP as one writes it in plain PyTorch: what ours is timed against."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def dcgan_critic(channels: int = 3, width: int = 64) -> nn.Sequential:
    """The critic of DCGAN (arXiv 1511.06434) for images of 32 x 32, without its batch norm."""
    layers: list[nn.Module] = []
    for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, 1))


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Improved Training of Wasserstein GANs (arXiv 1704.00028), equation 3, without its weight."""
    epsilon = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
    x = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
    out = critic(x)
    gradient = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True, retain_graph=True)[0]
    return ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


class PlainWGANGP(nn.Module):
    """100-256-256-784 and 784-256-256-1, LeakyReLU 0.2, images in [0, 1]."""

    def __init__(self, pixels: int = 784, hidden: int = 256, latent: int = 100) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(mlp(latent, hidden, hidden, pixels), nn.Sigmoid())
        self.critic = mlp(pixels, hidden, hidden, 1)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=1e-4, betas=(0.0, 0.9))

    def critic_step(self, real: Tensor) -> None:
        """One update of the critic by images (N, pixels)."""
        self.optimizer.zero_grad()
        fake = self.generator(torch.randn(len(real), self.latent, device=real.device)).detach()
        loss = self.critic(fake).mean() - self.critic(real).mean() + 10 * gradient_penalty(self.critic, real, fake)
        loss.backward()
        self.optimizer.step()
