"""Targets that make each layer undo what the compressed layers before it did: least squares on the compressed model's inputs.

With x the input of a layer in the dense model and x̂ in the compressed one, the layer is fitted to y = W x on x̂:
‖W X − Ŵ X̂‖² = ‖(W' − Ŵ) X̂‖² + const,  W' = W M Ĉ⁻¹,  M = Σ x x̂ᵀ,  Ĉ = Σ x̂ x̂ᵀ  (GPTAQ, arXiv 2504.02692; SAES-SVD, papers §6).
A layer that writes to the residual stream h also makes up for what the stream has lost: its target is W x + h − ĥ.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..methods.base import Statistics
from .activations import ACTIVATIONS_IN_MEMORY
from .blocks import BlockBatch, run_block
from .statistics import LayerInput, Routing, on_common_tokens, select_counted

RIDGE = 1e-3
"""Of the regression, as a share of the mean of the diagonal of Ĉ; pulls W' towards W. Few tokens add to it: n / T."""


@dataclass
class CorrectionSums:
    """What correcting a layer needs to know, float64.

    Attributes:
        gram: Ĉ, (n, n).
        shift: M − Ĉ, (n, n).
        residual: E = Σ (h − ĥ) x̂ᵀ, (m, n), for a layer that writes to the residual stream.
        tokens: number T of tokens seen.
    """

    gram: Tensor
    shift: Tensor
    residual: Tensor | None = None
    tokens: int = 0

    def target(self, weight: Tensor) -> Tensor:
        """W' (m, n): W + (W (M − Ĉ) + E)(Ĉ + λ I)⁻¹."""
        mean = self.gram.diagonal().mean()
        if not float(mean) > 0:
            return weight
        wanted = weight @ self.shift if self.residual is None else weight @ self.shift + self.residual
        ridge = RIDGE + len(self.gram) / max(self.tokens, 1)
        hessian = self.gram / mean + ridge * torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        target: Tensor = weight + torch.linalg.solve(hessian, wanted / mean, left=False)
        return target

    def statistics(self, dense: Statistics) -> Statistics:
        """The statistics of the compressed model's inputs, so far as the sums know them."""
        return replace(dense, gram=self.gram, column_norms=self.gram.diagonal().sqrt())


@torch.no_grad()
def input_stages(block: nn.Module, index: int, batch: BlockBatch, layers: dict[str, nn.Module]) -> list[list[str]]:
    """The layers in the order of the data's way, those that see the same input together; those that no token of `batch` reaches last."""
    inputs: dict[str, Tensor] = {}
    handles = [layer.register_forward_pre_hook(_keep(inputs, name)) for name, layer in layers.items()]
    run_block(block, index, batch)
    for handle in handles:
        handle.remove()
    found: dict[int, list[str]] = {}
    for name, x in inputs.items():
        found.setdefault(id(x), []).append(name)
    return [*found.values(), *([name] for name in layers if name not in inputs)]


