"""The models: one readable file each, registered as plugins like anybody's."""

from genfuse.data import Batch as Batch
from genfuse.models._base import FACTS as FACTS
from genfuse.models._base import Codes as Codes
from genfuse.models._base import Decodes as Decodes
from genfuse.models._base import DrawsLatents as DrawsLatents
from genfuse.models._base import Encodes as Encodes
from genfuse.models._base import GenerativeModel as GenerativeModel
from genfuse.models._base import HasPosterior as HasPosterior
from genfuse.models._base import HasTrajectory as HasTrajectory
from genfuse.models._base import ModelConfig as ModelConfig
from genfuse.models._base import Player as Player
from genfuse.models._base import Reconstructs as Reconstructs
from genfuse.models._base import adam as adam
from genfuse.models._base import check_range as check_range
from genfuse.models._base import configure as configure
from genfuse.models._base import create as create
from genfuse.models._base import load as load
from genfuse.models._base import sample_in_parts as sample_in_parts
from genfuse.models._base import unfit as unfit
from genfuse.models._diffusion import DiffusionConfig as DiffusionConfig
from genfuse.models._diffusion import DiffusionModel as DiffusionModel
from genfuse.models._flow import FlowConfig as FlowConfig
from genfuse.models._flow import FlowModel as FlowModel
