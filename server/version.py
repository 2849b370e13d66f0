"""Which version of this package runs here."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("sottovoce")
except PackageNotFoundError:  # sources on PYTHONPATH that nobody has installed
    VERSION = "unknown"
