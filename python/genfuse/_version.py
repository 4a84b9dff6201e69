"""The version alone, which any file may read."""

__version__ = "0.1.0"
