"""Neural spline flows (arXiv 1906.04032): rational-quadratic splines, in couplings or autoregressive."""

from dataclasses import dataclass
from typing import Any

from genfuse import flows
from genfuse.errors import SettingsError
from genfuse.models._base import check_at_least
from genfuse.models._flow import FlowModel, NetworkConfig, one_per_block


@dataclass(frozen=True)
class _SplineConfig(NetworkConfig):
    layers: int = 5  # splines; before each, and after the last, there is a linear layer
    bins: int = 8  # of each spline
    bound: float = 3.0  # the splines are in [-bound, bound], and the identity outside
    damped: float = 0.0  # how slowly bins move: raw widths and heights are divided by the networks' width^(damped / 2)
    _positive = ("layers", "bins", "bound", "hidden")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins == 1:
            raise SettingsError("bins must be at least 2: of a spline with one bin nothing is left to learn; got 1")
        if self.bins > 1000:
            raise SettingsError(f"bins must be at most 1000, as each takes at least 1/1000 of the box; got {self.bins}")
        if not 0 <= self.damped <= 1:
            raise SettingsError(f"damped must be in [0, 1], got {self.damped}")

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "bins": self.bins, "bound": self.bound, "damped": self.damped}


@dataclass(frozen=True)
class NSFConfig(_SplineConfig):
    """Settings of a coupling spline flow, RQ-NSF (C). Raises SettingsError for values outside their range."""

    hidden: tuple[int, ...] = (128, 128)  # width of each residual block of a coupling's network, all the same
    damped: float = 0.25  # at 0 tables of few rows are overfitted sooner
    dropout: float = 0.0  # in each block

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, dropout=0, below=1)


@dataclass(frozen=True)
class NSFARConfig(_SplineConfig):
    """Settings of an autoregressive spline flow, RQ-NSF (AR). Raises SettingsError for values outside their range."""

    hidden: tuple[int, ...] = (256, 256)  # widths of each MADE's hidden layers


class NSF(FlowModel):
    """The flow `genfuse.flows.NSF`: splines in couplings, and linear layers by LU between them."""

    Config = NSFConfig
    flow_class = flows.NSF
    former = {"squash": False, "damped": True}

    @classmethod
    def current(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return one_per_block(super().current(settings), "hidden", 128, 2)


class NSFAR(FlowModel):
    """The flow `genfuse.flows.NSFAR`: each coordinate's spline is decided by the coordinates before it."""

    Config = NSFARConfig
    flow_class = flows.NSFAR
    former = {"squash": False, "damped": True}
