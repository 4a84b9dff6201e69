"""A denoiser of any network: D(x, sigma) = E[x0 | x0 + sigma eps = x], with eps ~ N(0, I).

DDPM, EDM, score matching and flow matching all learn it: the network F sees x = x0 + sigma eps scaled by c_in and
predicts a target, from which D follows (arXiv 2206.00364, section 5 and table 1).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.nn.likelihoods import at_least_float32
from genfuse.ops import diffuse

Predict = Literal["noise", "x0", "v", "velocity"]


def variance_preserving(s: Any) -> Any:
    """alpha(s) = 1 / sqrt(1 + s^2), so that alpha^2 + (alpha s)^2 = 1: DDPM's and EDM's. A number or a tensor."""
    return (1 + s * s) ** -0.5


def straight(s: Any) -> Any:
    """alpha(s) = 1 / (1 + s), that of flow matching's (1 - t) x0 + t eps with s = t / (1 - t). A number or a tensor."""
    return 1 / (1 + s)


class Denoiser(nn.Module):
    """D(x, sigma) of a network F, by its preconditioning (arXiv 2206.00364, equation 7):

        D(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))

    The network is called as ``network(x, log_sigma)`` or ``network(x, log_sigma, context)``, with x scaled by c_in,
    (N, *shape), and log_sigma = c_noise, (N,), and returns (N, *shape). With s = sigma / sigma_data it is trained on
    x_t = alpha(s) (x0 / sigma_data + s eps), for one of the targets

        predict     target                   c_skip         c_out
        "noise"     eps                      1              -sigma
        "x0"        x0 / sigma_data          0              sigma_data
        "v"         alpha (eps - s x0 / sigma_data)
                                             1 / (1 + s^2)  -sigma / (alpha (1 + s^2))
        "velocity"  eps - x0 / sigma_data    1 / (1 + s)    -sigma / (1 + s)

    and c_in = alpha(s) / sigma_data, c_noise = log s. The defaults are EDM's preconditioning but for the sign of F:

        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),    c_out = -sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
        c_in = 1 / sqrt(sigma^2 + sigma_data^2)

    Args:
        network: F, any module.
        predict: what it predicts.
        sigma_data: the standard deviation of the data, by which the network's input and target are scaled.
        alpha: a function of s, a number or a tensor: `variance_preserving` or `straight`, say.
        embedding: makes the context, (N, C), that the network is given, of what `forward` and `loss` are given, such as
            labels (N,); None gives it to the network as it is.
        context_dropout: share of the contexts that `loss` replaces by zeros in training, which guidance needs.

    Raises SettingsError for another `predict`, a sigma_data that is not above 0, and, when it is called, for a sigma
    that is not, or a network that returns another shape than that of its input.
    """

    def __init__(
        self,
        network: nn.Module,
        predict: Predict = "v",
        sigma_data: float = 0.5,
        *,
        alpha: Callable[[Any], Any] = variance_preserving,
        embedding: nn.Module | None = None,
        context_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if predict not in get_args(Predict):
            raise SettingsError(f"predict must be one of {', '.join(get_args(Predict))}, got {predict!r}")
        if not 0 < sigma_data < math.inf:
            raise SettingsError(f"sigma_data must be above 0 and finite, got {sigma_data}")
        self.network = network
        self.predict = predict
        self.sigma_data = sigma_data
        self.alpha = alpha
        self.embedding = embedding
        self.context_dropout = context_dropout

    def c_skip(self, sigma: Any) -> Any:
        """The weight of x in D, of a number or tensor of noise levels."""
        s = sigma / self.sigma_data
        return {"noise": 1.0, "x0": 0.0, "v": 1 / (1 + s * s), "velocity": 1 / (1 + s)}[self.predict]

    def c_out(self, sigma: Any) -> Any:
        """The weight of F in D, of a number or tensor of noise levels."""
        s = sigma / self.sigma_data
        if self.predict == "x0":
            return self.sigma_data
        return -sigma * (self.c_skip(sigma) / self.alpha(s) if self.predict == "v" else self.c_skip(sigma))

    def c_in(self, sigma: Any) -> Any:
        """The scale of the network's input, of a number or tensor of noise levels."""
        return self.alpha(sigma / self.sigma_data) / self.sigma_data

    def c_noise(self, sigma: Any) -> Any:
        """What the network is given for the noise level: log(sigma / sigma_data), of a number or a tensor."""
        s = sigma / self.sigma_data
        if isinstance(s, Tensor):
            return s.log()
        if s <= 0:
            raise SettingsError(f"sigma must be above 0, got {sigma}")
        return math.log(s)

    def forward(
        self, x: Tensor, sigma: float | Tensor, context: Tensor | None = None, *, guidance: float = 1.0
    ) -> Tensor:
        """D(x, sigma), (N, *shape), for x (N, *shape) and sigma, one number or (N,).

        ``guidance`` w leads away from what is denoised without a context, a context of zeros: D_0 + w (D_context - D_0)
        (arXiv 2207.12598). It takes a second evaluation of the network unless it is 1.
        """
        return self._denoise(x, sigma, self.embed(context, x), guidance)

    def given(self, context: Tensor, *, guidance: float = 1.0) -> Callable[[Tensor, float | Tensor], Tensor]:
        """D for one context, as a function (x, sigma) that samplers take; the context is embedded once."""
        return partial(self._denoise, context=self.embed(context), guidance=guidance)

    def _denoise(self, x: Tensor, sigma: float | Tensor, context: Tensor | None, guidance: float) -> Tensor:
        predicted = self.prediction(x, sigma, context)  # (N, *shape)
        if context is not None and guidance != 1:
            predicted = torch.lerp(self.prediction(x, sigma, torch.zeros_like(context)), predicted, guidance)
        sigma = _against(sigma, x)
        return self.c_skip(sigma) * x + self.c_out(sigma) * predicted.to(x.dtype)

    def prediction(self, x: Tensor, sigma: float | Tensor, context: Tensor | None = None) -> Tensor:
        """F(c_in x, c_noise), (N, *shape): what the network predicts, for a context as `embed` makes it."""
        return self._network(x * self.c_in(_against(sigma, x)), sigma, context)

    def _network(self, x_t: Tensor, sigma: float | Tensor, context: Tensor | None) -> Tensor:
        c_noise = self.c_noise(sigma)
        c_noise = c_noise.expand(len(x_t)) if isinstance(c_noise, Tensor) else x_t.new_full((len(x_t),), c_noise)
        predicted: Tensor = self.network(x_t, c_noise, *([] if context is None else [context]))
        if predicted.shape != x_t.shape:
            raise SettingsError(
                f"the network must return as much as its input, {tuple(x_t.shape)}; it returned "
                f"{tuple(predicted.shape)}"
            )
        return predicted

    def score(
        self, x: Tensor, sigma: float | Tensor, context: Tensor | None = None, *, guidance: float = 1.0
    ) -> Tensor:
        """The gradient of log p(x; sigma), (N, *shape), where p is the density of x0 + sigma eps: (D - x) / sigma^2."""
        return (self(x, sigma, context, guidance=guidance) - x) / _against(sigma, x) ** 2

    def loss(self, x0: Tensor, sigma: float | Tensor, context: Tensor | None = None) -> Tensor:
        """The mean over examples and cells of (F - target)^2, a scalar without unit, for examples x0 (N, *shape).

        ``sigma`` is one number or (N,), drawn as the model says. It is the mean of |D - x0|^2 / c_out^2, EDM's weights
        (arXiv 2206.00364, section 5). Noise is drawn from torch's generator of x0's device, and so is which contexts
        are dropped.
        """
        context = self.embed(context, x0)
        if context is not None and self.training:
            context = drop_rows(context, self.context_dropout)
        s = sigma / self.sigma_data
        alpha = self.alpha(s)
        x0 = x0 if self.sigma_data == 1 else x0 / self.sigma_data
        x_t, target = diffuse(x0, alpha, s * alpha, target=self.predict)
        return (at_least_float32(self._network(x_t, sigma, context)) - target).square().mean()

    def embed(self, context: Tensor | None, like: Tensor | None = None) -> Tensor | None:
        """What the network is given, (N, C), in the dtype of ``like``: what `embedding`, if any, makes of a context."""
        if context is None or self.embedding is None:
            return context
        embedded: Tensor = self.embedding(context)
        return embedded if like is None else embedded.to(like.dtype)


def drop_rows(context: Tensor, share: float) -> Tensor:
    """The context, (N, ...), with a share of its rows, drawn anew, replaced by zeros: no context."""
    if not share:
        return context
    kept = torch.rand_like(context.flatten(1)[:, 0]) >= share  # (N,)
    return context * _against(kept, context)


def _against(value: Any, x: Tensor) -> Any:
    """A number, or a tensor (N,) as (N, 1, ..., 1), which goes with x, (N, *shape)."""
    return value.view(-1, *[1] * (x.dim() - 1)) if isinstance(value, Tensor) else value
