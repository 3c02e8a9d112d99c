"""Batches of tokens, the inputs that they give to the blocks of a model, and statistics of its linear layers."""

from .activations import ActivationCache, CachedTensor
from .backward import (
    GradientBatch,
    Head,
    backward_through_block,
    backward_through_model,
    chain_head,
    drawn_token_batches,
    next_token_batches,
)
from .batches import TokenBatch, fingerprint, split_into_passes
from .block_inputs import capture
from .blocks import (
    BlockBatch,
    BlockCall,
    Carrier,
    block_statistics,
    compressed_input_sums,
    record_calls,
    run_block,
    starts_new_block_list,
)
from .compact import pack_correlations, pack_statistics, unpack_correlations, unpack_statistics
from .correction import CorrectionSums, DenseReference, are_residual_writers, correction_sums, input_stages
from .curvature import OutputGramSums, first_batches
from .gradients import GradientSums, SquaredGradientSums
from .samples import calibration_batches
from .unigrams import with_unigram_sequences

__all__ = [
    "ActivationCache",
    "BlockBatch",
    "BlockCall",
    "CachedTensor",
    "Carrier",
    "CorrectionSums",
    "DenseReference",
    "GradientBatch",
    "GradientSums",
    "Head",
    "OutputGramSums",
    "SquaredGradientSums",
    "TokenBatch",
    "are_residual_writers",
    "backward_through_block",
    "backward_through_model",
    "block_statistics",
    "calibration_batches",
    "capture",
    "chain_head",
    "compressed_input_sums",
    "correction_sums",
    "drawn_token_batches",
    "fingerprint",
    "first_batches",
    "input_stages",
    "next_token_batches",
    "pack_correlations",
    "pack_statistics",
    "record_calls",
    "run_block",
    "split_into_passes",
    "starts_new_block_list",
    "unpack_correlations",
    "unpack_statistics",
    "with_unigram_sequences",
]
