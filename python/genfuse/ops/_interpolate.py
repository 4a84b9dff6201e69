import torch

from genfuse.ops import _op


def interpolate(real, fake, generator=None):
    _op.complain_unless_like(real, "real", fake=(fake, real.shape))
    e = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device, generator=generator)
    return torch.lerp(fake, real, e)
