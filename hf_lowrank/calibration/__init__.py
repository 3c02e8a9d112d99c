"""Texts → token batches; block inputs; statistics."""

from .batches import TokenBatch, calibration_batches, fingerprint
from .blocks import BlockBatch, block_statistics, capture, run_block, shifted_sums
from .correction import stage_sums, stages, stream_writers
from .curvature import output_grams
from .gradients import squared_gradients

__all__ = [
    "BlockBatch",
    "TokenBatch",
    "block_statistics",
    "calibration_batches",
    "capture",
    "fingerprint",
    "output_grams",
    "run_block",
    "shifted_sums",
    "squared_gradients",
    "stage_sums",
    "stages",
    "stream_writers",
]
