"""``python -m genfuse`` is ``genfuse``, also under torchrun: ``torchrun --nproc-per-node 2 -m genfuse train ...``."""

import sys

from genfuse.cli import main

sys.exit(main())
