"""The generative adversarial network (arXiv 1406.2661), with its later losses."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse.models._adversarial import AdversarialModel, Objective, PenaltyConfig
from genfuse.models._base import adam

Loss = Literal["non-saturating", "minimax", "hinge", "least-squares"]


# With D = sigmoid(out), -log D = softplus(-out) and -log(1 - D) = softplus(out), which never overflow.
OBJECTIVES: dict[str, Objective] = {
    "non-saturating": Objective(lambda out: F.softplus(-out), F.softplus, lambda out: F.softplus(-out)),
    "minimax": Objective(lambda out: F.softplus(-out), F.softplus, lambda out: -F.softplus(out)),
    # arXiv 1705.02894
    "hinge": Objective(lambda out: F.relu(1 - out), lambda out: F.relu(1 + out), torch.neg),
    # arXiv 1611.04076, equation 2 with b = c = 1, a = 0
    "least-squares": Objective(
        lambda out: (out - 1).square() / 2, lambda out: out.square() / 2, lambda out: (out - 1).square() / 2
    ),
}


@dataclass(frozen=True)
class GANConfig(PenaltyConfig):
    """Settings of a GAN. Raises SettingsError for values outside their range."""

    loss: Loss = "non-saturating"  # minimax: the value function for both; hinge and least-squares: on D without sigmoid

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(loss=Loss)


class GAN(AdversarialModel):
    """Generative adversarial network.

    With the losses non-saturating and minimax the discriminator minimises -E log D(x) - E log(1 - D(G(z))), which is at
    least...
    """

    Config = GANConfig
    config: GANConfig
    critic_name = "discriminator"
    optimizer = staticmethod(adam(2e-4, betas=(0.5, 0.999)))

    def __init__(self, config: GANConfig) -> None:
        super().__init__(config)
        self.objective = OBJECTIVES[config.loss]

    def critic_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The mean of D for real and generated examples: a probability with the losses on logits."""
        if self.config.loss in ("non-saturating", "minimax"):
            real, fake = real.sigmoid(), fake.sigmoid()
        return super().critic_terms(real, fake)
