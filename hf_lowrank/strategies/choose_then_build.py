"""What each layer could become, measured in the dense model; one budget for all; then stage by stage, each on corrected targets."""

import copy

from torch import nn

from ..allocation import cheapest_choices
from ..budget import Layer
from ..calibration import BlockBatch, run_block, stage_sums, stages, starts_anew, stream_writers
from ..methods import Statistics
from ..methods.base import Choice, ChoosingMethod
from ..runtime.configuration import LayerSpec
from .run import Run


def choose_then_build(run: Run, method: ChoosingMethod, batches: list[BlockBatch]) -> None:
    """Compress every layer to what loses least for its bytes, fitted to the inputs that the layers before it give."""
    inputs = [batch.hidden for batch in batches]
    choices: dict[str, list[Choice]] = {}
    statistics: dict[str, Statistics] = {}
    for index, block, layers in run.walk():
        statistics |= run.gather(index, block, layers, batches)
        for layer in layers:
            choices[layer.name] = method.choices(layer, run.weight(layer), statistics[layer.name], run.budget.value_bits[layer.name])
    chosen = _choose(run, choices)
    for batch, hidden in zip(batches, inputs, strict=True):
        batch.hidden, batch.shifted = hidden, BlockBatch(hidden, batch.calls)
    for index, block, layers in run.walk():
        if starts_anew(batches, index):
            run.start_list(index, batches)
        dense = copy.deepcopy(block)
        _build_block(run, method, index, block, dense, layers, batches, chosen, statistics)
        for batch in batches:
            assert batch.shifted is not None
            batch.shifted.hidden = run_block(block, index, batch.shifted)
            batch.hidden = run_block(dense, index, batch)


def _choose(run: Run, choices: dict[str, list[Choice]]) -> dict[str, LayerSpec | None]:
    """One choice per layer within the budget; None for a layer that stays dense."""
    layers = {layer.name: layer for layer in run.compressed}
    options = {
        name: [(run.budget.stored_bits(layers[name], choice.spec), choice.loss) for choice in each]
        + [(run.budget.dense_bits(layers[name]) - run.budget.bias_bits[name], 0.0)]
        for name, each in choices.items()
    }
    taken = cheapest_choices(options, run.available)
    return {name: each[taken[name]].spec if taken[name] < len(each) else None for name, each in choices.items()}


def _build_block(
    run: Run,
    method: ChoosingMethod,
    index: int,
    block: nn.Module,
    dense: nn.Module,
    layers: list[Layer],
    batches: list[BlockBatch],
    chosen: dict[str, LayerSpec | None],
    statistics: dict[str, Statistics],
) -> None:
    """Make the layers of a block in the order of the data's way; `dense` is a copy of the block as it was."""
    block_name = list(run.blocks)[index]
    local = {layer.name.removeprefix(f"{block_name}."): layer for layer in layers}
    writers = _stream_writers(block_name, block, index, layers, batches[0])
    order = stages(block, index, batches[0], {name: block.get_submodule(name) for name in local})
    last = [name for names in order for name in names if name in writers][-1:]
    for names in order:
        writer = None if names[0] not in writers else "output" if names[0] in last else "input"
        sums = stage_sums(dense, block, index, batches, names, writer)
        for name in names:
            layer = local[name]
            spec, weight, known = chosen[layer.name], run.weight(layer), statistics[layer.name]
            if spec is None:
                run.reasons[layer.name] = f"{method.name} finds that its bytes are best spent on the dense layer"
                continue
            target = weight if sums is None else sums.target(weight)
            fitted = known if sums is None else sums.statistics(known)
            run.swap(layer, method.build(target, fitted, spec), weight, known)


def _stream_writers(block_name: str, block: nn.Module, index: int, layers: list[Layer], batch: BlockBatch) -> list[str]:
    """The two layers of a block that write to the residual stream, named within it; none if the block is not made that way."""
    writing = [layer for layer in layers if layer.role in ("output", "ffn_out")]
    found = {layer.role: layer.name.removeprefix(f"{block_name}.") for layer in writing}
    modules = {name: block.get_submodule(name) for name in found.values()}
    if len(found) != 2 or len(writing) != 2 or not stream_writers(block, index, batch, modules):
        return []
    return list(found.values())
