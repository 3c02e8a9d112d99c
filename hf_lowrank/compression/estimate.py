"""Estimate of the memory and the disk that a compression takes, by formula. `time_estimate.py` estimates the time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..budget import Layer
from ..calibration.activations import ACTIVATIONS_IN_MEMORY
from ..calibration.backward import FEWEST_TOKENS_AT_ONCE, LOGITS_AT_ONCE
from ..calibration.batches import TOKENS_PER_PASS, sequence_length
from ..calibration.curvature import ENOUGH_TOKENS
from ..calibration.statistics import TOKENS_AT_ONCE
from ..execution.threads import parallel_slots
from ..methods import Method, make_method
from ..models.architectures import find_blocks, find_layers, separate_experts
from ..models.linears import CHUNK
from ..models.offloading import device_map, shard_size
from ..runtime.configuration import CompressionConfig
from .embeddings import embedding_savings
from .strategies import strategy_of
from .strategies.base import statistics_input

FLOAT64_BYTES = 8
CHUNKS_IN_USE = 8
"""Row chunks of a matrix that are in use at a time."""
FLOAT32_BYTES = 4
LOGIT_BYTES = 20
"""Bytes for each logit that is there at a time: itself, its probability, their sums and its gradient."""
TENSORS_IN_GRAPH = 1.5
"""Tensors that a backward pass needs, in units of the inputs and outputs of the linear layers."""
LIBRARY_BYTES = 200_000_000
"""Bytes that transformers and what it imports take beside torch."""


@dataclass(frozen=True)
class Estimate:
    """Memory and disk of a compression from disk to disk, in bytes.

    Attributes:
        resident: memory that is never freed: embeddings and norms, and the libraries beside torch.
        block: the weights of the largest block.
        activations: hidden states that wait in memory, and those of the batch that is in the block.
        working: the statistics of a block, and the memory that the method needs for the layer that needs most.
        shard: the largest file of the output, which is in memory while it is written.
        work_folder: the work folder at its largest.
        output: the compressed checkpoint.
        device: memory of another device than the CPU, if blocks are computed there: a block with all that is needed
            for it, or else the head.
    """

    resident: int
    block: int
    activations: int
    working: int
    shard: int
    work_folder: int
    output: int
    device: int

    @property
    def peak(self) -> int:
        """Memory above that of torch itself."""
        return self.resident + max(self.block + self.activations + self.working, self.shard)


def estimate(dense: PreTrainedModel, config: CompressionConfig) -> Estimate:
    """Estimate what compressing a model from disk to disk takes.

    Args:
        dense: the skeleton of the model. Its fused experts are separated.
        config: a recipe with the ratio that the plan has decided on (`Plan.config`).
    """
    method = make_method(config.method, config.options)
    blocks = find_blocks(dense)
    expert_banks = separate_experts(blocks)
    layers = find_layers(blocks)
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in dense.named_parameters()}
    total = sum(sizes.values())
    on_disk = [name for name, place in device_map(dense).items() if place == "disk"]
    linears = sum(sizes[f"{layer.name}.weight"] for layer in layers)
    output = total - round(config.ratio * linears) - embedding_savings(dense, config)

    # Hidden states of all calibration tokens, at the block and for a compressed twin; one more set is being written.
    length = sequence_length(dense, config)
    width = dense.config.get_text_config().hidden_size * dense.dtype.itemsize
    hidden = config.samples * length * width
    compares = method.needs_compressed_inputs or method.strategy == "mixed"
    streams = 2 if compares else 1
    kept = _inputs_kept_for_gradients(method, config.samples * length, width, len(blocks))
    waiting = min((streams + 1) * hidden + kept, ACTIVATIONS_IN_MEMORY)
    block = max(_size_under(sizes, [name]) for name in blocks)
    in_block = _batch_bytes(dense, config, layers, length)
    outputs = 0
    if method.strategy == "mixed":
        block *= 2  # a dense copy beside the one whose layers are compressed
        in_block += _reference_bytes(layers, config.samples * length * dense.dtype.itemsize)
        outputs = hidden  # of the dense copy, which wait until the block is done
    working = _largest_working_memory(method, layers, len(blocks))
    head, backward = _gradient_bytes(dense, method, layers, sizes)
    rest = total - _size_under(sizes, on_disk)

    return Estimate(
        resident=rest + LIBRARY_BYTES,
        block=block,
        activations=waiting + outputs + in_block,
        working=max(working, head, backward),
        shard=min(shard_size(dense), output),
        work_folder=_size_under(sizes, expert_banks)
        + round((1 - config.ratio) * linears)
        + 2 * streams * hidden
        + max(kept - ACTIVATIONS_IN_MEMORY, 0)
        + strategy_of(method).survey_bytes(layers),
        output=output,
        device=max(block + in_block + max(working, backward), rest + head if head else 0),
    )


def _inputs_kept_for_gradients(method: Method, tokens: int, width: int, blocks: int) -> int:
    """Return the bytes of the inputs of all blocks, and of the gradient, that wait until the way back reaches them."""
    if not method.needs_gradients and not method.needs_output_gram:
        return 0
    used = tokens if method.needs_gradients else min(tokens, ENOUGH_TOKENS)
    return (blocks + 2) * used * width


def _reference_bytes(layers: list[Layer], bytes_of_channel: int) -> int:
    """Return the bytes of the inputs of a dense block's layers that are kept while the block is built."""
    by_input = {(layer.block, statistics_input(layer)): layer.in_features for layer in layers}
    channels: Counter[int] = Counter()
    for (block, _), features in by_input.items():
        channels[block] += features
    return min(max(channels.values()) * bytes_of_channel, ACTIVATIONS_IN_MEMORY)


