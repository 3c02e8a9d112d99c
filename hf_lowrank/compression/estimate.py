"""What a compression from disk to disk will take, by formula, before it starts."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..budget import Layer
from ..calibration.activations import ACTIVATIONS_IN_MEMORY
from ..calibration.batches import TOKENS_PER_PASS, sequence_length
from ..calibration.statistics import TOKENS_AT_ONCE
from ..execution.threads import parallel_slots
from ..methods import Method, make_method
from ..methods.spectral import SpectralMethod
from ..models.architectures import find_blocks, find_layers, separate_experts
from ..models.linears import CHUNK
from ..models.offloading import device_map, shard_size
from ..runtime.configuration import CompressionConfig

FLOAT64 = 8
CHUNKS = 8
"""Row chunks of a matrix that are in use at a time."""
LIBRARIES = 200_000_000
"""Bytes that transformers and what it imports take beside torch."""


@dataclass(frozen=True)
class Forecast:
    """Bytes, all of them.

    Attributes:
        resident: what stays in memory: embeddings and norms, and the libraries beside torch.
        block: the weights of the largest block.
        activations: hidden states that wait in memory, and those of the batch that is in the block.
        working: the statistics of a block, and what the method needs for the layer that needs most.
        shard: of the output, while it is written.
        work_folder, output: on disk.
    """

    resident: int
    block: int
    activations: int
    working: int
    shard: int
    work_folder: int
    output: int

    @property
    def peak(self) -> int:
        """Memory above that of torch itself."""
        return self.resident + max(self.block + self.activations + self.working, self.shard)


def forecast(dense: PreTrainedModel, config: CompressionConfig) -> Forecast:
    """What compressing a model of this skeleton, whose fused experts are separated, from disk to disk takes."""
    method = make_method(config.method, config.options)
    blocks = find_blocks(dense)
    banks = separate_experts(blocks)
    layers = find_layers(blocks)
    on_disk = {name for name, place in device_map(dense).items() if place == "disk"}
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in dense.named_parameters()}
    kept = sum(size for name, size in sizes.items() if not any(name.startswith(f"{part}.") for part in on_disk))
    block = max(sum(size for name, size in sizes.items() if name.startswith(f"{each}.")) for each in blocks)
    converted = sum(size for name, size in sizes.items() if any(name.startswith(f"{bank}.") for bank in banks))
    linears = sum(sizes[f"{layer.name}.weight"] for layer in layers)
    length = sequence_length(dense, config)
    width = dense.config.get_text_config().hidden_size * dense.dtype.itemsize
    hidden = config.samples * length * width
    batch = min(max(TOKENS_PER_PASS // length, 1), config.samples) * length
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    streams = 2 if method.needs_compressed_inputs else 1
    waiting = min((streams + 1) * hidden, ACTIVATIONS_IN_MEMORY)
    output = sum(sizes.values()) - round(config.ratio * linears)
    return Forecast(
        resident=kept + LIBRARIES,
        block=block,
        activations=waiting
        + 3 * batch * widest * dense.dtype.itemsize
        + 2 * min(batch, TOKENS_AT_ONCE) * widest * FLOAT64,
        working=max(
            _working(method, [layer for layer in layers if layer.block == index]) for index in range(len(blocks))
        ),
        shard=min(shard_size(dense), output),
        work_folder=converted + round((1 - config.ratio) * linears) + 2 * streams * hidden + _measured(method, layers),
        output=output,
    )


def curvature(dense: PreTrainedModel, config: CompressionConfig) -> int:
    """Bytes of the Gram matrices of output gradients, which are of all layers at once; 0 for methods that need none."""
    blocks = find_blocks(dense)
    separate_experts(blocks)
    needed = make_method(config.method, config.options).needs_output_gram
    return sum(FLOAT64 * layer.out_features**2 for layer in find_layers(blocks)) if needed else 0


def _working(method: Method, layers: list[Layer]) -> int:
    """Of one block: all its Gram matrices once they are summed; then for each layer in its turn what it needs itself, its Gram matrix,
    and those of layers that are not done yet, of which large ones wait in files. Small layers are solved several at a time.
    """
    grams = {statistics_input(layer): FLOAT64 * layer.in_features**2 for layer in layers} if method.needs_gram else {}
    shifted = 2 * sum(grams.values()) if method.needs_compressed_inputs else 0
    most = sum(grams.values()) + shifted
    for position, layer in enumerate(layers):
        own = grams.get(statistics_input(layer), 0)
        others = {statistics_input(each) for each in layers[position:]} - {statistics_input(layer)}
        waiting = sum(grams[each] for each in others if each in grams and grams[each] <= ACTIVATIONS_IN_MEMORY)
        most = max(most, own + waiting + shifted + method.working_memory(layer))
    largest = max((method.working_memory(layer) for layer in layers), default=0)
    return most + max(parallel_slots(largest) - 1, 0) * largest + CHUNKS * FLOAT64 * CHUNK


def statistics_input(layer: Layer) -> str:
    """The same for layers that see the same input."""
    shared = {"query": "attention", "key": "attention", "value": "attention", "ffn_in": "ffn_in"}
    return shared.get(layer.role, layer.name)


def _measured(method: Method, layers: list[Layer]) -> int:
    """Factors that a method keeps on disk until it knows the ranks of all layers."""
    if not isinstance(method, SpectralMethod):
        return 0
    return sum(FLOAT64 * (m + n) * min(m, n) for m, n in ((layer.out_features, layer.in_features) for layer in layers))
