"""What a trained model is used for: scores, codes, larger pictures, compressed files, programs for other runtimes."""

from genfuse.applications._coder import Coder as Coder
from genfuse.applications._coder import Exact as Exact
from genfuse.applications._codes import encode as encode
from genfuse.applications._codes import interpolate as interpolate
from genfuse.applications._codes import reconstruct as reconstruct
from genfuse.applications._compress import Compressed as Compressed
from genfuse.applications._compress import compress as compress
from genfuse.applications._compress import decompress as decompress
from genfuse.applications._examples import Examples as Examples
from genfuse.applications._examples import examples as examples
from genfuse.applications._examples import labels_of as labels_of
from genfuse.applications._export import export as export
from genfuse.applications._export import verbs_of as verbs_of
from genfuse.applications._score import METHODS as METHODS
from genfuse.applications._score import detection as detection
from genfuse.applications._score import find_method as find_method
from genfuse.applications._score import score as score
from genfuse.applications._score import scores as scores
from genfuse.applications._score import weights as weights
from genfuse.applications._upscale import pictures as pictures
from genfuse.applications._upscale import read_picture as read_picture
from genfuse.applications._upscale import scale as scale
from genfuse.applications._upscale import upscale as upscale
