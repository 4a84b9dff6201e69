"""The generative adversarial network (arXiv 1406.2661), with its later losses."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfuse.errors import SettingsError
from genfuse.models._adversarial import AdversarialModel, Penalty, PenaltyConfig
from genfuse.models._adversarial import Objective as Objective
from genfuse.models._base import adam

Loss = Literal["non-saturating", "minimax", "hinge", "least-squares", "relativistic"]


# With D = sigmoid(out), -log D = softplus(-out) and -log(1 - D) = softplus(out), which never overflow.


def minus_log_d(out: Tensor) -> Tensor:
    """-log D in nats, (N,), of the critic's output (N,)."""
    return F.softplus(-out)


def minus_log_one_minus_d(out: Tensor) -> Tensor:
    """-log(1 - D) in nats, (N,), of the critic's output (N,)."""
    return F.softplus(out)


def log_one_minus_d(out: Tensor) -> Tensor:
    """log(1 - D) in nats, (N,): the minimax loss of the generator (arXiv 1406.2661, equation 1)."""
    return -F.softplus(out)


def hinge_real(out: Tensor) -> Tensor:
    """max(0, 1 - f), (N,), for real examples (arXiv 1705.02894)."""
    return F.relu(1 - out)


def hinge_fake(out: Tensor) -> Tensor:
    """max(0, 1 + f), (N,), for generated ones (arXiv 1705.02894)."""
    return F.relu(1 + out)


def squares_to_one(out: Tensor) -> Tensor:
    """(f - 1)^2 / 2, (N,) (arXiv 1611.04076, equation 2)."""
    return (out - 1).square() / 2


def squares_to_zero(out: Tensor) -> Tensor:
    """f^2 / 2, (N,) (arXiv 1611.04076, equation 2)."""
    return out.square() / 2


OBJECTIVES: dict[str, Objective] = {
    "non-saturating": Objective(minus_log_d, minus_log_one_minus_d, minus_log_d),
    "minimax": Objective(minus_log_d, minus_log_one_minus_d, log_one_minus_d),
    "hinge": Objective(hinge_real, hinge_fake, torch.neg),  # arXiv 1705.02894
    # arXiv 1611.04076, equation 2 with b = c = 1, a = 0
    "least-squares": Objective(squares_to_one, squares_to_zero, squares_to_one),
    # softplus of minus the difference to the other kind's, for each (arXiv 1807.00734; 2501.05441, equation 1)
    "relativistic": Objective(minus_log_d, torch.zeros_like, minus_log_d, relativistic=True),
}


@dataclass(frozen=True)
class GANConfig(PenaltyConfig):
    """Settings of a GAN. Raises SettingsError for values outside their range."""

    # minimax: the value function for both; hinge and least-squares: on D without sigmoid; relativistic: on differences;
    # auto: relativistic for images, vectors and tables, non-saturating for real numbers of other shapes
    loss: Literal["auto", Loss] = "auto"
    # as of wgan-gp; r1r2: r1, and the same at generated examples; auto: r1r2 where auto made the loss relativistic
    penalty: Literal["auto", Penalty] = "auto"  # type: ignore[assignment]
    penalty_weight: float = 1.0  # lambda; r1, r1r2: gamma

    def __post_init__(self) -> None:
        r3gan = self.loss == "auto" and (self.levels is not None or self.vectors)  # arXiv 2501.05441
        if self.penalty == "auto":
            object.__setattr__(self, "penalty", "r1r2" if r3gan else "none")
        if self.loss == "auto":
            object.__setattr__(self, "loss", "relativistic" if r3gan else "non-saturating")
        super().__post_init__()


class GAN(AdversarialModel):
    """Generative adversarial network (arXiv 1406.2661) of any generator and discriminator: see `AdversarialModel`.

    With the objectives non-saturating and minimax the discriminator minimises -E log D(x) - E log(1 - D(G(z))), nats,
    with D = sigmoid(critic). For samples of density q and data of density p the best is D = p / (p + q), where this is
    log 4 - 2 JS(p, q), with the Jensen-Shannon divergence JS of at least 0 (section 4.1). So the generator, which
    minimises what the discriminator maximises, -log 4 + 2 JS(p, q), makes q = p: then D = 1/2 everywhere, and the
    discriminator's loss is log 4 = 1.386. The non-saturating generator minimises -E log D(G(z)) in its place, which has
    the same fixed point, and a gradient while the discriminator is still sure (section 3).

    ``objective`` is one of `OBJECTIVES` by name, or an `Objective`. The other arguments are those of
    `AdversarialModel`. Raises SettingsError for values outside their range.
    """

    Config = GANConfig
    critic_name = "discriminator"

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return adam(2e-4, betas=(0.5, 0.999))(parameters)

    def __init__(
        self, generator: nn.Module, critic: nn.Module, objective: Loss | Objective = "non-saturating", **options: Any
    ) -> None:
        if isinstance(objective, str):
            if objective not in OBJECTIVES:
                raise SettingsError(
                    f"objective must be an Objective or one of {', '.join(OBJECTIVES)}, got {objective!r}"
                )
            objective = OBJECTIVES[objective]
        super().__init__(generator, critic, objective, **options)

    def critic_terms(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """The mean of D for real and generated examples: a probability with the objectives on logits."""
        if self.objective in (OBJECTIVES["non-saturating"], OBJECTIVES["minimax"]):
            real, fake = real.sigmoid(), fake.sigmoid()
        return super().critic_terms(real, fake)
