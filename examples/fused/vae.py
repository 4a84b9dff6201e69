"""A variational autoencoder (arXiv 1312.6114) of scikit-learn's handwritten digits."""

import time

import torch
import torch.nn.functional as F
from genfuse import ops
from sklearn.datasets import load_digits
from torch import Tensor, nn


class VAE(nn.Module):
    """ReLU networks and a Bernoulli decoder on logits, of images (N, pixels) in [0, 1] that are binarized anew each
    time they are seen."""

    def __init__(self, pixels: int = 784, hidden: int = 256, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, pixels)
        )

    def loss(self, images: Tensor) -> Tensor:
        """Negative ELBO in nats, a mean per example."""
        x = ops.bernoulli(images)
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        z, kl = ops.reparameterize_kl(mu, logvar)
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return (reconstruction + kl.sum()) / len(x)


def train_epoch(model: VAE, optimizer: torch.optim.Optimizer, images: Tensor, batch_size: int = 128) -> float:
    """One pass over ``images`` (N, pixels) in [0, 1]. Returns the mean loss."""
    total = torch.zeros((), device=images.device)
    for index in torch.randperm(len(images), device=images.device).split(batch_size):
        optimizer.zero_grad()
        loss = model.loss(images[index])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(index)
    return (total / len(images)).item()


def main(epochs: int = 50) -> float:
    """Train, print and return the negative ELBO of images that the training does not see."""
    torch.manual_seed(0)
    train, test = torch.tensor(load_digits().data / 16, dtype=torch.float32).split([1500, 297])
    model = VAE(pixels=64, latent=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    start = time.perf_counter()
    for _ in range(epochs):
        train_epoch(model, optimizer, train)
    took = time.perf_counter() - start
    with torch.no_grad():
        nats = model.loss(test).item()
    print(f"{epochs} epochs in {took:.1f} s; negative ELBO of the test images {nats:.2f} nats")
    return nats


if __name__ == "__main__":
    main()
