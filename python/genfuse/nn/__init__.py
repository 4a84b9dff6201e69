"""Building blocks of the models."""

from genfuse.nn._autoregressive import MADE as MADE
from genfuse.nn._autoregressive import AutoregressiveAffine as AutoregressiveAffine
from genfuse.nn._autoregressive import AutoregressiveSpline as AutoregressiveSpline
from genfuse.nn._conv import ConvDecoder as ConvDecoder
from genfuse.nn._conv import conv_encoder as conv_encoder
from genfuse.nn._mlp import mlp as mlp
from genfuse.nn._transform import Composite as Composite
from genfuse.nn._transform import Inverse as Inverse
from genfuse.nn._transform import Transform as Transform
