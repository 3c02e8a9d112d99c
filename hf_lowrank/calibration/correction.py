"""Targets with which each layer makes up for the errors of the compressed layers before it.

With x the input of a layer in the dense model and x̂ its input in the compressed model, the layer is fitted to y = W x
on x̂. That is a least-squares problem:

    ‖W X − Ŵ X̂‖² = ‖(W' − Ŵ) X̂‖² + const,   W' = W M Ĉ⁻¹,   M = Σ x x̂ᵀ,   Ĉ = Σ x̂ x̂ᵀ

(GPTAQ, arXiv 2504.02692; SAES-SVD, arXiv 2602.03051). A layer that writes to the residual stream h also makes up for
the error of the stream: its target is W x + h − ĥ.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..methods import Statistics
from .activations import ACTIVATIONS_IN_MEMORY, CachedTensor
from .blocks import BlockBatch, run_block
from .grams import add_product, fill_upper_triangle, products_of
from .hooks import temporary_hooks
from .statistics import LayerInput, Routing, on_common_tokens, select_counted

RIDGE = 1e-3
"""Ridge of the regression for T → ∞, as a share of the mean of the diagonal of Ĉ. It pulls W' towards W.

With few tokens the ridge is larger: n / T is added to it.
"""


@dataclass
class CorrectionSums:
    """Sums over tokens from which the target of a layer follows, float64.

    Attributes:
        gram: Ĉ = Σ x̂ x̂ᵀ, (n, n).
        difference: M − Ĉ = Σ (x − x̂) x̂ᵀ, (n, n).
        residual: E = Σ (h − ĥ) x̂ᵀ, (m, n). None for a layer that does not write to the residual stream.
        tokens: number T of tokens in the sums.
    """

    gram: Tensor
    difference: Tensor
    residual: Tensor | None = None
    tokens: int = 0

    def target(self, weight: Tensor) -> Tensor:
        """Return W' = W + (W (M − Ĉ) + E)(Ĉ + λ I)⁻¹, (m, n), for the dense weight W (m, n)."""
        mean = self.gram.diagonal().mean()
        if not float(mean) > 0:  # all inputs are zero: any weight is a solution
            return weight
        error = weight @ self.difference
        if self.residual is not None:
            error = error + self.residual
        ridge = RIDGE + len(self.gram) / max(self.tokens, 1)
        # Both sides are divided by the mean, so that the ridge does not depend on the scale of the inputs.
        hessian = self.gram / mean + ridge * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        # The correction is solved for, not W' itself: the ridge then pulls W' towards W, not towards zero.
        target: Tensor = weight + torch.linalg.solve(hessian, error / mean, left=False)
        return target

    def statistics(self, dense: Statistics) -> Statistics:
        """Return the dense statistics with the Gram matrix and the column norms of the compressed model's inputs."""
        return replace(dense, gram=self.gram, column_norms=self.gram.diagonal().sqrt())


@torch.no_grad()
def input_stages(block: nn.Module, index: int, batch: BlockBatch, layers: dict[str, nn.Module]) -> list[list[str]]:
    """Group the layers by the input that they share, in the order in which a forward pass reaches them.

    A layer that no token of `batch` reaches is a group by itself, after all others.
    """
    inputs: dict[str, Tensor] = {}
    handles = [layer.register_forward_pre_hook(_input_hook(inputs, name)) for name, layer in layers.items()]
    with temporary_hooks(handles):
        run_block(block, index, batch)
    stages: dict[int, list[str]] = {}
    for name, x in inputs.items():  # `inputs` keeps the tensors alive, so that their ids stay different
        stages.setdefault(id(x), []).append(name)
    # An expert to which the first batch sends no token may get some in others.
    unreached = [[name] for name in layers if name not in inputs]
    return [*stages.values(), *unreached]


