"""compress(): check the recipe, calibrate, walk the blocks of a model by the method's strategy, make the result a checkpoint's model."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ..calibration import (
    ActivationCache,
    TokenBatch,
    calibration_batches,
    capture,
    fingerprint,
    noting_calls,
    output_grams,
    passes,
    squared_gradients,
    with_unigram_sequences,
)
from ..execution.process_group import current_process_group
from ..execution.progress import progress_bar
from ..execution.work_folder import difference, tensors_checksum
from ..methods import make_method
from ..methods.base import MixedMethod
from ..methods.soco import SoCo
from ..methods.spectral import SpectralMethod
from ..models.architectures import find_blocks
from ..models.linears import is_finite
from ..models.offloading import OffloadedBlocks, OffloadedQuantizer, every_weight, is_offloaded, return_memory
from ..runtime.configuration import CompressionConfig, LayerSpec
from ..runtime.errors import CompressionError, NumericalError
from ..runtime.layers import CompressedLinear
from ..runtime.quantizer import CompressionQuantizer, attach, fuse_experts
from ..runtime.saving import CompleteSave
from ..runtime.validation import is_linear
from ..version import library_versions
from .run import Run
from .strategies import layerwise, mixed_strategy, refine, spectral_strategy

logger = logging.getLogger(__name__)


def compress(
    model: PreTrainedModel,
    config: CompressionConfig | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Compress the linear layers of a model's blocks, in place.

    Args:
        model: any dense transformers model with a list of blocks of `nn.Linear` or `Conv1D` layers.
        config: the recipe; by default SLaB at half of the stored bits.
        tokenizer: needed to calibrate on text; saved with the compressed model.
        calibration: what to calibrate on instead of `config.calibration`: "self", a dataset name, a file of texts (plain, or
            `.jsonl` or `.parquet` with a column `text`), or an iterable of texts, token ids, chats, rows of a dataset, or batches.
        work_dir: a folder that records what is finished, so that a killed run, started again, goes on from there to the same bytes.
            Delete it, or use it for another run, once the model is saved.
        progress: whether to show a bar on a terminal, or else log a line per block at level INFO.

    Where torch.distributed has a process group of several, all of them call this with the same arguments and share the work; every one
    ends with the whole compressed model.

    Returns:
        The same model, of its own class, with compressed layers; its `save_pretrained` writes a complete checkpoint.

    Raises:
        CompressionError: for a recipe that cannot be followed, before any work is done.
        NumericalError: if a weight, a calibration input or a result is not finite, naming the layer.
    """
    config = config or CompressionConfig()
    check_given(model, config, tokenizer)
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    method = make_method(config.method, config.options)
    if is_offloaded(model):
        check_block_by_block(model, config, calibration, work_dir)
    group = current_process_group(model.device)
    with ExitStack() as stack, torch.no_grad():
        step = stack.enter_context(progress_bar(progress and group.is_main))
        work = stack.enter_context(group.work_folder(work_dir)) if work_dir is not None else None
        was_training = model.training
        model.eval()
        try:
            run = Run(model, config, method, step, group)
            learns = method.needs_gradients or method.needs_output_gram or isinstance(method, SoCo)
            if learns:
                check_predicts_next_token(model, method.name)
            check_finite(run)
            run.tokens = _tokens(run, tokenizer, calibration)
            if learns:
                check_predicts_next_token(model, method.name, run.tokens)
            if isinstance(method, MixedMethod):
                run.tokens = with_unigram_sequences(run.tokens, method.unigram_share, config.seed)
            if work is not None or group.size > 1:
                identity = _identity(run)
                check_same_everywhere(run, identity)
            if work is not None:
                work.claim(identity)
                run.work = work
            if run.offloaded is not None:
                assert work is not None, "checked"
                work.path.mkdir(parents=True, exist_ok=True)  # on this process's machine
                run.cache = ActivationCache(work.path, owner=group.rank)
                return_memory()  # tokenizing a text takes some hundred bytes a token
            _walk(run)
        except BaseException:
            if not any(isinstance(module, CompressedLinear) for module in model.modules()):
                fuse_experts(model)
            raise
        finally:
            model.train(was_training)
        if work is not None:
            work.finish()
        if run.offloaded is not None:
            run.offloaded.release()
    _finish(run, _described(config.calibration if calibration is None else calibration), tokenizer)
    return model


