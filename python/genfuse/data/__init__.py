"""Data sets by name. Each split is tensors in memory, so that a batch is an index operation."""

from genfuse.data._dataset import COLUMNS as COLUMNS
from genfuse.data._dataset import READING as READING
from genfuse.data._dataset import READING_OF_IMAGES as READING_OF_IMAGES
from genfuse.data._dataset import Batch as Batch
from genfuse.data._dataset import Dataset as Dataset
from genfuse.data._dataset import Mixture as Mixture
from genfuse.data._dataset import Source as Source
from genfuse.data._dataset import Split as Split
from genfuse.data._dataset import augmented as augmented
from genfuse.data._dataset import kind_of as kind_of
from genfuse.data._dataset import load_data as load_data
from genfuse.data._dataset import resized as resized
from genfuse.data._schema import Column as Column
from genfuse.data._schema import Scaling as Scaling
from genfuse.data._schema import Schema as Schema
from genfuse.data._schema import joined as joined
from genfuse.data._schema import named as named
from genfuse.data._schema import names_in as names_in
from genfuse.data._schema import numbers as numbers
from genfuse.data._schema import stripped as stripped
from genfuse.data.tables import read_rows as read_rows
