"""What does a change to a Transformer do as the model grows? Pretraining, finetuning, reports."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hydratron")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