def check_given(model: Any, config: Any, tokenizer: Any) -> None:
    """Raise CompressionError for what is no recipe, no tokenizer, or no plain and dense model of transformers."""
    if not isinstance(config, CompressionConfig):
        raise CompressionError(
            f"config: found {type(config).__name__}, expected a CompressionConfig, such as CompressionConfig(method='slab')"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise CompressionError(
            f"tokenizer: found {type(tokenizer).__name__}, expected a tokenizer; texts to calibrate on are calibration="
        )
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise CompressionError(
            f"model: found {type(model).__name__}, expected a plain model of transformers; merge adapters first (merge_and_unload), "
            "and take off what torch or accelerate have wrapped around it"
        )
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise CompressionError(
            f"{type(model).__name__} is compressed already; compress the dense model, or model.dequantize() this one"
        )


def whole_model_reason(
    config: CompressionConfig, dense: PreTrainedModel, device: str, calibration: Any = None
) -> str | None:
    """Why the whole model must be in memory; None if one block at a time is enough.

    Args:
        dense: the model, or its skeleton.
        calibration: what to calibrate on instead of `config.calibration`.
    """
    method = make_method(config.method, config.options)
    source = config.calibration if calibration is None else calibration
    if isinstance(method, SoCo):
        return "soco trains through the whole model"
    if method.needs_gradients or method.needs_output_gram:
        return f"{method.name} needs gradients through the whole model"
    if config.refinement_steps:
        return "refining compares the blocks with those of the dense model"
    if isinstance(source, str) and source == "self":
        return "the calibration text is sampled from the model; name a text or a dataset to go block by block"
    if len({name.rpartition(".")[0] for name in find_blocks(dense)}) > 1:
        return f"{type(dense).__name__} has more than one list of blocks"
    if device != "cpu":
        return f"the device is {device}"
    return None


def compress_on_load(model: PreTrainedModel, config: CompressionConfig) -> None:
    """What `from_pretrained(dense, quantization_config=config)` does after loading.

    Text named in `config.calibration` needs the tokenizer beside the model; without one the model calibrates on itself.
    """
    tokenizer = None
    if config.calibration == "self":
        logger.warning(
            "compressing on load: calibrating on text sampled from the model itself; name a text in calibration= to use that"
        )
        compress(model, config)
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError) as error:
        logger.warning(
            "compressing on load: no tokenizer beside the model (%s); calibrating on text sampled from the model itself",
            error,
        )
    compress(model, config, tokenizer, calibration=None if tokenizer else "self")


def _walk(run: Run) -> None:
    """Calibrate, and compress the blocks by the strategy of the method."""
    model, method, tokens = run.model, run.method, run.tokens
    run.step("capturing block inputs", 0, len(run.compressed))
    with noting_calls({layer.name: model.get_submodule(layer.name) for layer in run.compressed}) as called:
        batches = capture(model, run.blocks, run.group.split(passes(tokens, model.device)), run.cache)
    run.leave_uncalled_dense(set().union(*run.group.gather(called)))
    names = [layer.name for layer in run.compressed]
    if method.needs_gradients:
        run.step("measuring gradients", 0, len(names))
        run.gradients = squared_gradients(model, names, tokens, run.group)
    if method.needs_output_gram:
        run.step("measuring curvature", 0, len(names))
        run.output_grams = output_grams(model, names, tokens, run.config.seed, run.group)
    if isinstance(method, MixedMethod):
        mixed_strategy(run, method, batches)
    elif isinstance(method, SpectralMethod):
        spectral_strategy(run, method, batches)
    else:
        layerwise(run, batches)
    if run.original is not None:
        refine(run, run.original)


def _tokens(run: Run, tokenizer: Any, calibration: Any) -> list[TokenBatch]:
    """The calibration batches. A text that is named, or sampled from the model, the first process alone turns into tokens."""
    if isinstance(calibration, str | None):
        return run.group.broadcast(lambda: calibration_batches(run.model, run.config, tokenizer, calibration))
    return calibration_batches(run.model, run.config, tokenizer, calibration)


