"""Checks that refuse a run before any work is done, in one line each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import BlockBatch, TokenBatch, starts_new_block_list
from ..calibration.backward import has_next_token
from ..execution.files import one_line
from ..execution.work_folder import difference
from ..methods import Method, make_method
from ..models.architectures import codebooks, find_blocks, input_embeddings, main_inputs
from ..models.linears import is_finite
from ..models.offloading import every_weight
from ..runtime.compressed_linear import has_compressed_layers
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError, NumericalError, quoted
from ..runtime.quantizer import CompressionQuantizer
from ..runtime.reopening import check_reopens
from .session import Session

TEXT_INPUTS = ("input_ids", "inputs_embeds")
"""Inputs of a model that a text gives."""


def check_given(model: Any, config: Any, tokenizer: Any) -> None:
    """Check what `compress` is given.

    Raises:
        CompressionError: if model, config or tokenizer is of the wrong kind, if the model is compressed, or if nothing
            could open it again once it is saved.
    """
    if not isinstance(config, CompressionConfig):
        raise CompressionError(
            f"config: found {type(config).__name__}, expected a CompressionConfig, "
            "such as CompressionConfig(method='slab')"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise CompressionError(
            f"tokenizer: found {type(tokenizer).__name__}, expected a tokenizer; "
            "pass texts to calibrate on as calibration="
        )
    if not isinstance(model, PreTrainedModel) or _has_adapters(model):
        raise CompressionError(
            f"model: found {type(model).__name__}, expected a plain model of transformers; merge adapters first "
            "(merge_and_unload), and take off what torch or accelerate have wrapped around it"
        )
    if has_compressed_layers(model):
        raise CompressionError(
            f"{type(model).__name__} is compressed already; compress the dense model, or model.dequantize() this one"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, CompressionQuantizer):
        raise CompressionError(
            f"{type(model).__name__} is quantized already ({quantizer.quantization_config.quant_method}); "
            "load the dense model, or model.dequantize() this one"
        )
    check_reopens(model)


def _has_adapters(model: PreTrainedModel) -> bool:
    """Return whether adapters were added to a model. PEFT keeps what they wrap under the name `base_layer`."""
    has_wrapped_layers = any(name.endswith(".base_layer") for name, _ in model.named_modules())
    return has_wrapped_layers or getattr(model, "_hf_peft_config_loaded", False)


def check_reads_text(model: PreTrainedModel, source: Any) -> None:
    """Raise CompressionError if a model is to be calibrated on a text, or on itself, and needs something else.

    Args:
        source: what to calibrate on.
    """
    needed = main_inputs(model)
    reads_codes = codebooks(model) > 0
    if not isinstance(source, str) or (not reads_codes and not {*TEXT_INPUTS}.isdisjoint(needed)):
        return
    what = "codes of sounds" if reads_codes else " or ".join(needed)
    inputs = f"'{needed[-1]}': ..."
    if model.config.is_encoder_decoder:
        inputs += ", 'decoder_input_ids': ..."
    raise CompressionError(
        f"calibration: {type(model).__name__} takes {what}, which {quoted(source)} does not give; "
        f"give batches of tensors, calibration=[{{{inputs}}}, ...]"
    )


def whole_model_reason(config: CompressionConfig, dense: PreTrainedModel, calibration: Any = None) -> str | None:
    """Return why the whole model must be in memory, or None if one block at a time is enough.

    Args:
        dense: the model, or its skeleton.
        calibration: what to calibrate on instead of `config.calibration`.
    """
    source = config.calibration if calibration is None else calibration
    reason = _many_blocks_reason(config)
    if reason is not None:
        return reason
    if isinstance(source, str) and source == "self":
        return "the calibration text is sampled from the model; name a text or a dataset to go block by block"
    lists_of_blocks = {name.rpartition(".")[0] for name in find_blocks(dense)}
    if len(lists_of_blocks) > 1:
        return f"{type(dense).__name__} has more than one list of blocks"
    return None


def _many_blocks_reason(config: CompressionConfig) -> str | None:
    """Return why a recipe computes with more than one block at a time, or None if it does not."""
    method = make_method(config.method, config.options)
    if method.trains:
        return f"{method.name} trains through the whole model"
    if config.refinement_steps:
        return "refining compares the blocks with those of the dense model"
    return None


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device of torch.

    Raises:
        CompressionError: if torch knows no such device, or has none on this machine.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises these for different devices
        raise CompressionError(
            f"device: {quoted(str(device))} cannot be used on this machine ({one_line(error, limit=120)})"
        ) from error
    return torch.device(device)


def check_one_block_at_a_time(model: PreTrainedModel, config: CompressionConfig, device: torch.device) -> None:
    """Raise CompressionError if a recipe needs more of a model on the device than one block at a time."""
    reason = _many_blocks_reason(config)
    if reason is not None:
        raise CompressionError(f"device: {reason}; move the {type(model).__name__} to {device} instead")


def check_block_by_block(
    model: PreTrainedModel, config: CompressionConfig, calibration: Any, work_dir: str | Path | None
) -> None:
    """Raise CompressionError if a model that has its blocks on disk cannot be compressed block by block."""
    name = type(model).__name__
    if work_dir is None:
        raise CompressionError(f"{name} has its blocks on disk; name a work folder for the finished ones")
    reason = whole_model_reason(config, model, calibration)
    if reason is not None:
        raise CompressionError(f"{name} has its blocks on disk and must be in memory as a whole: {reason}")


def check_continuous(session: Session, batches: list[BlockBatch]) -> None:
    """Raise CompressionError if blocks are on disk of which one does not go on from the block before it."""
    if session.offloaded is None:
        return
    for index, name in enumerate(session.plan.blocks):
        if starts_new_block_list(batches, index):
            raise CompressionError(
                f"{name} reads more than the block before it gives: "
                f"{type(session.model).__name__} must be in memory as a whole"
            )


def check_predicts_next_token(model: PreTrainedModel, method: Method, batches: Sequence[TokenBatch] = ()) -> None:
    """Raise CompressionError if a method learns from the loss of the next token, which model or text do not give."""
    if not method.learns_from_loss:
        return
    reads_other_inputs = any(batch.others for batch in batches) or input_embeddings(model) is None
    if not model.can_generate() or model.config.is_encoder_decoder or reads_other_inputs:
        raise CompressionError(
            f"{method.name} learns from the loss of the next token of a text, which is not what "
            f"{type(model).__name__} is given; use a method without training, such as slab or sola"
        )
    if batches and method.reads_next_tokens and not any(map(has_next_token, batches)):
        raise CompressionError(
            f"{method.name} learns from the next tokens of the calibration text, and no sequence has two tokens; give "
            "longer ones, or use a method without training, such as slab or sola"
        )


def check_finite(session: Session) -> None:
    """Check every weight. A bad weight that is found during calibration would be reported under a later layer.

    Raises:
        CompressionError: if a weight has no values.
        NumericalError: if a weight is not finite, naming it.
    """
    buffers = {name for name, _ in session.model.named_buffers()}
    for name, tensor in every_weight(session.model, session.offloaded):
        if tensor.is_meta:
            raise CompressionError(f"{name}: has no values (it is on the meta device); load the weights first")
        # Buffers may be infinite on purpose, such as masks.
        if name not in buffers and not is_finite(tensor):
            raise NumericalError(
                f"{name}: the weight is not finite; the checkpoint is damaged or its dtype too narrow"
            )


def check_same_everywhere(session: Session, identity: dict[str, Any]) -> None:
    """Raise CompressionError if the processes of a run were given different or sharded inputs, naming what differs."""
    from torch.distributed.tensor import DTensor  # not in every build of torch

    if any(isinstance(parameter, DTensor) for parameter in session.model.parameters()):
        raise CompressionError(
            f"{type(session.model).__name__}: its weights are sharded over the processes; "
            "compress it before it is sharded"
        )
    identities = session.group.gather(identity)
    for rank, other in enumerate(identities):
        if other != identities[0]:
            what = difference(identities[0], other, words=("process 0 has", f"process {rank}"))
            raise CompressionError(
                f"process {rank} differs in {what}; give every process the same model, calibration and recipe"
            )
