"""`compress()`: check the recipe, calibrate, compress the blocks by the strategy of the method, finish the model.

The work on the blocks is in `walk.py`, the one loop over them; `strategies/` says what happens to a block in it.
"""

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import (
    ActivationCache,
    BlockBatch,
    TokenBatch,
    calibration_batches,
    capture,
    record_calls,
    split_into_passes,
)
from ..execution.modes import own_modes
from ..execution.process_group import current_process_group
from ..execution.progress import progress_bar
from ..execution.work_folder import WorkFolder
from ..methods import make_method
from ..models.caller_state import evaluation_mode, replace_inference_tensors
from ..models.offloading import is_offloaded, return_memory
from ..runtime.compressed_linear import has_compressed_layers
from ..runtime.configuration import CompressionConfig
from ..runtime.quantizer import fuse_experts
from .calibration_source import resolve_calibration
from .checks import (
    check_block_by_block,
    check_continuous,
    check_finite,
    check_given,
    check_one_block_at_a_time,
    check_predicts_next_token,
    check_reads_text,
    check_same_everywhere,
    usable_device,
)
from .defaults import with_defaults
from .embeddings import compress_embeddings
from .finishing import finish
from .head_inputs import head_gram
from .refinement import refine
from .resume import run_identity
from .session import Session, open_session
from .strategies import strategy_of

logger = logging.getLogger(__name__)