def _gradient_bytes(
    dense: PreTrainedModel, method: Method, layers: list[Layer], sizes: dict[str, int]
) -> tuple[int, int]:
    """Return what the gradients take at most: in the head, and in a block whose sums are taken."""
    if not method.needs_gradients and not method.needs_output_gram:
        return 0, 0
    vocabulary = dense.config.get_text_config().vocab_size
    head = LOGIT_BYTES * max(LOGITS_AT_ONCE, FEWEST_TOKENS_AT_ONCE * vocabulary)
    head += sum(size for name, size in sizes.items() if name.startswith("lm_head."))
    sums, graphs = Counter[int](), Counter[int]()
    for layer in layers:
        m, n = layer.out_features, layer.in_features
        sums[layer.block] += FLOAT32_BYTES * (m * m if method.needs_output_gram else 2 * m * n)
        graphs[layer.block] += round(TENSORS_IN_GRAPH * (m + n)) * TOKENS_PER_PASS * dense.dtype.itemsize
    return head, max(sums[block] + graphs[block] for block in sums)


def _size_under(sizes: dict[str, int], modules: Iterable[str]) -> int:
    """Return the bytes of the parameters that lie in any of these modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return sum(size for name, size in sizes.items() if name.startswith(prefixes))


def _batch_bytes(dense: PreTrainedModel, config: CompressionConfig, layers: list[Layer], length: int) -> int:
    """Return the bytes of the activations of one batch while it is in a block, and of the sums over its tokens."""
    batch_tokens = min(max(TOKENS_PER_PASS // length, 1), config.samples) * length
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    in_block = 3 * batch_tokens * widest * dense.dtype.itemsize
    in_sums = 2 * min(batch_tokens, TOKENS_AT_ONCE) * widest * FLOAT64_BYTES
    return in_block + in_sums


def _largest_working_memory(method: Method, layers: list[Layer], blocks: int) -> int:
    """Return what the block that needs most takes for its statistics and decompositions."""
    by_block: list[list[Layer]] = [[] for _ in range(blocks)]
    for layer in layers:
        by_block[layer.block].append(layer)
    return max(_working_memory(method, layers_of_block) for layers_of_block in by_block)


def _working_memory(method: Method, layers: list[Layer]) -> int:
    """Return the memory that the statistics and the decompositions of one block take at most.

    First all Gram matrices of the block are there, once they are summed. Then each layer in its turn needs its own
    working memory, its Gram matrix, and those of layers that are not done yet, of which large ones wait in files.
    Small layers are solved several at a time.
    """
    grams = {}
    if method.needs_gram:
        grams = {statistics_input(layer): FLOAT64_BYTES * layer.in_features**2 for layer in layers}
    compressed_input_grams = 2 * sum(grams.values()) if method.needs_compressed_inputs else 0
    most = sum(grams.values()) + compressed_input_grams
    for position, layer in enumerate(layers):
        own_input = statistics_input(layer)
        waiting = 0
        for name in {statistics_input(later) for later in layers[position:]} - {own_input}:
            if grams.get(name, 0) <= ACTIVATIONS_IN_MEMORY:
                waiting += grams.get(name, 0)
        own = grams.get(own_input, 0)
        most = max(most, own + waiting + compressed_input_grams + method.working_memory(layer))
    largest = max((method.working_memory(layer) for layer in layers), default=0)
    solved_beside = max(parallel_slots(largest) - 1, 0) * largest
    return most + solved_beside + CHUNKS_IN_USE * FLOAT64_BYTES * CHUNK
