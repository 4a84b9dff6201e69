"""Normalizing flows as objects: transforms and a base make a distribution for each context."""

from genfuse.flows._flow import Flow as Flow
from genfuse.flows._flow import FlowDistribution as FlowDistribution
from genfuse.flows._flow import StandardNormal as StandardNormal
from genfuse.flows._ready_made import IAF as IAF
from genfuse.flows._ready_made import MAF as MAF
from genfuse.flows._ready_made import NSF as NSF
from genfuse.flows._ready_made import NSFAR as NSFAR
from genfuse.flows._ready_made import Conditioner as Conditioner
from genfuse.flows._ready_made import CouplingKind as CouplingKind
from genfuse.flows._ready_made import Glow as Glow
from genfuse.flows._ready_made import Planar as Planar
from genfuse.flows._ready_made import Radial as Radial
from genfuse.flows._ready_made import RealNVP as RealNVP
