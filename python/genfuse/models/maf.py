"""Masked autoregressive flow (arXiv 1705.07057) and inverse autoregressive flow (arXiv 1606.04934)."""

from dataclasses import dataclass

from genfuse import flows
from genfuse.models._flow import FlowModel, NetworkConfig
from genfuse.ops import Scale


@dataclass(frozen=True)
class MAFConfig(NetworkConfig):
    """Settings of an autoregressive flow. Raises SettingsError for values outside their range."""

    layers: int = 5  # each a MADE; the order of the coordinates is reversed between two
    hidden: tuple[int, ...] = (256, 256)  # widths of each MADE's hidden layers
    scale: Scale = "softclip"  # how the log-scales are bounded
    actnorm: bool = True  # normalise activations between layers, where the paper has batch normalisation
    _positive = ("layers", "hidden")


class MAF(FlowModel):
    """The flow `genfuse.flows.MAF`: the density takes one pass, and sampling one sweep over the hidden units."""

    Config = MAFConfig
    former = {"squash": False, "scale": "tanh"}
    flow_class = flows.MAF


class IAF(MAF):
    """The flow `genfuse.flows.IAF`: sampling is the direct pass, and the density takes the sweep."""

    flow_class = flows.IAF
