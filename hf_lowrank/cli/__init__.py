"""`hf-lowrank`: the command line. Each module brings the verbs of one kind; importing it registers them."""

from . import compression, measurement, publication, speed, training
from .base import app

__all__ = ["app", "compression", "measurement", "publication", "speed", "training"]
