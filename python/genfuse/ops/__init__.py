"""Fused operators for generative models. This package needs nothing but torch."""

from genfuse.ops import _philox
from genfuse.ops._actnorm import actnorm as actnorm
from genfuse.ops._affine_coupling import Scale as Scale
from genfuse.ops._affine_coupling import affine_coupling as affine_coupling
from genfuse.ops._autoregressive_inverse import autoregressive_inverse as autoregressive_inverse
from genfuse.ops._bernoulli import bernoulli as bernoulli
from genfuse.ops._bernoulli_nll import bernoulli_nll as bernoulli_nll
from genfuse.ops._diffuse import diffuse as diffuse
from genfuse.ops._gradient_norm_penalty import gradient_norm_penalty as gradient_norm_penalty
from genfuse.ops._gradient_penalty import gradient_penalty as gradient_penalty
from genfuse.ops._gradient_penalty import input_gradient as input_gradient
from genfuse.ops._gradient_penalty import scores_and_gradient as scores_and_gradient
from genfuse.ops._gradient_penalty import scores_and_penalty as scores_and_penalty
from genfuse.ops._group_norm import group_norm as group_norm
from genfuse.ops._interpolate import interpolate as interpolate
from genfuse.ops._layer import Network as Network
from genfuse.ops._layer import affine_layer as affine_layer
from genfuse.ops._layer import spline_layer as spline_layer
from genfuse.ops._lu_product import lu_affine as lu_affine
from genfuse.ops._lu_product import lu_factors as lu_factors
from genfuse.ops._lu_product import lu_product as lu_product
from genfuse.ops._mixed_log_prob import block_log_softmax as block_log_softmax
from genfuse.ops._mixed_log_prob import log_logistic as log_logistic
from genfuse.ops._mixed_log_prob import logistic_mixture as logistic_mixture
from genfuse.ops._mixed_log_prob import mixed_log_prob as mixed_log_prob
from genfuse.ops._mlp import mlp as mlp
from genfuse.ops._op import available as available
from genfuse.ops._op import build_info as build_info
from genfuse.ops._op import decompositions as decompositions
from genfuse.ops._op import fused as fused
from genfuse.ops._op import has_values as has_values
from genfuse.ops._op import implementations as implementations
from genfuse.ops._op import include as include
from genfuse.ops._op import transformed as transformed
from genfuse.ops._op import using as using
from genfuse.ops._rational_quadratic_spline import Settings as SplineSettings  # noqa: F401
from genfuse.ops._rational_quadratic_spline import rational_quadratic_spline as rational_quadratic_spline
from genfuse.ops._reparameterize_kl import kl_per_dimension as kl_per_dimension
from genfuse.ops._reparameterize_kl import reparameterize_kl as reparameterize_kl
from genfuse.ops._standard_normal_log_prob import standard_normal_log_prob as standard_normal_log_prob

philox = _philox  # the generator of the kernels' noise, in PyTorch
use, choices, info = using, implementations, build_info  # their former names
