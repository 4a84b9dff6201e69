"""Ways between latents."""

import torch
from torch import Tensor


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Points (steps, N, D) on the arcs from a to b, (N, D) each, at ``weights`` (steps,) from 0 to 1."""
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(-1, 1)
    angle, t = torch.acos(cosine)[:, None], weights[:, None, None]
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(torch.sin(angle).abs() < 1e-4, torch.lerp(a, b, t), arc)
