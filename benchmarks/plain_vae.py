"""The VAE as one writes it in plain PyTorch: what `genfuse.Trainer` is timed against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainVAE(nn.Module):
    """Auto-Encoding Variational Bayes (arXiv 1312.6114): 784-256-256-20, ReLU, Bernoulli decoder on logits."""

    def __init__(self, pixels: int = 784, hidden: int = 256, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, pixels)
        )

    def loss(self, x: Tensor) -> Tensor:
        """Negative ELBO in nats, a mean per example, of binary images (N, pixels)."""
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (reconstruction + kl) / len(x)


def train_epoch(model: PlainVAE, optimizer: torch.optim.Optimizer, images: Tensor, batch_size: int = 128) -> float:
    """One pass over ``images`` (N, pixels) in [0, 1], binarized anew for each batch. Returns the mean loss."""
    model.train()
    total = torch.zeros((), device=images.device)
    for index in torch.randperm(len(images), device=images.device).split(batch_size):
        x = torch.bernoulli(images[index])
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(x)
    return (total / len(images)).item()