def compress(
    model: PreTrainedModel,
    config: CompressionConfig | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    *,
    work_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Compress the linear layers of a model's blocks, in place.

    Where torch.distributed has a process group of several processes, all of them call this with the same arguments and
    share the work. Every one ends with the whole compressed model.

    Args:
        model: any dense transformers model with a list of blocks of `nn.Linear` or `Conv1D` layers.
        config: the recipe. By default `auto` at 6 stored bits per weight, which loses next to nothing, or SLaB at half
            of the stored bits for a model that predicts no next tokens.
        tokenizer: reads the text to calibrate on, and is saved with the compressed model. By default the text is read
            with the one that lies beside the model.
        calibration: what to calibrate on instead of `config.calibration`: "bundled" (the text that is installed with
            the package), "self" (text sampled from the model), a dataset name, a file of texts
            (plain, or rows with a column `text` or `messages`: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`,
            `.arrow`, packed or not), or an iterable of texts, token ids, chats, rows of a dataset, or batches. At most
            `config.samples` sequences of `config.sequence_length` tokens of it are used, and a stream is read only as
            far as they need.
        work_dir: a folder that records what is finished, so that a killed run, started again, goes on from there to
            the same bytes. Delete it, or use it for another run, once the model is saved.
        device: where to compute, if not where the model is. One block at a time goes to this device and comes back.
            The rest of the model stays.
        progress: whether to show a bar on a terminal, or else log a line per block at level INFO.

    Returns:
        The same model, of its own class, with compressed layers. Its `save_pretrained` writes a complete checkpoint.

    Raises:
        CompressionError: for a recipe that cannot be followed. Most are refused before any work is done. Layers that
            calibration never reaches, and a work folder of another run, are known only after the calibration text was
            read.
        NumericalError: if a weight, a calibration input or a result is not finite, naming the layer.
    """
    config = config or CompressionConfig()
    check_given(model, config, tokenizer)
    if calibration is None:
        calibration = config.calibration
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    config = with_defaults(model, config)
    method = make_method(config.method, config.options)
    strategy_of(method)  # which refuses a method that it cannot use
    check_reads_text(model, calibration)
    calibration, reader = resolve_calibration(model, calibration, tokenizer)
    if is_offloaded(model):
        check_block_by_block(model, config, calibration, work_dir)
    place = usable_device(device) if device is not None else model.device
    if place != model.device:
        check_one_block_at_a_time(model, config, place)
    group = current_process_group(place)
    with ExitStack() as stack:
        stack.enter_context(own_modes())
        replace_inference_tensors(model)
        show = stack.enter_context(progress_bar(progress and group.is_main))
        work = stack.enter_context(group.work_folder(work_dir)) if work_dir is not None else None
        stack.enter_context(evaluation_mode(model))
        try:
            session = open_session(model, config, method, show, group, place)
            calibrate(session, reader, calibration)
            use_work_folder(session, work)
            compress_blocks(session)
        except BaseException:
            # The dense model is left as it was given, where nothing of it was replaced yet.
            if not has_compressed_layers(model):
                fuse_experts(model)
            raise
        on_disk = None if session.offloaded is None else session.offloaded.weights
        session.log.embeddings = compress_embeddings(model, session.plan.embeddings, on_disk, session.head_gram)
        if work is not None:
            work.finish()
        if session.offloaded is not None:
            session.offloaded.release()
        finish(session, calibration, tokenizer)
    return model


def calibrate(session: Session, tokenizer: Any, calibration: Any) -> None:
    """Check the model, and turn the calibration text into the batches of the session."""
    model, method, config = session.model, session.method, session.plan.config
    check_predicts_next_token(model, method)
    check_finite(session)
    session.tokens = [_ordinary(batch) for batch in _token_batches(session, tokenizer, calibration)]
    check_predicts_next_token(model, method, session.tokens)
    session.tokens = strategy_of(method).adapt_tokens(method, session.tokens, config.seed)


def _token_batches(session: Session, tokenizer: Any, calibration: Any) -> list[TokenBatch]:
    """Return the calibration batches."""

    def read() -> list[TokenBatch]:
        return calibration_batches(session.model, session.plan.config, tokenizer, calibration)

    # Only the main process downloads a named text, or samples one from the model. The others have the rows that they
    # were given.
    return session.group.broadcast(read) if isinstance(calibration, str) else read()


def _ordinary(batch: TokenBatch) -> TokenBatch:
    """Return a batch with copies of those inputs that the caller made in inference mode, as gradients refuse them."""

    def ordinary(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.is_inference() else tensor

    mask = None if batch.attention_mask is None else ordinary(batch.attention_mask)
    others = {name: ordinary(tensor) for name, tensor in batch.others.items()}
    return TokenBatch(ordinary(batch.input_ids), mask, others)


def use_work_folder(session: Session, work: WorkFolder | None) -> None:
    """Claim the work folder for this run, and check that all processes have the same one.

    Raises:
        CompressionError: if the folder holds a run of something else, or the processes were given different things.
    """
    if work is None and session.group.size == 1:
        return
    identity = run_identity(session)
    check_same_everywhere(session, identity)
    if work is None:
        return
    work.claim(identity)
    session.work = work
    session.waiting = ActivationCache(work.path, owner=session.group.rank, device=session.other_device)
    if session.offloaded is not None:
        # Activations of a model that does not fit into memory wait in files, on the machine of each process.
        work.path.mkdir(parents=True, exist_ok=True)
        session.cache = session.waiting
        # Tokenizing a text takes some hundred bytes a token, which the C library keeps.
        return_memory()


def compress_blocks(session: Session) -> None:
    """Capture the inputs of the blocks, compress them by the strategy of the method, and refine them if asked."""
    batches = capture_inputs(session)
    if session.plan.embeddings:
        session.head_gram = head_gram(session, batches)
    strategy_of(session.method).compress(session, batches)
    if session.dense_copy is not None:
        refine(session, session.dense_copy)


def capture_inputs(session: Session) -> list[BlockBatch]:
    """Return this process's batches at the first block. Layers that no batch comes through stay dense from here on."""
    model, plan = session.model, session.plan
    session.show("capturing block inputs", 0, len(plan.compressed))
    layers = {layer.name: model.get_submodule(layer.name) for layer in plan.compressed}
    with record_calls(layers) as called:
        own = session.group.split(split_into_passes(session.tokens))
        batches = capture(model, plan.blocks, own, session.cache, plan.dense_blocks)
    check_continuous(session, batches)
    session.leave_uncalled_dense(set().union(*session.group.gather(called)))
    return batches
