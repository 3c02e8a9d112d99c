"""`hf-lowrank`: the command line. Each module holds the commands of one kind, which register when it is imported.

Nothing here imports torch or transformers before a command runs, so that `--help` answers at once.
"""

from . import compression, measurement, publication, speed, training
from .base import app

__all__ = ["app", "compression", "measurement", "publication", "speed", "training"]
