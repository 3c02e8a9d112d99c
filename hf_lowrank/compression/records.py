"""Blocks and build results as records, in which they are kept in the work folder and travel between processes."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from ..execution.work_folder import Record
from ..models.linears import dense_weight, replace_layer
from ..runtime.layer_spec import LayerSpec
from ..runtime.layers import CompressedLinear, build_layer
from .fallback import BuildResult
from .report import LayerReport


def block_record(block: nn.Module, facts: dict[str, Any]) -> Record:
    """Return the tensors of a block, which of its layers are compressed and how, and other facts about it."""
    specs = {}
    for name, module in block.named_modules():
        if isinstance(module, CompressedLinear):
            specs[name] = module.spec.to_dict()
    return Record(dict(block.state_dict()), {**facts, "specs": specs})


def restore_block(block: nn.Module, record: Record, values: bool = True) -> None:
    """Bring a block into the state that was recorded.

    Args:
        values: whether to restore the values, too, or only which layers are compressed and how.
    """
    for name, spec in record.facts["specs"].items():
        weight = dense_weight(block.get_submodule(name))
        layer = build_layer(
            LayerSpec.from_dict(name, spec), weight.shape[1], weight.shape[0], weight.device, weight.dtype
        )
        replace_layer(block, name, layer)
    if values:
        block.load_state_dict(record.tensors)


def build_result_record(result: BuildResult) -> Record:
    """Return a build result as a record, in which it travels between processes."""
    facts: dict[str, Any] = {"fault": result.fault, "remedy": result.remedy}
    if result.layer is None or result.report is None:
        return Record({}, facts)
    facts |= {"spec": result.layer.spec.to_dict(), "report": asdict(result.report)}
    return Record(dict(result.layer.state_dict()), facts)


def build_result_from(record: Record, dense: nn.Module) -> BuildResult:
    """Return the build result that a record holds.

    Args:
        dense: the layer that the compressed one stands for; gives its shape, device and dtype.
    """
    facts = record.facts
    if "report" not in facts:
        return BuildResult(None, None, facts["fault"])
    report, weight = LayerReport(**facts["report"]), dense_weight(dense)
    spec = LayerSpec.from_dict(report.name, facts["spec"])
    layer = build_layer(spec, weight.shape[1], weight.shape[0], weight.device, weight.dtype)
    layer.load_state_dict(record.tensors)
    return BuildResult(layer, report, facts["fault"], facts["remedy"])


def merge_records(records: Iterable[Record]) -> Record:
    """Return records of different things as one."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for record in records:
        tensors |= record.tensors
        facts |= record.facts
    return Record(tensors, facts)
