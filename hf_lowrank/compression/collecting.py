"""The statistics of a block's layers, from the calibration batches that come through it."""

from dataclasses import replace

import torch
from torch import nn

from ..budget import Layer
from ..calibration import BlockBatch, block_statistics, compressed_input_sums
from ..methods import Statistics
from ..models.linears import dense_weight
from ..models.offloading import return_memory
from .neurons import order_neurons
from .session import BlockVisit, Session


def collect_statistics(session: Session, visit: BlockVisit, batches: list[BlockBatch]) -> dict[str, Statistics]:
    """Return the statistics of the layers of a block, by name.

    The batches move on to the dense outputs of the block, unless the method is sequential. Neurons get the order that
    the method wants.
    """
    index, block, method = visit.index, visit.block, session.method
    modules = {layer.name: session.model.get_submodule(layer.name) for layer in visit.layers}
    compressed_sums = None
    if method.needs_compressed_inputs:
        compressed_sums = compressed_input_sums(block, index, batches, modules, session.group)
    moves_on = not method.sequential
    measured = block_statistics(block, index, batches, modules, method.needs_gram, moves_on, session.group)
    output_grams = session.output_grams(visit)
    statistics = {}
    for layer in visit.layers:
        name = layer.name
        layer_statistics = measured[name] or no_data(layer, modules[name])
        if compressed_sums is not None:
            layer_statistics = compressed_sums.extend(name, layer_statistics)
        if name in session.squared_gradients:
            layer_statistics = replace(layer_statistics, squared_gradients=session.squared_gradients[name])
        if name in output_grams:
            layer_statistics = replace(layer_statistics, output_gram=output_grams[name])
        statistics[name] = layer_statistics
    order_neurons(session, visit, statistics)
    if session.offloaded is None:
        return statistics
    statistics = _cache_grams(session, statistics)
    return_memory()
    return statistics


def no_data(layer: Layer, module: nn.Module) -> Statistics:
    """Return what stands in for the statistics of a layer that no token reached: all inputs count alike."""
    n, device = layer.in_features, dense_weight(module).device
    ones = torch.ones(n, dtype=torch.float64, device=device)
    return Statistics(tokens=0, column_norms=ones, mean=torch.zeros_like(ones), mean_abs=ones, gram=torch.diag(ones))


def _cache_grams(session: Session, statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    """Return the statistics with large Gram matrices in files, which are in memory only while they are used."""
    cached = {}
    for layer_statistics in statistics.values():
        gram = layer_statistics.gram
        # Layers that see the same input share one Gram matrix, which must not be written twice.
        if gram is not None and id(gram) not in cached:
            cached[id(gram)] = session.cache.put(gram).tensor
    return {name: replace(value, gram=cached.get(id(value.gram))) for name, value in statistics.items()}
