"""The models in plain PyTorch, as one writes them by hand: the same networks and losses, and autograd for the rest.

Each has its parameters, and its fixed orders of features, in the order in which genfuse's has them, so that `load` can
give it the same. `draw` makes the noise of a step, and `loss` takes it.
"""

import copy
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.operators import OPERATORS

_spline = OPERATORS["rational_quadratic_spline"].eager


class Plain(nn.Module):
    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        """The noise of a step on a batch like x."""
        return ()

    def after_step(self) -> None:
        """What follows an update."""

    def loss(self, x: Tensor, *noise: Tensor) -> Tensor:
        raise NotImplementedError


def load(plain: nn.Module, parameters: list[Tensor], model: nn.Module) -> None:
    """Give it the parameters of ours, and the orders of features."""
    orders = [value for name, value in model.named_buffers() if name.endswith((".order", ".signs"))]
    with torch.no_grad():
        for mine, other in zip(plain.parameters(), parameters, strict=True):
            mine.copy_(other)
        for mine, other in zip(plain.buffers(), orders, strict=bool(orders)):
            mine.copy_(other)


def mlp(*widths: int, activation: Any = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


class VAE(Plain):
    def __init__(self, cells: int, hidden: tuple[int, ...], latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder, self.decoder = mlp(cells, *hidden, 2 * latent), mlp(latent, *hidden[::-1], cells)

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.randn_like(x.new_empty(len(x), self.latent)),)

    def loss(self, x: Tensor, eps: Tensor) -> Tensor:  # type: ignore[override]
        x = x.flatten(1)
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.exp(0.5 * logvar) * eps
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
        return (F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum") + kl) / len(x)


class Critic(Plain):
    """The critic's loss of a WGAN-GP, or with ``r3gan`` of a GAN with relativistic scores, R1 and R2."""

    def __init__(self, cells: int, hidden: tuple[int, ...], latent: int, generator: nn.Module, r3gan: bool) -> None:
        super().__init__()
        self.critic = mlp(cells, *hidden[::-1], 1, activation=_leaky)
        fake = mlp(latent, *hidden, cells, activation=_leaky).requires_grad_(False)
        for mine, other in zip(fake.parameters(), generator.parameters(), strict=True):
            mine.copy_(other)
        self.fake, self.latent, self.r3gan = [fake], latent, r3gan  # a list: of these the critic has no parameters

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        z = torch.randn(len(x), self.latent, device=x.device)
        return (z,) if self.r3gan else (z, torch.rand(len(x), 1, device=x.device))

    def loss(self, x: Tensor, z: Tensor, *epsilon: Tensor) -> Tensor:  # type: ignore[override]
        real = 2 * x.flatten(1) - 1
        with torch.no_grad():
            fake = torch.tanh(self.fake[0](z))
        if self.r3gan:
            real.requires_grad_(), fake.requires_grad_()
            real_out, fake_out = self.critic(real), self.critic(fake)
            slopes = torch.autograd.grad(real_out.sum() + fake_out.sum(), (real, fake), create_graph=True)
            penalty = sum(slope.square().sum(1).mean() for slope in slopes) / 2
            return F.softplus(fake_out - real_out).mean() + penalty
        between = (epsilon[0] * real + (1 - epsilon[0]) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = ((slope.norm(2, dim=1) - 1) ** 2).mean()
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty


class ResidualNet(nn.Module):
    """Two blocks or more of two linear layers each, as of neural spline flows; a context is seen and gates."""

    def __init__(self, inputs: int, outputs: int, hidden: tuple[int, ...], context: int) -> None:
        super().__init__()
        width = hidden[0]
        self.first = nn.Linear(inputs + context, width)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)]) for _ in hidden)
        self.gates = nn.ModuleList(nn.Linear(context, width) for _ in hidden if context)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x if context is None else torch.cat([x, context], -1))
        for i, (first, second) in enumerate(self.blocks):  # type: ignore[misc]
            inner = second(torch.relu(first(torch.relu(h))))
            h = h + (inner if context is None else inner * torch.sigmoid(self.gates[i](context)))
        return self.last(h)