def _input_hook(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return a hook that puts the input of a layer into `inputs`."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[name] = arguments[0]

    return hook


class DenseReference:
    """Forward passes through a dense block: the outputs of the block, and the inputs of chosen layers.

    The inputs are kept as far as they fit into `ACTIVATIONS_IN_MEMORY` bytes. The others are computed again when they
    are used.

    Args:
        block: a copy of the dense block.
        index: index of the block in the model.
        batches: the batches at the input of the block.
        names: the first layer of every stage, named within the block.
        output_of: the layer whose output is kept beside its input. None for no layer.

    Attributes:
        outputs: the outputs of the block, batch by batch, (B, T, d), in the caches of the batches.
    """

    @torch.no_grad()
    def __init__(
        self, block: nn.Module, index: int, batches: list[BlockBatch], names: list[str], output_of: str | None
    ) -> None:
        self.block = block
        self.index = index
        self.batches = batches
        self.outputs: list[CachedTensor] = []
        self._kept: dict[tuple[int, str], _LayerPass] = {}
        free_bytes = ACTIVATIONS_IN_MEMORY
        for position, batch in enumerate(batches):
            passes = self._forward(batch, names, output_of)
            for name, layer_pass in passes.items():
                # Once an input does not fit, none after it is kept either.
                free_bytes -= layer_pass.input.x.numel() * layer_pass.input.x.itemsize
                if free_bytes >= 0:
                    self._kept[position, name] = layer_pass

    def _forward(self, batch: BlockBatch, names: list[str], output_of: str | None) -> "dict[str, _LayerPass]":
        """Run the block, keep its output, and return the passes at the named layers."""
        passes: dict[str, _LayerPass] = {}
        routing = Routing()
        handles = []
        for name in names:
            hook = _pass_hook(passes, name, batch, routing, with_output=name == output_of)
            handles.append(self.block.get_submodule(name).register_forward_hook(hook))
        with temporary_hooks(handles), routing.watching(self.block):
            output = run_block(self.block, self.index, batch)
        self.outputs.append(batch.cache.put(output))
        if output_of is not None and output_of in passes:
            passes[output_of] = replace(passes[output_of], block_output=output)
        return passes

    def at(self, position: int, name: str, with_output: bool) -> "_LayerPass | None":
        """Return the pass of a batch at a layer. None if none of its tokens reach the layer."""
        kept = self._kept.get((position, name))
        if kept is not None:
            return kept
        return _pass_at_layer(self.block, self.index, self.batches[position], name, with_output)


@torch.no_grad()
def correction_sums(
    dense: DenseReference,
    block: nn.Module,
    index: int,
    batches: list[BlockBatch],
    names: list[str],
    writer: str | None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> CorrectionSums | None:
    """Sum over all batches of the group for layers that share an input.

    Return None if no token reaches the layers in both models.

    Args:
        dense: the batches in a dense copy of the block.
        block: the block. Some of its layers are compressed by now.
        index: index of the block in the model.
        batches: the batches at the input of the block, with their compressed twins.
        names: the layers, named within the block.
        writer: how the layer writes to the residual stream. "input" if the stream before the layer is the block's
            input, "output" if the layer is the block's last, None if it does not write to the stream.
    """
    parts: dict[str, Tensor] = {}  # a process whose batches do not reach the layers adds nothing
    own_tokens = 0
    for position, batch in enumerate(batches):
        # The first layer stands for all, as they see the same input.
        own_tokens += _add_batch(parts, dense, block, index, batch, position, names[0], writer)
    tokens = sum(group.gather(own_tokens))
    if parts:
        fill_upper_triangle(parts["gram"])
    summed = group.all_reduce(parts)
    if not summed:
        return None
    return CorrectionSums(summed["gram"], summed["difference"], summed.get("residual"), tokens)


def _add_batch(
    parts: dict[str, Tensor],
    dense: DenseReference,
    block: nn.Module,
    index: int,
    batch: BlockBatch,
    position: int,
    name: str,
    writer: str | None,
) -> int:
    """Add the tokens of one batch that reach the layer in both models to the sums, and return their number.

    Args:
        parts: the sums by name; of the Gram matrix only the lower triangle. Empty before the first batch.
    """
    call = batch.calls[index]
    twin = batch.compressed_twin
    if call is None or twin is None:
        return 0
    is_last = writer == "output"
    dense_pass = dense.at(position, name, is_last)
    compressed_pass = _pass_at_layer(block, index, twin, name, is_last)
    if dense_pass is None or compressed_pass is None:
        return 0
    dense_input, compressed_input = on_common_tokens(dense_pass.input, compressed_pass.input)
    if dense_input.x.shape != compressed_input.x.shape:  # an expert outside a bank, which got other tokens
        return 0
    # Float32 is precise enough for the products of one batch, the sums over batches are float64.
    x = select_counted(dense_input.x, call.mask, dense_input.tokens).float()
    x_hat = select_counted(compressed_input.x, call.mask, compressed_input.tokens).float()
    # M − Ĉ is summed by itself: as a difference of two nearly equal sums it would lose its digits.
    left = {"difference": x - x_hat}
    if writer is not None:
        # The stream before the last writer is the block's output without the writer's own.
        if is_last:
            stream_error = dense_pass.residual_stream() - compressed_pass.residual_stream()
        else:
            stream_error = batch.hidden.double() - twin.hidden.double()
        left["residual"] = select_counted(stream_error, call.mask).float()
    if not parts:
        features = x_hat.shape[1]
        parts["gram"] = x_hat.new_zeros(features, features, dtype=torch.float64)
        for part, errors in left.items():
            parts[part] = x_hat.new_zeros(errors.shape[1], features, dtype=torch.float64)
    dtype = compressed_input.x.dtype
    with products_of(dtype):
        add_product(parts["gram"], x_hat)
        for part, errors in left.items():
            # Beside inputs in bfloat16 their errors are rounded to it, too, which averages out over the tokens.
            rounded = errors.to(dtype).float() if dtype == torch.bfloat16 else errors
            parts[part] += rounded.T @ x_hat
    return len(x)


@torch.no_grad()
def are_residual_writers(block: nn.Module, index: int, batch: BlockBatch, candidates: dict[str, nn.Module]) -> bool:
    """Return whether the block's output is its input plus the outputs of these layers.

    It is found out by a forward pass with random outputs in place of the layers' own.
    """
    if not candidates:
        return False
    # Normalization, scaling or an activation between a layer and the stream changes the sum.
    generator = torch.Generator().manual_seed(0)
    expected = batch.hidden.double()
    handles = []
    for layer in candidates.values():
        noise = torch.randn(batch.hidden.shape, generator=generator).to(batch.hidden)
        expected = expected + noise.double()
        handles.append(layer.register_forward_hook(_replacing_hook(noise)))
    with temporary_hooks(handles):
        output = run_block(block, index, batch).double()
    tolerance = 4 * len(candidates) * torch.finfo(batch.hidden.dtype).eps  # rounding of the block's own additions
    return output.shape == expected.shape and bool((output - expected).norm() <= tolerance * expected.norm())


def _replacing_hook(noise: Tensor) -> Callable[..., Tensor]:
    """Return a hook that gives `noise` in place of a layer's output."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return noise.view_as(output)

    return hook


@dataclass(frozen=True)
class _LayerPass:
    """One batch at a layer.

    Attributes:
        input: the input of the layer.
        output: the output of the layer, (B, T, m). None if it was not asked for.
        block_output: the output of the layer's block, (B, T, d). None if `output` is None.
    """

    input: LayerInput
    output: Tensor | None
    block_output: Tensor | None = None

    def residual_stream(self) -> Tensor:
        """Return the residual stream to which the last layer of a block adds its output, float64."""
        assert self.output is not None and self.block_output is not None, "the output was asked for"
        return self.block_output.double() - self.output.double()


class _LayerReached(Exception):
    """Ends a block's forward pass once the layer of interest has run."""


def _pass_at_layer(block: nn.Module, index: int, batch: BlockBatch, name: str, with_output: bool) -> _LayerPass | None:
    """Run a block as far as one of its layers, or to its end if its output is asked for."""
    passes: dict[str, _LayerPass] = {}
    routing = Routing()
    record = _pass_hook(passes, name, batch, routing, with_output)

    def record_and_stop(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        record(module, inputs, output)
        # The rest of the block is computed only for the sake of its output.
        if not with_output:
            raise _LayerReached

    block_output = None
    handle = block.get_submodule(name).register_forward_hook(record_and_stop)
    try:
        with temporary_hooks([handle]), routing.watching(block):
            block_output = run_block(block, index, batch)
    except _LayerReached:
        pass
    if name not in passes:
        return None
    return replace(passes[name], block_output=block_output)


def _pass_hook(
    passes: dict[str, _LayerPass], name: str, batch: BlockBatch, routing: Routing, with_output: bool
) -> Callable[..., None]:
    """Return a hook that puts the first pass at a layer into `passes`, its output only if `with_output`."""
    batch_shape = batch.hidden.shape[:2]

    def by_token(x: Tensor) -> Tensor:
        """View (B T, n) as (B, T, n), to which masks and the residual stream fit."""
        return x.view(*batch_shape, -1) if x.shape[:-1].numel() == batch_shape.numel() else x

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if name in passes:
            return
        x = inputs[0]
        if routing.tokens is None:  # an expert's tokens have no place in the batch by themselves
            x = by_token(x)
        passes[name] = _LayerPass(LayerInput(x, routing.tokens), by_token(output) if with_output else None)

    return hook
