"""Other libraries on our operators: `genfuse.integrations.NAME.patch()`, for nflows, normflows, zuko and pythae.

A module is imported by its name, and imports the library that it patches.
"""
