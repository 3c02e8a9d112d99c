"""Texts → token batches; block inputs; statistics."""

from .activations import Shelf
from .batches import TokenBatch, calibration_batches, fingerprint
from .blocks import BlockBatch, block_statistics, capture, noting_calls, run_block, shifted_sums, starts_anew
from .correction import DensePasses, Sums, stage_sums, stages, stream_writers
from .curvature import output_grams
from .gradients import squared_gradients
from .unigrams import with_unigram_sequences

__all__ = [
    "BlockBatch",
    "DensePasses",
    "Shelf",
    "Sums",
    "TokenBatch",
    "block_statistics",
    "calibration_batches",
    "capture",
    "fingerprint",
    "noting_calls",
    "output_grams",
    "run_block",
    "shifted_sums",
    "squared_gradients",
    "stage_sums",
    "stages",
    "starts_anew",
    "stream_writers",
    "with_unigram_sequences",
]
