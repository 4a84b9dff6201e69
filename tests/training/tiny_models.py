"""Small models that a package of a third party could bring, and what the tests run in processes of their own."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import genfuse
from genfuse.data import Split
from genfuse.models import GenerativeModel, Player, adam


@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (1, 8, 8)
    width: int = 16
    seconds_per_step: float = 0.0


class Tiny(GenerativeModel):
    """A denoiser with all that a checkpoint must not forget: noise, dropout, running statistics, a frozen weight."""

    Config = Config

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Sequential(
            nn.Linear(64, config.width), nn.BatchNorm1d(config.width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 64)
        )
        self.frozen = nn.Parameter(torch.ones(64), requires_grad=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def loss(self, batch, player="model"):
        time.sleep(self.config.seconds_per_step)
        x = batch.x.flatten(1)
        error = (self.net(x + 0.1 * torch.randn_like(x)) * self.frozen - x).square().sum(1).mean()
        size = 1e-3 * self.net[0].weight.square().sum()
        return error + size, {"error": error, "size": size}

    def after_step(self, player):
        self.updates += 1

    def sample(self, n, *, generator=None):
        return torch.rand(n, *self.config.shape, generator=generator)


class Slope(Tiny):
    """One whose loss changes by as much in every step: falling, or on examples that are held out rising."""

    rising = False
    usual_steps = 130

    def __init__(self, config):
        super().__init__(config)
        self.at = nn.Parameter(torch.tensor(5.0))

    def players(self):
        return [Player("model", [self.at], lambda parameters: torch.optim.SGD(parameters, lr=1e-2))]

    def loss(self, batch, player="model"):
        return (self.at if self.training or not self.rising else 10 - self.at), {}


class Duel(GenerativeModel):
    """A Wasserstein GAN with weight clipping (arXiv 1701.07875), small."""

    Config = Config

    def __init__(self, config):
        super().__init__(config)
        self.generator = nn.Linear(4, 64)
        self.critic = nn.Linear(64, 1)
        self.history = []

    def players(self):
        momentum = lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.5)  # noqa: E731
        return [
            Player("critic", self.critic.parameters(), momentum, steps=2),
            Player("generator", self.generator.parameters(), adam(1e-3, betas=(0.5, 0.9))),
        ]

    def loss(self, batch, player):
        fake = self.critic(self.generator(torch.randn(len(batch.x), 4))).mean()
        if self.training:
            wanted = {
                name: all(p.requires_grad for p in getattr(self, name).parameters()) for name in ("critic", "generator")
            }
            self.history.append((player, wanted))
        if player == "generator":
            return -fake, {"fake": fake}
        real = self.critic(batch.x.flatten(1)).mean()
        return fake - real, {"fake": fake, "real": real}

    @torch.no_grad()
    def after_step(self, player):
        if player == "critic":
            for weight in self.critic.parameters():
                weight.clamp_(-0.05, 0.05)

    def sample(self, n, *, generator=None):
        return self.generator(torch.randn(n, 4, generator=generator)).view(n, 1, 8, 8).sigmoid()


class Plain(GenerativeModel):
    """Without noise, so that its training depends on nothing but the order of the examples."""

    Config = Config

    def __init__(self, config):
        super().__init__(config)
        self.mean = nn.Parameter(torch.zeros(64))
        self.seen = []

    def players(self):
        return [Player("model", self.parameters(), lambda parameters: torch.optim.SGD(parameters, lr=0.1))]

    def loss(self, batch, player="model"):
        if self.training:
            self.seen.append(batch)
        error = (batch.x.flatten(1) - self.mean).square().sum(1).mean()
        return error, {"error": error}

    def sample(self, n, *, generator=None):
        return self.mean.expand(n, 64).view(n, 1, 8, 8)


def validated(data):
    """The same data with a validation split: the last 300 examples of the training split."""
    train = data.splits["train"]
    parts = {"train": slice(None, -300), "validation": slice(-300, None)}
    held_out = {part: Split(train.x[rows], train.y[rows]) for part, rows in parts.items()}
    return replace(data, splits={**data.splits, **held_out})


def train(name, out, settings=None, **options):
    """What the tests run in a process of their own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = validated(genfuse.load_data("digits"))
    model = genfuse.create(name, data, **(settings or {}))
    resume = Path(out, "config.json").exists()
    options = {"device": "cpu", "pictures": False, **options}
    try:
        genfuse.Trainer(out=out, resume=resume, **options).fit(model, data)
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":  # under torchrun: a whole run, and one in two parts
    import sys

    name, out = sys.argv[1:]
    data = validated(genfuse.load_data("digits"))
    keep = "last" if name == "duel" else "best"
    for folder, parts in (("whole", (2,)), ("parts", (1, 2))):
        for epochs in parts:
            torch.manual_seed(0)
            model = genfuse.create(name, data)
            options = {"device": "cpu", "batch_size": 64, "pictures": False, "keep": keep, "resume": epochs > parts[0]}
            run = genfuse.Trainer(epochs=epochs, out=Path(out, folder), **options).fit(model, data)
        torch.save(model.state_dict(), Path(out, f"{folder}-{os.environ['RANK']}.pt"))


class Staged(GenerativeModel):
    """Codes first, from where the data says, and then what decodes them."""

    Config = Config

    def __init__(self, config):
        super().__init__(config)
        self.codes, self.head = nn.Parameter(torch.zeros(4, 64)), nn.Linear(64, 64)
        self.seen, self.trained = [], []

    def players(self):
        return [Player("codes", [self.codes], adam()), Player("head", self.head.parameters(), adam())]

    def prepare(self, batches):
        assert not torch.is_grad_enabled()
        for batch in batches:
            self.seen.append(batch.x)
            if len(self.seen) == 2:
                break
        self.codes.copy_(self.seen[0].flatten(1)[:4])

    def turn(self, step, steps):
        return "codes" if step < steps // 3 else "head"

    def loss(self, batch, player):
        self.trained += [player] * self.training
        x = batch.x.flatten(1)
        nearest = self.codes[torch.cdist(x, self.codes).argmin(1)]
        return ((nearest if player == "codes" else self.head(nearest.detach())) - x).square().sum(1).mean(), {}