def check_same_everywhere(run: Run, identity: dict[str, Any]) -> None:
    """Raise CompressionError if the processes of a run were not given the same whole things, naming what differs."""
    from torch.distributed.tensor import DTensor  # not in every build of torch

    if any(isinstance(parameter, DTensor) for parameter in run.model.parameters()):
        raise CompressionError(
            f"{type(run.model).__name__}: its weights are sharded over the processes; compress it before it is sharded"
        )
    found = run.group.gather(identity)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise CompressionError(
                f"process {rank} has other {difference(found[0], other, words=('process 0 has', f'process {rank}'))}; "
                "give every process the same model, calibration and recipe"
            )


def _identity(run: Run) -> dict[str, Any]:
    """What the result of a run follows from."""
    return {
        "weights": weights_fingerprint(run.model, run.offloaded),
        "calibration": fingerprint(run.tokens),
        "config": run.config.to_dict(),
        "versions": library_versions(),
    }


def weights_fingerprint(model: PreTrainedModel, blocks: OffloadedBlocks | None = None) -> str:
    """sha256 over the names, types, shapes and bytes of all parameters and buffers."""
    return tensors_checksum(every_weight(model, blocks))


def _finish(run: Run, calibration: str, tokenizer: Any) -> None:
    """Make the model a compressed one for transformers, with its config and report."""
    model = run.model
    specs: dict[str, LayerSpec] = {
        name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)
    }
    provenance = {
        "base_model": getattr(model.config, "_name_or_path", ""),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration_sha256": fingerprint(run.tokens),
        "calibration_tokens": sum(batch.tokens for batch in run.tokens),
        "versions": library_versions(),
    }
    options = {name: getattr(run.method, name) for name in run.method.__dict__}
    final = CompressionConfig.from_dict(
        {
            **run.config.to_dict(),
            "calibration": calibration,
            "options": options,
            "provenance": provenance,
            "experts": list(run.banks),
            "layers": {},
        }
    )
    final.layers = specs
    for bank in run.banks.values():
        for layer in filter(is_linear, bank.modules()):  # what stays dense lets go of the fused tensor
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
    if run.offloaded is None:
        attach(model, CompressionQuantizer(final, pre_quantized=True))
    else:
        attach(model, OffloadedQuantizer(final, run.offloaded, run.built_files()))
    save = CompleteSave.attach(model)
    save.tokenizer = tokenizer
    report = run.report()
    save.report = report.to_dict()
    for name, reason in run.reasons.items():
        logger.info("%s stays dense: %s", name, reason)
    for warning in report.warnings:
        logger.warning(warning)


def check_predicts_next_token(model: PreTrainedModel, method: str, batches: Sequence[TokenBatch] = ()) -> None:
    """Raise CompressionError if the loss that a method learns from, that of the next token of a text, is not what the model is for."""
    if not model.can_generate() or model.config.is_encoder_decoder or any(batch.others for batch in batches):
        raise CompressionError(
            f"{method} learns from the loss of the next token of a text, which is not what {type(model).__name__} is given; "
            "use a method without training, such as slab or sola"
        )


def check_block_by_block(
    model: PreTrainedModel, config: CompressionConfig, calibration: Any, work_dir: str | Path | None
) -> None:
    """Raise CompressionError if a model whose blocks are on disk cannot be compressed so."""
    if work_dir is None:
        raise CompressionError(
            f"{type(model).__name__} has its blocks on disk; name a work folder for the finished ones"
        )
    if (reason := whole_model_reason(config, model, "cpu", calibration)) is not None:
        raise CompressionError(
            f"{type(model).__name__} has its blocks on disk and must be in memory as a whole: {reason}"
        )


def check_finite(run: Run) -> None:
    """Raise if a weight is not there (CompressionError) or not finite (NumericalError), naming it: calibration would blame other layers."""
    buffers = {name for name, _ in run.model.named_buffers()}
    for name, tensor in every_weight(run.model, run.offloaded):
        if tensor.is_meta:
            raise CompressionError(f"{name}: has no values (it is on the meta device); load the weights first")
        if name not in buffers and not is_finite(tensor):
            raise NumericalError(
                f"{name}: the weight is not finite; the checkpoint is damaged or its dtype too narrow"
            )


def _described(calibration: Any) -> str:
    return calibration if isinstance(calibration, str) else f"given by the caller ({type(calibration).__name__})"
