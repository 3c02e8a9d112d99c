"""The end of a run: the model becomes a compressed one for transformers, with its config and its report."""

import logging
from pathlib import Path
from typing import Any

from ..calibration import fingerprint
from ..models.offloading import OffloadedQuantizer
from ..runtime.configuration import CompressionConfig
from ..runtime.layers import CompressedLinear
from ..runtime.origin import source_of
from ..runtime.privacy import public_name
from ..runtime.quantizer import CompressionQuantizer, attach
from ..runtime.reopening import stand_in
from ..runtime.saving import CompleteSave
from ..runtime.skeletons import STAND_IN
from ..runtime.validation import is_linear
from ..version import library_versions
from .fallback import fallback_warnings
from .report import Report, scarce_tokens
from .resume import FINAL_STAGE, record_name
from .session import Session

logger = logging.getLogger(__name__)


def finish(session: Session, calibration: Any, tokenizer: Any) -> None:
    """Attach the config, the quantizer and the report to the model, so that every save writes a complete checkpoint.

    Args:
        calibration: the text or the data that was calibrated on, as the config records it.
        tokenizer: saved with the model; None if there is none.
    """
    model, log = session.model, session.log
    release_fused_experts(session)
    config = final_config(session, calibration)
    if session.offloaded is None:
        attach(model, CompressionQuantizer(config, pre_quantized=True))
    else:
        attach(model, OffloadedQuantizer(config, session.offloaded, recorded_blocks(session)))
    save = CompleteSave.attach(model)
    save.tokenizer = tokenizer
    report = make_report(session)
    save.report = report.to_dict()
    for name, reason in log.reasons.items():
        logger.info("%s stays dense: %s", name, reason)
    for warning in report.warnings:
        logger.warning(warning)


def final_config(session: Session, calibration: Any) -> CompressionConfig:
    """Return the config that the checkpoint records: the recipe, where it came from, and what its layers store."""
    model, plan = session.model, session.plan
    provenance = {
        "base_model": public_name(source_of(model.config)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "calibration_sha256": fingerprint(session.tokens),
        "calibration_tokens": sum(batch.tokens for batch in session.tokens),
        "versions": library_versions(),
    }
    if (other_class := stand_in(model)) is not None:
        provenance[STAND_IN] = other_class
    options = {name: getattr(plan.method, name) for name in plan.method.__dict__}
    config = CompressionConfig.from_dict(
        {
            **plan.config.to_dict(),
            "calibration": describe_calibration(calibration),
            "samples": sum(batch.sequences for batch in session.tokens),
            "sequence_length": max(batch.longest for batch in session.tokens) or None,
            "options": options,
            "provenance": provenance,
            "experts": list(plan.expert_banks),
            "layers": {},
        }
    )
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            config.layers[name] = module.spec
    return config


def describe_calibration(calibration: Any) -> str:
    """Return what the config records of a calibration: the name of a text, or the type of what the caller gave."""
    if isinstance(calibration, str):
        return public_name(calibration)
    return f"given by the caller ({type(calibration).__name__})"


def release_fused_experts(session: Session) -> None:
    """Give experts that stay dense memory of their own, so that the fused tensors they are slices of can go."""
    for bank in session.plan.expert_banks.values():
        for layer in filter(is_linear, bank.modules()):
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()


def recorded_blocks(session: Session) -> dict[str, Path]:
    """Return the files of the work folder that hold the finished blocks, by the name of the block."""
    assert session.work is not None, "a model on disk has one"
    files = {}
    for index, name in enumerate(session.plan.blocks):
        files[name] = session.work.file(record_name(FINAL_STAGE, index))
    return files


def make_report(session: Session) -> Report:
    """Return the report of the run."""
    plan, log = session.plan, session.log
    layers = plan.compressed + plan.dense
    stored = {report.name: report.stored_bits for report in log.reports}
    dense_bits, stored_bits, bits_without_masks = 0, 0, 0
    for layer in layers:
        layer_dense_bits = plan.budget.dense_bits(layer)
        module = session.model.get_submodule(layer.name)
        dense_bits += layer_dense_bits
        stored_bits += stored.get(layer.name, layer_dense_bits)
        if isinstance(module, CompressedLinear):
            bits_without_masks += module.stored_bits("paper")
        else:
            bits_without_masks += layer_dense_bits
    warnings = [
        *log.warnings,
        *scarce_tokens(log.reports, plan.expert_banks),
        *fallback_warnings(log.retried, log.failed, log.kept_dense),
    ]
    return Report(
        method=plan.method.name,
        ratio_asked=plan.budget.ratio,
        ratio_stored=1 - stored_bits / dense_bits,
        ratio_paper=1 - bits_without_masks / dense_bits,
        accounting=plan.config.accounting,
        layers=log.reports,
        dense=log.reasons,
        retried=log.retried,
        bad=log.failed,
        warnings=warnings,
        curve=log.curve,
        refinement=log.refinement,
    )
