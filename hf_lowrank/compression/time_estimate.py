"""Estimate of the time that a compression takes: its operations are counted, and small pieces of it are timed."""

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
from ..calibration.grams import products_of
from ..calibration.statistics import TOKENS_AT_ONCE
from ..methods import Method, Statistics, make_method
from ..models.architectures import find_blocks, find_layers, separate_experts
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from .report import relative_error
from .selection import select_layers
from .strategies import strategy_of
from .strategies.base import statistics_input

SECONDS_FOR_SHAPES = 2.0
"""Seconds to spend on trial layers, all shapes together."""
SMALLEST_SIDE = 64
"""Longer side of the first trial layer. Each next one is twice as large, until the time is spent."""
WARM_UP_SECONDS = 0.05
"""Seconds of trials after which the pace is that of a long run."""
PROBE_SIDE = 1024
"""Side of the matrix product whose pace is measured."""
TOUCHES = 3
"""Reads and writes of each input and output of a linear layer beside its product: in norms, activations, residuals."""
EXPERT = re.compile(r"\.experts\.\d+\.")
PASSES_WITH_GRADIENT = 3
"""Cost of one pass forward and backward, in forward passes."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of this machine for each part of a compression. Reading from a slow disk is not counted.

    Attributes:
        start: Python and its libraries, as long as it took to come here.
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


def estimate_time(dense: PreTrainedModel, config: CompressionConfig) -> TimeEstimate:
    """Estimate how long a compression takes, without sampling its calibration text and without training.

    This takes a few seconds itself.

    Args:
        dense: the skeleton of the model. Its fused experts are separated.
        config: a recipe with the ratio that the plan has decided on (`Plan.config`).
    """
    start = time.process_time()
    method = make_method(config.method, config.options)
    blocks = find_blocks(dense)
    separate_experts(blocks)
    layers, _ = select_layers(dense, find_layers(blocks), method, config.ratio, config.modules_to_not_convert)
    model_bytes = sum(parameter.numel() * parameter.itemsize for parameter in dense.parameters())
    return TimeEstimate(
        start=start,
        calibration=_calibration_seconds(dense, config, method, find_layers(blocks)),
        solving=_solving_seconds(method, layers, config.ratio, dense.dtype.itemsize * 8),
        files=(2 - config.ratio) * model_bytes / _hashed_bytes_per_second(),
    )


def _calibration_seconds(
    dense: PreTrainedModel, config: CompressionConfig, method: Method, layers: list[Layer]
) -> float:
    length = sequence_length(dense, config)
    tokens = config.samples * length
    passes = strategy_of(method).passes(method)
    forward = passes.forward * tokens
    if method.needs_gradients:
        forward += PASSES_WITH_GRADIENT * tokens
    if method.needs_output_gram:
        forward += PASSES_WITH_GRADIENT * min(tokens, ENOUGH_TOKENS)
    shares = _token_shares(dense, layers)
    multiplied = sum(layer.out_features * layer.in_features * shares[layer.name] for layer in layers)
    touched = TOUCHES * sum((layer.out_features + layer.in_features) * shares[layer.name] for layer in layers)
    attention_blocks = len({layer.block for layer in layers})
    scores = 3 * length * attention_blocks * dense.config.get_text_config().num_attention_heads
    # Layers that see the same input share one sum.
    gram_values = {}
    for layer in layers:
        gram_values[layer.block, statistics_input(layer)] = layer.in_features**2 * shares[layer.name]
    sums = passes.sums * tokens * sum(gram_values.values()) if method.needs_gram else 0
    if method.needs_output_gram:
        output_values = sum(layer.out_features**2 * shares[layer.name] for layer in layers)
        sums += min(tokens, ENOUGH_TOKENS) * output_values / 2  # a symmetric matrix takes half of the products
    sum_dtype = torch.float64 if dense.dtype.itemsize > 2 else torch.float32
    with products_of(dense.dtype):
        sum_pace = _operations_per_second(sum_dtype)
    return (
        2 * forward * multiplied / _operations_per_second(dense.dtype)
        + forward * (touched + scores) / _touched_values_per_second(dense.dtype)
        + 2 * sums / sum_pace
    )


def _token_shares(dense: PreTrainedModel, layers: list[Layer]) -> dict[str, float]:
    """Return the share of the tokens that each layer sees. An expert sees those that the router sends to it."""
    experts_per_token = getattr(dense.config.get_text_config(), "num_experts_per_tok", None) or 1
    banks = {layer.name: EXPERT.sub(".experts.*.", layer.name) for layer in layers}
    bank_sizes = Counter(banks.values())
    shares = {}
    for name, bank in banks.items():
        is_expert = bank != name
        shares[name] = min(experts_per_token / bank_sizes[bank], 1.0) if is_expert else 1.0
    return shares


def _solving_seconds(method: Method, layers: list[Layer], ratio: float, value_bits: int) -> float:
    shapes = Counter((layer.out_features, layer.in_features) for layer in layers)
    seconds = 0.0
    for shape, count in shapes.items():
        limit = SECONDS_FOR_SHAPES / len(shapes)
        seconds += count * _layer_seconds(method, shape, ratio, value_bits, limit)
    return seconds


def _layer_seconds(method: Method, shape: tuple[int, int], ratio: float, value_bits: int, limit: float) -> float:
    """Return the time for a layer (m, n), from smaller layers of its proportions that take about `limit` seconds."""
    scales: list[float] = []
    seconds: list[float] = []
    for doublings in itertools.count():
        scale = min(SMALLEST_SIDE * 2**doublings / max(shape), 1.0)
        m, n = (max(round(side * scale), 1) for side in shape)
        try:
            trial = _timed(_trial_task(method, m, n, ratio, value_bits))
        except CompressionError:  # such a small layer has no budget for anything
            trial = 0.0
        if trial:
            scales.append(scale)
            seconds.append(trial)
        # The next trial takes up to eight times as long: work grows with the third power of the side.
        if scale == 1 or trial > limit / 8:
            break
    if not seconds:
        return 0.0
    if scales[-1] == 1:
        return seconds[-1]
    return extrapolated(scales, seconds, (1, 2, 3) if method.factorizes else (1, 2))


def extrapolated(sides: list[float], seconds: list[float], powers: tuple[int, ...]) -> float:
    """Return the time at side 1, extrapolated from those at smaller sides.

    The time is a sum of at most two of the powers of the side, with no negative term, of least relative squares. More
    terms would follow the noise of the times.
    """
    best, least_error = seconds[-1] / sides[-1] ** powers[-1], float("inf")
    for count in range(1, min(len(sides), 2) + 1):
        for chosen_powers in itertools.combinations(powers, count):
            rows = []
            for side, taken in zip(sides, seconds, strict=True):
                rows.append([side**power / taken for power in chosen_powers])
            matrix = torch.tensor(rows).double()
            ones = torch.ones(len(sides), 1, dtype=torch.float64)
            solution = torch.linalg.lstsq(matrix, ones).solution
            error = float((matrix @ solution - 1).square().sum())
            if bool((solution >= 0).all()) and error < least_error:
                best, least_error = float(solution.sum()), error
    return best


def _trial_task(method: Method, m: int, n: int, ratio: float, value_bits: int) -> Callable[[], object]:
    """Return a task that decomposes and measures a layer of random weights and statistics."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, inputs, outputs = random(m, n), random(n, n), random(m, m)
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

    def task() -> float:
        layer = method.decompose(weight, statistics, budget).to_layer(m, n, dtype=torch.bfloat16)
        return relative_error(weight, layer.to_dense(weight.dtype), statistics)

    return task


