"""Texts → token batches; block inputs; statistics."""

from .activations import ActivationCache
from .batches import TokenBatch, calibration_batches, fingerprint, passes
from .blocks import BlockBatch, block_statistics, capture, compressed_input_sums, noting_calls, run_block, starts_anew
from .correction import DensePasses, Sums, stage_sums, stages, stream_writers
from .curvature import output_grams
from .gradients import squared_gradients
from .unigrams import with_unigram_sequences

__all__ = [
    "ActivationCache",
    "BlockBatch",
    "DensePasses",
    "Sums",
    "TokenBatch",
    "block_statistics",
    "calibration_batches",
    "capture",
    "compressed_input_sums",
    "fingerprint",
    "noting_calls",
    "output_grams",
    "passes",
    "run_block",
    "squared_gradients",
    "stage_sums",
    "stages",
    "starts_anew",
    "stream_writers",
    "with_unigram_sequences",
]
