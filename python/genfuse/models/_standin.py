import torch
from torch import nn


def gradient_penalty(critic, real, fake=None, y=None, *, target=1.0, one_sided=False, at="interpolated"):
    with torch.enable_grad():
        if at == "real":
            x = real
        else:
            eps = torch.rand(len(real), *[1] * (real.ndim - 1), dtype=real.dtype, device=real.device)
            x = torch.lerp(real, fake, eps)
        x = x.detach().requires_grad_(True)
        out = critic(x) if y is None else critic(x, y)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        excess = gradient.flatten(1).norm(dim=1) - target
        return (excess.clamp(min=0) if one_sided else excess).square().mean()


class WithLabels(nn.Module):
    def __init__(self, network, planes):
        super().__init__()
        self.network, self.planes = network, planes

    def forward(self, x, y):
        if self.planes:
            return self.network(torch.cat([x, y[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1))
        return self.network(torch.cat([x.flatten(1), y], 1))
