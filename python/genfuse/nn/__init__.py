"""Building blocks of the models."""

from genfuse.nn._conv import ConvDecoder as ConvDecoder
from genfuse.nn._conv import conv_encoder as conv_encoder
from genfuse.nn._mlp import mlp as mlp
