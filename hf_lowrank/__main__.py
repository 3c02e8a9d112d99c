"""`python -m hf_lowrank` is `hf-lowrank`."""

from .cli import app

app()
