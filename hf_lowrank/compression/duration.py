"""How long a compression will take on this machine: its operations are counted, and small pieces of the same work are timed."""

import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..budget import Budget, Layer
from ..calibration.batches import sequence_length
from ..calibration.curvature import ENOUGH_TOKENS
from ..calibration.statistics import TOKENS_AT_ONCE
from ..methods import Method, Statistics, make_method
from ..methods.mixed import MixedMethod
from ..methods.spectral import SpectralMethod
from ..models.architectures import find_blocks, find_layers, separate_experts
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from .estimate import statistics_input
from .report import relative_error
from .selection import select_layers

SECONDS_FOR_SHAPES = 2.0
"""About how long layers are made to see how long that takes, all shapes together."""
SMALLEST_SIDE = 64
"""Of a layer that is made for that; each next one has twice the side, until the time is spent or the real size reached."""
WARM = 0.05
"""Seconds of tries after which a pace is that of a long run."""
PROBE_SIDE = 1024
"""Of a matrix product whose pace is measured."""
TOUCHES = 3
"""How often each input and output of a linear layer is read or written beside its product: norms, activations, residuals."""
EXPERT = re.compile(r"\.experts\.\d+\.")
GRADIENT_PASSES = 3
"""What one pass forward and backward costs, in passes."""


@dataclass(frozen=True)
class Duration:
    """Seconds, each part on its own; reading from a slow disk is not among them.

    Attributes:
        start: of Python and its libraries, as long as it took to come here.
        calibration: passes of the tokens through the blocks, and sums over them.
        solving: decompositions, and the measurement of each layer.
        files: checksums of the dense model and of the result.
    """

    start: float
    calibration: float
    solving: float
    files: float

    @property
    def total(self) -> float:
        return self.start + self.calibration + self.solving + self.files


@dataclass(frozen=True)
class Passes:
    """How often all calibration tokens go through a block, and how often their Gram matrices are summed."""

    forward: float
    sums: int


def duration(dense: PreTrainedModel, config: CompressionConfig) -> Duration:
    """What compressing a model of this skeleton takes, without sampling its calibration text and without training.

    Takes a few seconds itself.
    """
    start = time.process_time()
    method = make_method(config.method, config.options)
    blocks = find_blocks(dense)
    separate_experts(blocks)
    layers, _ = select_layers(dense, find_layers(blocks), method, config)
    sizes = sum(parameter.numel() * parameter.itemsize for parameter in dense.parameters())
    return Duration(
        start=start,
        calibration=_calibration(dense, config, method, find_layers(blocks)),
        solving=_solving(method, layers, config.ratio, dense.dtype.itemsize * 8),
        files=(2 - config.ratio) * sizes / _hashed_per_second(),
    )


def _passes(method: Method) -> Passes:
    """Of the strategies: the capture of inputs, and then for every block its statistics and its outputs."""
    if isinstance(
        method, MixedMethod
    ):  # survey, dense passes, the stages of a block, each of which stops at its layers
        return Passes(6, 3)
    if isinstance(method, SpectralMethod):
        return Passes(3, 2)
    if method.needs_compressed_inputs:
        return Passes(5, 3)
    return Passes(3 if method.sequential else 2, 1)


def _calibration(dense: PreTrainedModel, config: CompressionConfig, method: Method, layers: list[Layer]) -> float:
    length = sequence_length(dense, config)
    tokens = config.samples * length
    passes = _passes(method)
    forward = passes.forward * tokens
    if method.needs_gradients:
        forward += GRADIENT_PASSES * tokens
    if method.needs_output_gram:
        forward += GRADIENT_PASSES * min(tokens, ENOUGH_TOKENS)
    seen = _seen(dense, layers)
    multiplied = sum(layer.out_features * layer.in_features * seen[layer.name] for layer in layers)
    touched = TOUCHES * sum((layer.out_features + layer.in_features) * seen[layer.name] for layer in layers)
    scores = 3 * length * len({layer.block for layer in layers}) * dense.config.get_text_config().num_attention_heads
    inputs = {(layer.block, statistics_input(layer)): layer.in_features**2 * seen[layer.name] for layer in layers}
    sums = passes.sums * tokens * sum(inputs.values()) if method.needs_gram else 0
    precise = torch.float64 if dense.dtype.itemsize > 2 else torch.float32
    return (
        2 * forward * multiplied / _multiplied_per_second(dense.dtype)
        + forward * (touched + scores) / _touched_per_second(dense.dtype)
        + 2 * sums / _multiplied_per_second(precise)
    )


def _seen(dense: PreTrainedModel, layers: list[Layer]) -> dict[str, float]:
    """The share of the tokens that each layer sees: an expert's, of those that are sent to it and the others of its bank."""
    parallel_slots = getattr(dense.config.get_text_config(), "num_experts_per_tok", None) or 1
    banks = {layer.name: EXPERT.sub(".experts.*.", layer.name) for layer in layers}
    sizes = Counter(banks.values())
    return {name: min(parallel_slots / sizes[bank], 1.0) if bank != name else 1.0 for name, bank in banks.items()}