class ConvNet(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(inputs, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


class MADE(nn.Module):
    def __init__(self, features: int, hidden: tuple[int, ...], outputs: int, context: int, by_feature: bool) -> None:
        super().__init__()
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        first = 0 if context else 1
        each = torch.arange(features)
        last = each.repeat_interleave(outputs) if by_feature else each.repeat(outputs)
        degrees = [first + torch.arange(width) * (features - first) // width for width in hidden]
        pairs = zip([*degrees, last], [each + 1, *degrees], strict=True)
        self.masks = [(after[:, None] >= before).float() for after, before in pairs]
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise([features, *hidden, len(last)]))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = x.clamp(-5, 5)
        for i, (layer, mask) in enumerate(zip(self.layers, self.masks, strict=True)):
            h = F.linear(torch.relu(h) if i else h, layer.weight * mask, layer.bias)  # type: ignore[operator,arg-type]
            if i == 0 and self.context is not None:
                h = h + self.context(context)
        return h


class ActNorm(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        axes, cells = (slice(None), *[None] * (x.dim() - 2)), x[0, 0].numel()
        return x * self.log_scale.exp()[axes] + self.shift[axes], cells * self.log_scale.sum()


class LULinear(nn.Module):
    """W = L U P with a fixed permutation P, and signs of U's diagonal."""

    order: Tensor
    signs: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(features))
        self.register_buffer("signs", torch.ones(features))
        self.triangles = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        lower = self.triangles.tril(-1) + torch.eye(len(self.order), device=x.device)
        upper = self.triangles.triu(1) + torch.diag(self.signs * self.log_diagonal.exp())
        weight, logdet = lower @ upper, x[0, 0].numel() * self.log_diagonal.sum()
        if x.dim() == 2:
            return F.linear(x[:, self.order], weight, self.bias), logdet
        return F.conv2d(x[:, self.order], weight[:, :, None, None], self.bias), logdet


class Reverse(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(features))

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, float]:
        return x.flip(1), 0.0


def _softclip(raw: Tensor, largest: float) -> Tensor:
    return raw / (1 + (raw / largest).abs())


class Squeeze(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, float]:
        n, c, h, w = x.shape
        squares = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return squares.reshape(n, 4 * c, h // 2, w // 2), 0.0


class Leave(nn.Module):
    """Half of the channels leave, by a learned prior given the others, which go on through more layers."""

    def __init__(self, prior: nn.Module, rest: list[nn.Module], kept: int) -> None:
        super().__init__()
        self.prior, self.rest, self.kept = prior, nn.ModuleList(rest), kept

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, logdet = self.prior(x, context)
        z, left = x.tensor_split([self.kept], 1)
        for layer in self.rest:
            z, change = layer(z, context)
            logdet = logdet + change
        return torch.cat([z.flatten(1), left.flatten(1)], 1), logdet


class Coupling(nn.Module):
    """Of the first half, or with ``last`` of the last one: an affine map, or with ``bins`` a spline, of the rest."""

    def __init__(
        self, network: nn.Module, kept: int, *, last: bool = False, scale: str = "tanh", bins: int = 0,
        squash: bool = True, damping: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self.kept, self.last, self.scale, self.bins, self.squash = kept, last, scale, bins, squash
        self.damping = damping  # of raw widths and heights

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, moved = (x[:, -self.kept :], x[:, : -self.kept]) if self.last else x.tensor_split([self.kept], 1)
        seen = kept.asinh() if self.squash else kept
        if isinstance(self.network, ResidualNet):
            raw = self.network(seen, context)
        else:
            raw = self.network(seen if context is None else torch.cat([seen, context], -1))
        if self.bins:
            sizes, slopes = raw.unflatten(1, (moved.shape[1], -1)).tensor_split([2 * self.bins], 2)
            y, logdet = _spline(moved, torch.cat([sizes * self.damping, slopes], 2), bins=self.bins, bound=3.0)
        else:
            s, t = raw.chunk(2, 1)
            s = torch.tanh(s) if self.scale == "tanh" else _softclip(s, 2)
            y, logdet = moved * torch.exp(s) + t, s.flatten(1).sum(1)
        return torch.cat([y, kept] if self.last else [kept, y], 1), logdet


class Autoregressive(nn.Module):
    def __init__(self, features: int, hidden: tuple[int, ...], context: int, bins: int = 0) -> None:
        super().__init__()
        self.made = MADE(features, hidden, 3 * bins - 1 if bins else 2, context, by_feature=bins > 0)
        self.bins = bins

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raw = self.made(x, context)
        if self.bins:
            return _spline(x, raw.unflatten(1, (x.shape[1], -1)), bins=self.bins, bound=3.0)
        s, t = raw.chunk(2, -1)
        s = _softclip(s, 3)
        return x * torch.exp(s) + t, s.sum(-1)


class Flow(Plain):
    """Layers (x, context) -> (y, logdet), and N(0, I). With a context, a batch is x and the context side by side."""

    def __init__(self, layers: list[nn.Module], context: int = 0) -> None:
        super().__init__()
        self.layers, self.context = nn.ModuleList(layers), context

    def loss(self, x: Tensor, *noise: Tensor) -> Tensor:
        x, context = x.tensor_split([x.shape[1] - self.context], 1) if self.context else (x, None)
        logdet: Any = 0.0
        for layer in self.layers:
            x, change = layer(x, context)
            logdet = logdet + change
        z = x.flatten(1)
        return -(logdet - 0.5 * z.square().sum(-1) - 0.5 * z.shape[1] * math.log(2 * math.pi)).mean()


def realnvp(features: int, hidden: tuple[int, ...], layers: int, linear: bool = True, context: int = 0) -> Flow:
    """With linear layers and normalised activations as genfuse has it by default; without as the paper's."""
    kept, made = features // 2, []
    for i in range(layers):
        if linear:
            made += [ActNorm(features), LULinear(features)]
        network = mlp(kept + context, *hidden, 2 * (features - kept))
        scale = "softclip" if linear else "tanh"
        made.append(Coupling(network, kept, last=bool(i % 2) and not linear, scale=scale, squash=linear))
    return Flow(made, context)


def nsf(features: int, hidden: tuple[int, ...] = (128, 128), context: int = 0, layers: int = 5) -> Flow:
    kept, made = features // 2, []
    for _ in range(layers):
        network = ResidualNet(kept, 23 * (features - kept), hidden, context)
        made += [LULinear(features), Coupling(network, kept, bins=8, damping=hidden[-1] ** (-0.25 / 2))]
    return Flow([*made, LULinear(features)], context)


def maf(features: int, hidden: tuple[int, ...] = (256, 256), context: int = 0, layers: int = 5) -> Flow:
    made: list[nn.Module] = []
    for i in range(layers):
        made += [Reverse(features), ActNorm(features)] if i else []
        made.append(Autoregressive(features, hidden, context))
    return Flow(made, context)


def nsf_ar(features: int, hidden: tuple[int, ...] = (256, 256), context: int = 0, layers: int = 5) -> Flow:
    made: list[nn.Module] = []
    for _ in range(layers):
        made += [LULinear(features), Autoregressive(features, hidden, context, bins=8)]
    return Flow([*made, LULinear(features)], context)


def glow(channels: int, steps: int = 8, width: int = 32) -> Flow:
    """Of two scales."""

    def scale(channels: int) -> list[nn.Module]:
        made: list[nn.Module] = [Squeeze()]
        for _ in range(steps):
            network = ConvNet(channels // 2, channels, width)
            coupling = Coupling(network, channels // 2, scale="softclip", squash=False)
            made += [ActNorm(channels), LULinear(channels), coupling]
        return made

    prior = Coupling(ConvNet(2 * channels, 4 * channels, width), 2 * channels, scale="softclip", squash=False)
    return Flow([*scale(4 * channels), Leave(prior, scale(8 * channels), 2 * channels)])


class _Denoising(nn.Module):
    """Residual blocks of two linear layers, with the noise level's scale and shift between them."""

    def __init__(self, features: int, hidden: tuple[int, ...], waves: int = 16) -> None:
        super().__init__()
        width = hidden[0]
        self.frequencies = torch.logspace(math.log10(0.1), math.log10(4), waves)
        self.embedding = mlp(2 * waves, width, width, activation=nn.SiLU)
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)])
            for _ in hidden
        )
        self.last = nn.Linear(width, features)

    def forward(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        angles = log_sigma[:, None] * self.frequencies
        embedded = F.silu(self.embedding(torch.cat([angles.cos(), angles.sin()], -1)))
        h = self.first(x)
        for first, film, second in self.blocks:  # type: ignore[misc]
            scale, shift = film(embedded).chunk(2, -1)
            h = h + second(F.silu(first(F.silu(h)) * (1 + scale) + shift))
        return self.last(F.silu(h))


class Diffusion(Plain):
    """A network that predicts noise, or EDM's v, at noise levels drawn anew, and its moving average."""

    def __init__(self, network: nn.Module, model: Any) -> None:
        super().__init__()
        self.network, self.model = network, [model]  # a list: of ours are the noise levels alone
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        self.averaged = [torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=ema)]

    def draw(self, x: Tensor) -> tuple[Tensor, ...]:
        (model,) = self.model
        if hasattr(model, "sigma_of"):
            return model.sigma_of[torch.randint(model.timesteps, (len(x),), device=x.device)], torch.randn_like(x)
        return torch.exp(model.P_mean + model.P_std * torch.randn(len(x), device=x.device)), torch.randn_like(x)

    def loss(self, x: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:  # type: ignore[override]
        (model,) = self.model
        x = x if model.levels is None else 2 * x - 1
        x, s = x / model.denoiser.sigma_data, sigma / model.denoiser.sigma_data
        log_sigma, s = s.log(), s.view(-1, *[1] * (x.dim() - 1))
        alpha = (1 + s * s) ** -0.5
        target = eps if model.denoiser.predict == "noise" else alpha * (eps - s * x)
        return F.mse_loss(self.network(alpha * (x + s * eps), log_sigma), target)

    def after_step(self) -> None:
        self.averaged[0].update_parameters(self.network)


def ddpm(features: int, model: Any, hidden: tuple[int, ...] = (128, 128, 128)) -> Diffusion:
    return Diffusion(_Denoising(features, hidden), model)


class _GroupNorm(nn.GroupNorm):
    silu: bool

    def forward(self, h: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        h = F.group_norm(h, self.num_groups, self.weight, self.bias, self.eps)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
        return F.silu(h) if self.silu else h


def edm(model: Any) -> Diffusion:
    """Of genfuse's own U-Net with PyTorch's group normalisation and SiLU, in the memory format that is the default."""
    network = copy.deepcopy(model.denoiser.network)
    network.first.register_forward_pre_hook(lambda _, args: (args[0].clone(memory_format=torch.contiguous_format),))
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = _GroupNorm
    return Diffusion(network, model)