class DenseReference:
    """What passes through a block as it was: its outputs, and at chosen layers their inputs, kept as far as they fit.

    Args:
        block: a copy of the block as it was.
        names: the first layer of every stage, named within the block.
        whole: the layer of which the output counts too.

    Attributes:
        outputs: of the block, batch by batch, (B, T, d).
    """

    @torch.no_grad()
    def __init__(
        self, block: nn.Module, index: int, batches: list[BlockBatch], names: list[str], whole: str | None
    ) -> None:
        self.block, self.index, self.batches = block, index, batches
        self.outputs: list[Tensor] = []
        self._kept: dict[tuple[int, str], _Pass] = {}
        room = ACTIVATIONS_IN_MEMORY
        for position, batch in enumerate(batches):
            seen: dict[str, _Pass] = {}
            routing = Routing()
            handles = [
                block.get_submodule(name).register_forward_hook(_keep_pass(seen, name, batch, routing, name == whole))
                for name in names
            ]
            try:
                with routing.watching(block):
                    output = run_block(block, index, batch)
            finally:
                for handle in handles:
                    handle.remove()
            self.outputs.append(output)
            for name, found in seen.items():
                room -= found.seen.x.numel() * found.seen.x.itemsize
                if room >= 0:
                    self._kept[position, name] = replace(found, block=output if name == whole else None)

    def at(self, position: int, name: str, whole: bool) -> "_Pass | None":
        """The pass of a batch at a layer; None if none of its tokens reach it."""
        return self._kept.get((position, name)) or _run(self.block, self.index, self.batches[position], name, whole)


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
    """The sums over all batches of the group for layers that share an input; None if no token reached them in both models.

    Args:
        dense: the same batches through a copy of the block as it was.
        block: the block, some of it compressed.
        names: the layers, named within the block.
        writer: how the layer writes to the residual stream: "input" if the stream before it is the block's input, "output" if the
            layer is the block's last, None if it writes elsewhere.
    """
    total: CorrectionSums | None = None
    for position, batch in enumerate(batches):
        call, shifted = batch.calls[index], batch.compressed_twin
        if call is None or shifted is None:
            continue
        whole = writer == "output"
        here, there = dense.at(position, names[0], whole), _run(block, index, shifted, names[0], whole)
        if here is None or there is None:
            continue
        seen = on_common_tokens(here.seen, there.seen)
        if seen[0].x.shape != seen[1].x.shape:  # experts that are no bank, with other tokens
            continue
        x, x_hat = (
            select_counted(each.x, call.mask, each.tokens).float() for each in seen
        )  # products of one batch; sums are float64
        gram, shift, residual = (x_hat.T @ x_hat).double(), ((x - x_hat).T @ x_hat).double(), None
        if writer is not None:
            lost = here.stream() - there.stream() if whole else batch.hidden.double() - shifted.hidden.double()
            residual = (select_counted(lost, call.mask).float().T @ x_hat).double()
        if total is not None:
            gram, shift = gram + total.gram, shift + total.shift
            residual = None if residual is None or total.residual is None else residual + total.residual
        total = CorrectionSums(gram, shift, residual, len(x) + (total.tokens if total else 0))
    tokens = sum(group.gather(total.tokens if total else 0))
    parts = {} if total is None else {"gram": total.gram, "shift": total.shift, "residual": total.residual}
    summed = group.all_reduce({name: tensor for name, tensor in parts.items() if tensor is not None})
    return CorrectionSums(summed["gram"], summed["shift"], summed.get("residual"), tokens) if summed else None


@torch.no_grad()
def are_residual_writers(block: nn.Module, index: int, batch: BlockBatch, candidates: dict[str, nn.Module]) -> bool:
    """Whether the block's output is its input plus the outputs of these layers, tried out with random ones in their place."""
    if not candidates:
        return False
    generator = torch.Generator().manual_seed(0)
    expected = batch.hidden.double()
    handles = []
    for layer in candidates.values():
        noise = torch.randn(batch.hidden.shape, generator=generator).to(batch.hidden)
        expected = expected + noise.double()
        handles.append(layer.register_forward_hook(lambda module, inputs, output, noise=noise: noise.view_as(output)))
    try:
        found = run_block(block, index, batch).double()
    finally:
        for handle in handles:
            handle.remove()
    tolerance = 4 * len(candidates) * torch.finfo(batch.hidden.dtype).eps
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


@dataclass(frozen=True)
class _Pass:
    """Input of a layer; its output and that of its block if they were asked for."""

    seen: LayerInput
    y: Tensor | None
    block: Tensor | None = None

    def stream(self) -> Tensor:
        """The residual stream before the layer, which is the block's last: what its output is added to, float64."""
        assert self.y is not None and self.block is not None, "asked for"
        return self.block.double() - self.y.double()


class _Reached(Exception):
    """Ends a block's forward pass once the layer of interest has run."""


def _run(block: nn.Module, index: int, batch: BlockBatch, name: str, whole: bool) -> _Pass | None:
    seen: dict[str, _Pass] = {}
    routing = Routing()
    keep = _keep_pass(seen, name, batch, routing, whole)

    def reach(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(module, inputs, output)
        if not whole:
            raise _Reached

    output = None
    handle = block.get_submodule(name).register_forward_hook(reach)
    try:
        with routing.watching(block):
            output = run_block(block, index, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return replace(seen[name], block=output) if name in seen else None


def _keep_pass(seen: dict[str, _Pass], name: str, batch: BlockBatch, routing: Routing, output: bool) -> Any:
    """A hook that keeps the first input of a layer, and its output if that is asked for, token by token where it has all of them."""
    tokens = batch.hidden.shape[:2]

    def aligned(x: Tensor) -> Tensor:
        return x.view(*tokens, -1) if x.shape[:-1].numel() == tokens.numel() else x

    def hook(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        if name not in seen:
            x = aligned(inputs[0]) if routing.tokens is None else inputs[0]
            seen[name] = _Pass(LayerInput(x, routing.tokens), aligned(y) if output else None)

    return hook


def _keep(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[name] = arguments[0]

    return hook