def _solving(method: Method, layers: list[Layer], ratio: float, value_bits: int) -> float:
    shapes = Counter((layer.out_features, layer.in_features) for layer in layers)
    return sum(
        count * _layer_seconds(method, shape, ratio, value_bits, SECONDS_FOR_SHAPES / len(shapes))
        for shape, count in shapes.items()
    )


def _layer_seconds(method: Method, shape: tuple[int, int], ratio: float, value_bits: int, limit: float) -> float:
    """The time for a layer (m, n): taken from smaller layers of the same proportions, up to what `limit` seconds allow."""
    sides: list[float] = []
    seconds: list[float] = []
    for doublings in itertools.count():
        scale = min(SMALLEST_SIDE * 2**doublings / max(shape), 1.0)
        m, n = (max(round(side * scale), 1) for side in shape)
        try:
            taken = _timed(_task(method, m, n, ratio, value_bits))
        except CompressionError:  # too small for anything
            taken = 0.0
        if taken:
            sides, seconds = [*sides, scale], [*seconds, taken]
        if scale == 1 or taken > limit / 8:  # the next one takes up to eight times as long
            break
    if not seconds or sides[-1] == 1:
        return seconds[-1] if seconds else 0.0
    return extrapolated(sides, seconds, (1, 2, 3) if method.factorizes else (1, 2))


def extrapolated(sides: list[float], seconds: list[float], powers: tuple[int, ...]) -> float:
    """The time at side 1 from those at smaller sides: a sum of at most two of the powers, none below 0, of least relative squares.

    More of them would follow the noise of the times.
    """
    best, least = seconds[-1] / sides[-1] ** powers[-1], float("inf")
    for count in range(1, min(len(sides), 2) + 1):
        for some in itertools.combinations(powers, count):
            matrix = torch.tensor(
                [[side**power / taken for power in some] for side, taken in zip(sides, seconds, strict=True)]
            ).double()
            solution = torch.linalg.lstsq(matrix, torch.ones(len(sides), 1, dtype=torch.float64)).solution
            error = float((matrix @ solution - 1).square().sum())
            if bool((solution >= 0).all()) and error < least:
                best, least = float(solution.sum()), error
    return best


def _task(method: Method, m: int, n: int, ratio: float, value_bits: int) -> Callable[[], object]:
    """Making and measuring a layer of random weights and statistics."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs, outputs = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (n, n), (m, m))
    )
    gram = inputs.T @ inputs
    statistics = Statistics(
        tokens=n,
        column_norms=gram.diagonal().sqrt(),
        mean=inputs.mean(dim=0),
        mean_abs=inputs.abs().mean(dim=0),
        gram=gram if method.needs_gram else None,
        squared_gradients=torch.ones(n, dtype=torch.float64) if method.needs_gradients else None,
        compressed_input_gram=gram if method.needs_compressed_inputs else None,
        cross_gram=gram if method.needs_compressed_inputs else None,
        output_gram=outputs.T @ outputs if method.needs_output_gram else None,
    )
    budget = Budget(int((1 - ratio) * m * n * value_bits), m, n, value_bits)

    def task() -> Tensor | float:
        made = method.decompose(weight, statistics, budget).to_layer(m, n, dtype=torch.bfloat16)
        return relative_error(weight, made.to_dense(weight.dtype), statistics)

    return task


def _multiplied_per_second(dtype: torch.dtype) -> float:
    """Floating-point operations of a matrix product in this dtype."""
    left, right = (
        torch.ones(TOKENS_AT_ONCE // 2, PROBE_SIDE, dtype=dtype),
        torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype),
    )
    return 2 * left.numel() * PROBE_SIDE / _timed(lambda: left @ right)


def _touched_per_second(dtype: torch.dtype) -> float:
    """Values that are read, changed and written, in memory that is there: how long it takes to get some differs from call to call."""
    values = torch.ones(TOKENS_AT_ONCE, PROBE_SIDE, dtype=dtype)
    changed = torch.empty_like(values)
    return values.numel() / _timed(lambda: torch.mul(torch.sigmoid(values, out=changed), values, out=changed))


def _hashed_per_second() -> float:
    content = bytes(2**24)
    return len(content) / _timed(lambda: hashlib.sha256(content).digest())


def _timed(task: Callable[[], object]) -> float:
    """Seconds, the least of some tries, as the first ones find caches cold; of one thread, without what other programs took of them."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < WARM:
        before = time.perf_counter(), time.process_time()
        task()
        wall, processor = time.perf_counter() - before[0], time.process_time() - before[1]
        taken.append(min(wall, processor or wall))  # some clocks are too coarse for small tasks
    return min(taken)
