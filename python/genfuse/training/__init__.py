"""Training: the loop over players, and the run folder that it leaves."""

from genfuse.nn import flatten as flatten
from genfuse.training.lean import lean as lean
from genfuse.training.run import History as History
from genfuse.training.run import Run as Run
from genfuse.training.trainer import Trainer as Trainer