def _operations_per_second(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a matrix product in this dtype."""
    left = torch.ones(TOKENS_AT_ONCE // 2, PROBE_SIDE, dtype=dtype)
    right = torch.ones(PROBE_SIDE, PROBE_SIDE, dtype=dtype)
    return 2 * left.numel() * PROBE_SIDE / _timed(lambda: left @ right)


def _touched_values_per_second(dtype: torch.dtype) -> float:
    """Return how many values per second are read, changed and written."""
    values = torch.ones(TOKENS_AT_ONCE, PROBE_SIDE, dtype=dtype)
    # The memory of the result is there beforehand: how long it takes to get some differs from call to call.
    changed = torch.empty_like(values)
    return values.numel() / _timed(lambda: torch.mul(torch.sigmoid(values, out=changed), values, out=changed))


def _hashed_bytes_per_second() -> float:
    content = bytes(2**24)
    return len(content) / _timed(lambda: hashlib.sha256(content).digest())


def _timed(task: Callable[[], object]) -> float:
    """Return the seconds that a task takes: the least of some trials, as the first ones find caches cold.

    The time that other programs took of this one's thread is left out.
    """
    trials: list[float] = []
    while len(trials) < 2 or sum(trials) < WARM_UP_SECONDS:
        wall_start, processor_start = time.perf_counter(), time.process_time()
        task()
        wall, processor = time.perf_counter() - wall_start, time.process_time() - processor_start
        # Some clocks of processor time are too coarse for small tasks, and show 0.
        trials.append(min(wall, processor or wall))
    return min(trials)
