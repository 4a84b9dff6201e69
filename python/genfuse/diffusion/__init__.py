"""Diffusion with any network: a denoiser, and samplers, schedules and likelihoods as functions of one."""

from genfuse.diffusion import likelihood as likelihood
from genfuse.diffusion import samplers as samplers
from genfuse.diffusion import schedules as schedules
from genfuse.diffusion.denoiser import Denoiser as Denoiser
from genfuse.diffusion.denoiser import drop_rows as drop_rows
from genfuse.diffusion.denoiser import straight as straight
from genfuse.diffusion.denoiser import variance_preserving as variance_preserving
