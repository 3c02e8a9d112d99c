"""Batches of tokens, the inputs that they give to the blocks of a model, and statistics of its linear layers."""

from .activations import ActivationCache
from .batches import TokenBatch, fingerprint, split_into_passes
from .block_inputs import capture
from .blocks import (
    BlockBatch,
    BlockCall,
    block_statistics,
    compressed_input_sums,
    record_calls,
    run_block,
    starts_new_block_list,
)
from .correction import CorrectionSums, DenseReference, are_residual_writers, correction_sums, input_stages
from .curvature import output_grams
from .gradients import squared_gradients
from .samples import calibration_batches
from .unigrams import with_unigram_sequences

__all__ = [
    "ActivationCache",
    "BlockBatch",
    "BlockCall",
    "CorrectionSums",
    "DenseReference",
    "TokenBatch",
    "are_residual_writers",
    "block_statistics",
    "calibration_batches",
    "capture",
    "compressed_input_sums",
    "correction_sums",
    "fingerprint",
    "input_stages",
    "output_grams",
    "record_calls",
    "run_block",
    "split_into_passes",
    "squared_gradients",
    "starts_new_block_list",
    "with_unigram_sequences",
]
