"""Counter-based noise in plain PyTorch: the same numbers as the kernels make, on any device."""

import math
from typing import Any

import torch
from torch import Tensor, empty_like
from torch.compiler import is_dynamo_compiling as compiling
from torch.utils import _python_dispatch as modes

from genfuse.ops import _op

_SCALAR = torch.zeros((), dtype=torch.int64, device="cpu")
_LOWEST = -(2**63)  # of int64; random_ draws from here up to the highest


def seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A 64-bit seed, (), int64, drawn from the torch generator of the device of ``like``, where it stays: no
    synchronisation. Under torch.compile, tracers and modes it is the same draw, by an operator that they keep;
    Inductor's own generator would give another. Under vmap it follows vmap's ``randomness``."""
    mode, transformed = modes._is_in_torch_dispatch_mode, _op.transformed()
    if generator is None and (compiling() or mode) and not transformed:
        return torch.ops.genfuse.seed(like)
    return _draw(like, generator, mode or transformed)


def _draw(like: Tensor, generator: torch.Generator | None = None, by_operator: bool = False) -> Tensor:
    if by_operator:
        # With generator=None PyTorch picks an overload that tracers refuse.
        by: dict[str, Any] = {} if generator is None else {"generator": generator}
        drawn = torch.randint(_LOWEST, -_LOWEST - 1, (), dtype=torch.int64, device=like.device, **by)
        return drawn ^ _LOWEST  # random_ draws all 64 bits and adds nothing
    key = empty_like(_SCALAR) if like.is_cpu else empty_like(_SCALAR, device=like.device)
    return key.random_(_LOWEST, None) if generator is None else key.random_(_LOWEST, None, generator=generator)


def takes(seed: Tensor | None, given: Tensor | None, shape: tuple, dtype: torch.dtype) -> tuple:
    """What a seed, or noise that is given in its place, must be, for `fused`."""
    if (seed is None) == (given is None):
        raise ValueError("either a seed or noise must be given, and not both")
    return ((), torch.int64), (shape, dtype)


_op.define_random("seed(Tensor like) -> Tensor", _draw, fake=lambda like: like.new_empty((), dtype=torch.int64))


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011) of 64-bit counters, int64, under a 64-bit key: four words each, int64."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter & mask, (counter >> 32) & mask, torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key & mask, (key >> 32) & mask
    for _ in range(10):
        # A product of two words fits 64 bits; that int64 calls the top one a sign changes no bit.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((b >> 32) & mask) ^ c1 ^ k0, b & mask, ((a >> 32) & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniforms in (0, 1), float64: element i is (word + 0.5) / 2^32 of word i % 4 of counter i // 4."""
    n = math.prod(shape)
    words = torch.stack(philox(torch.arange((n + 3) // 4, device=key.device), key), dim=-1)
    return ((words.double() + 0.5) * 2.0**-32).reshape(-1)[:n].reshape(shape)


def normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals by Box-Muller: sqrt(-2 ln u) (cos, sin)(2 pi v) of each two neighbours u, v of the uniforms."""
    n = math.prod(shape)
    u, v = uniform(key, (n + n % 2,)).view(-1, 2).unbind(-1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.reshape(-1)[:n].reshape(shape).to(dtype)
