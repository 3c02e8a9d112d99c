"""The order of the neurons of a feed-forward network. A permutation leaves the function of the block unchanged."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..methods import Statistics
from ..models.architectures import FeedForward, find_feed_forwards
from ..models.linears import dense_weight, permute_inputs, permute_outputs
from .selection import TIED
from .session import BlockVisit, Session


def order_neurons(session: Session, visit: BlockVisit, statistics: dict[str, Statistics]) -> None:
    """Permute the neurons of the block's feed-forward networks once, as the method wants, and `statistics`."""
    for network in find_feed_forwards(visit.block):
        output_name = f"{visit.name}.{network.output}"
        if output_name in session.log.neuron_orders or output_name not in statistics:
            continue
        # A tied weight is used elsewhere, too, where its neurons must stay where they are.
        if any(session.log.reasons.get(f"{visit.name}.{name}") == TIED for name in network.inputs):
            continue
        weight = dense_weight(visit.block.get_submodule(network.output))
        order = session.method.neuron_order(statistics[output_name], weight)
        if order is not None:
            session.log.neuron_orders[output_name] = order
            models = [session.model] if session.dense_copy is None else [session.model, session.dense_copy]
            apply_neuron_order(models, visit, network, order)
            statistics[output_name] = statistics[output_name].select(order)


def apply_neuron_order(models: Iterable[nn.Module], visit: BlockVisit, network: FeedForward, order: Tensor) -> None:
    """Permute the neurons of a feed-forward network of the block by (f,) indices, in the model and copies of it."""
    # A fused input matrix holds the gates of all neurons first, and then their values.
    input_order = torch.cat([order, order + len(order)]) if network.fused else order
    for model in models:
        for name in network.inputs:
            permute_outputs(model.get_submodule(f"{visit.name}.{name}"), input_order)
        permute_inputs(model.get_submodule(f"{visit.name}.{network.output}"), order)
