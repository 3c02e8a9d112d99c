"""The text of `--dry-run`: the memory, the disk and the time that a compression takes."""

from transformers import PreTrainedModel

from ..execution.files import human_bytes
from ..methods import make_method
from ..models.architectures import find_blocks, separate_experts
from ..models.loading import load_config, skeleton
from ..runtime.configuration import CompressionConfig
from .checks import check_reads_text, whole_model_reason
from .defaults import with_defaults
from .estimate import estimate
from .planning import Plan, make_plan
from .time_estimate import estimate_time
from .weight_files import bytes_beside

OBSERVED_RANGE = "0.7 to 2.2"
"""Measured times in units of the estimate (benchmarks/large_models.md)."""


def describe(source: str, config: CompressionConfig, device: str = "cpu", dtype: str = "auto") -> str:
    """Return what compressing a checkpoint would take, by formula and short trials, as lines of text.

    Raises:
        CompressionError: if the method cannot reach the ratio.
    """
    dense = skeleton(load_config(source), dtype)
    check_reads_text(dense, config.calibration)
    config = with_defaults(dense, config)
    blocks = find_blocks(dense)
    plan = make_plan(dense, config, make_method(config.method, config.options), blocks, separate_experts(blocks))
    config = plan.config
    reason = whole_model_reason(config, dense)
    lines = _block_by_block(dense, config, device) if reason is None else [_whole_model(dense, config, reason)]
    return "\n".join([_result(dense, plan), *lines, _time(dense, config, device)])


def _result(dense: PreTrainedModel, plan: Plan) -> str:
    """Return how small the model becomes, by all three measures."""
    ratio, layers = plan.budget.ratio, plan.compressed + plan.dense
    bits = plan.budget.bits_per_weight(layers).value(ratio)
    size = plan.budget.file_bytes(layers, bytes_beside(dense, layers, plan.method, plan.embeddings)).value(ratio)
    return (
        f"linear layers of the blocks: {ratio:.2%} removed, {bits:.2f} bits per weight; "
        f"embeddings: {f'{plan.embeddings} bits' if plan.embeddings else 'dense'}; weight files: {human_bytes(size)}"
    )


def _whole_model(dense: PreTrainedModel, config: CompressionConfig, reason: str) -> str:
    model_bytes = sum(parameter.numel() * parameter.itemsize for parameter in dense.parameters())
    return (
        f"the whole model must be in memory, {_gigabytes(model_bytes)}, and statistics and working space beside it: "
        f"{reason}"
    )


def _block_by_block(dense: PreTrainedModel, config: CompressionConfig, device: str) -> list[str]:
    needs = estimate(dense, config)
    lines = [
        f"memory above torch's own, at most: {_gigabytes(needs.peak)}",
        f"  embeddings, norms and libraries: {_gigabytes(needs.resident)}",
        f"  the largest block: {_gigabytes(needs.block)}",
        f"  activations: {_gigabytes(needs.activations)}",
        f"  statistics and working space: {_gigabytes(needs.working)}",
        f"disk: {_gigabytes(needs.output)} for the result, and until it is done {_gigabytes(needs.work_folder)} "
        "in the work folder",
    ]
    if device != "cpu":
        lines.insert(0, f"memory of {device}, at most: {_gigabytes(needs.device)}")
    return lines


def _time(dense: PreTrainedModel, config: CompressionConfig, device: str) -> str:
    """Return what can be said of the time. Training is not estimated."""
    if device != "cpu":
        return f"time: not known for {device}"
    if make_method(config.method, config.options).trains or config.refinement_steps:
        return "time: not known for what trains"
    needs = estimate_time(dense, config)
    parts = {
        "start": needs.start,
        "calibration": needs.calibration,
        "solving": needs.solving,
        "checksums": needs.files,
    }
    spans = ", ".join(f"{part} {_span(seconds)}" for part, seconds in parts.items())
    sampling = "; the sampling of the calibration text comes on top" if config.calibration == "self" else ""
    return (
        f"time if this machine has nothing else to do: {_span(needs.total)} ({spans}); "
        f"runs took {OBSERVED_RANGE} times that{sampling}"
    )


def _span(seconds: float) -> str:
    """Return a span of time in whole seconds, or with two digits in a larger unit."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{seconds:.0f} s"


def _gigabytes(size: int) -> str:
    return human_bytes(size, smallest_unit="GB")
