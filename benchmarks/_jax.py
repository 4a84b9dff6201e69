"""The same losses in JAX, and their training step as one writes it: value_and_grad and Adam in one jit."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Loss = Callable[..., Any]  # (parameters, x, noise, ...) -> the mean loss; weights are (inputs, outputs)


def quiet() -> None:
    """Import JAX for the CPU alone, without its warnings."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("jax").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="jax")


def _mlp(layers: list[Any], x: Any, activation: Callable) -> Any:
    for i in range(0, len(layers), 2):
        x = (activation(x) if i else x) @ layers[i] + layers[i + 1]
    return x


def _leaky(x: Any) -> Any:
    import jax

    return jax.nn.leaky_relu(x, 0.2)


def vae(layers: int, latent: int) -> tuple[Loss, Callable]:
    """Of networks of so many layers each: the loss, and the noise of a step on a batch like x."""
    import jax
    import jax.numpy as jnp

    def loss(parameters: list[Any], x: Any, eps: Any) -> Any:
        encoder, decoder = parameters[: 2 * layers], parameters[2 * layers :]
        mu, logvar = jnp.split(_mlp(encoder, x, jax.nn.relu), 2, -1)
        logits = _mlp(decoder, mu + jnp.exp(0.5 * logvar) * eps, jax.nn.relu)
        reconstruction = (jax.nn.softplus(logits) - x * logits).sum(-1)
        return (reconstruction - 0.5 * (1 + logvar - mu**2 - jnp.exp(logvar)).sum(-1)).mean()

    return loss, lambda key, x: (jax.random.normal(key, (len(x), latent)),)


def critic(generator: Iterable[Tensor], latent: int) -> tuple[Loss, Callable]:
    import jax
    import jax.numpy as jnp

    fixed = arrays(generator)

    def loss(parameters: list[Any], x: Any, z: Any, epsilon: Any) -> Any:
        real, fake = 2 * x - 1, jnp.tanh(_mlp(fixed, z, _leaky))
        score = lambda x: _mlp(parameters, x, _leaky)[..., 0]  # noqa: E731
        slope = jax.grad(lambda x: score(x).sum())(epsilon * real + (1 - epsilon) * fake)
        penalty = ((jnp.sqrt((slope**2).sum(-1)) - 1) ** 2).mean()
        return score(fake).mean() - score(real).mean() + 10 * penalty

    def draw(key: Any, x: Any) -> tuple[Any, Any]:
        first, second = jax.random.split(key)
        return jax.random.normal(first, (len(x), latent)), jax.random.uniform(second, (len(x), 1))

    return loss, draw


def realnvp(features: int, couplings: int) -> tuple[Loss, Callable]:
    """Couplings of networks of three layers, which keep the first half and the last in turn."""
    import jax
    import jax.numpy as jnp

    half = features // 2

    def loss(parameters: list[Any], x: Any) -> Any:
        logdet = 0.0
        for i in range(couplings):
            kept, moved = (x[:, -half:], x[:, :-half]) if i % 2 else (x[:, :half], x[:, half:])
            s, t = jnp.split(_mlp(parameters[6 * i : 6 * i + 6], kept, jax.nn.relu), 2, -1)
            s = jnp.tanh(s)
            moved = moved * jnp.exp(s) + t
            x = jnp.concatenate([moved, kept] if i % 2 else [kept, moved], -1)
            logdet = logdet + s.sum(-1)
        return -(logdet - 0.5 * (x**2).sum(-1) - 0.5 * features * math.log(2 * math.pi)).mean()

    return loss, lambda key, x: ()


def arrays(parameters: Iterable[Tensor]) -> list[Any]:
    import jax.numpy as jnp

    return [jnp.asarray(p.detach().numpy().T.copy()) for p in parameters]


def loss_and_gradients(loss: Loss, parameters: Iterable[Tensor], *args: Tensor) -> tuple[Tensor, list[Tensor]]:
    """At these parameters and arguments, as PyTorch has them."""
    import jax

    value, found = jax.jit(jax.value_and_grad(loss))(arrays(parameters), *(each.numpy() for each in args))
    return torch.tensor(float(value)), [torch.tensor(np.asarray(each).T.copy()) for each in found]


def step(
    loss: Loss, draw: Callable, parameters: Iterable[Tensor], x: Tensor, rate: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A function that takes a step, and one that waits for the steps taken."""
    import jax
    import optax

    adam, weights, batch = optax.adam(rate), arrays(parameters), jax.device_put(x.numpy())

    def update(weights: Any, state: Any, key: Any, x: Any) -> tuple[Any, Any, Any]:
        key, mine = jax.random.split(key)
        _, gradients = jax.value_and_grad(loss)(weights, x, *draw(mine, x))
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(weights, updates), state, key

    compiled = jax.jit(update, donate_argnums=(0, 1, 2))
    now = [weights, adam.init(weights), jax.random.key(0)]

    def run() -> None:
        now[:] = compiled(*now, batch)

    return run, lambda: jax.block_until_ready(now)
