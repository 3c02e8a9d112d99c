"""Gradients of the loss at the layers of each block, on a walk from the last block back to the first."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..budget import Layer
from ..calibration import (
    BlockBatch,
    GradientBatch,
    GradientSums,
    Head,
    OutputGramSums,
    SquaredGradientSums,
    backward_through_block,
    backward_through_model,
    chain_head,
    drawn_token_batches,
    first_batches,
    next_token_batches,
    pack_correlations,
    run_block,
    unpack_correlations,
)
from ..execution.work_folder import Record
from ..models.offloading import return_memory
from ..runtime.errors import CompressionError
from .fallback import BuildResult
from .kept import KeptFindings
from .session import BlockVisit, Session
from .walk import Stage, load, unload, visits, walk_back

MakeSums = Callable[[Mapping[str, nn.Module]], GradientSums]
"""Makes empty sums over the gradients at some layers."""


class WholeModelNeeded(CompressionError):
    """The blocks of a model are on disk, and they turn out to be needed all at once."""


class LossGradients:
    """The gradients of the loss at the layers of each block, from the last block to the first.

    Args:
        session: the run. Its model is still dense.
        batches: this process's calibration batches, at the first block.
        gradient_batches: those of their parts that the loss is measured on.
        numbers: the number of calibration batches that these are parts of.
        make_sums: makes the sums that are taken over the gradients.

    Raises:
        WholeModelNeeded: if the blocks are on disk, and the gradients need all of them at once.
    """

    def __init__(
        self,
        session: Session,
        batches: list[BlockBatch],
        gradient_batches: list[GradientBatch],
        numbers: int,
        make_sums: MakeSums,
    ) -> None:
        self.session = session
        self.batches = gradient_batches
        self._numbers = numbers
        self._make_sums = make_sums
        self._head = head_of(session, batches)
        self._is_chain = all(session.group.gather(self._head is not None or not batches))
        self._of_all_blocks: dict[str, Tensor] | None = None  # of a model that is no chain
        if session.offloaded is not None and not self._is_chain:
            raise WholeModelNeeded(
                f"{type(session.model).__name__} has its blocks on disk and must be in memory as a whole: "
                "its loss reads more of the blocks than what the last one gives for each token"
            )

    def keep_inputs(self, index: int) -> None:
        """Keep where the batches are as the input of a block, or with the number of blocks as that of the head."""
        for batch in self.batches:
            if self._is_chain:
                batch.keep_input(index)

    def at_layers(self, visit: BlockVisit) -> dict[str, Tensor]:
        """Return the sums at the layers of a block. The blocks are asked for from the last to the first.

        Raises:
            NumericalError: if a gradient is not finite, naming the layer.
        """
        session = self.session
        if not self._is_chain:
            of_all_blocks = self._through_model()
            return {layer.name: of_all_blocks[layer.name] for layer in visit.layers if layer.name in of_all_blocks}
        self._restore_inputs(visit)
        if any(batch.gradient is None for batch in self.batches):
            self._through_head()
        sums = self._make_sums(self._modules(visit.layers))
        backward_through_block(visit.block, visit.index, self.batches, self._numbers, sums, session.group)
        for batch in self.batches:  # what was kept for the blocks after this one
            batch.inputs = {index: kept for index, kept in batch.inputs.items() if index < visit.index}
        totals = sums.totals(session.group)
        if session.offloaded is not None:
            return_memory()
        return totals

    def _modules(self, layers: Iterable[Layer]) -> dict[str, nn.Module]:
        return {layer.name: self.session.model.get_submodule(layer.name) for layer in layers}

    def _through_model(self) -> dict[str, Tensor]:
        """Return the sums at all layers, from one pass back through the whole model."""
        if self._of_all_blocks is None:
            session = self.session
            sums = self._make_sums(self._modules(session.plan.compressed))
            backward_through_model(session.model, self.batches, self._numbers, sums, session.group)
            self._of_all_blocks = sums.totals(session.group)
        return self._of_all_blocks

    def _through_head(self) -> None:
        """Take the gradient from the loss to the output of the last block."""
        session = self.session
        session.show("measuring the loss", 0, len(session.plan.compressed))
        with head_on_device(session):
            for batch in self.batches:
                assert self._head is not None
                hidden = batch.inputs[len(session.plan.blocks)].tensor
                batch.gradient = batch.cache.put(self._head.gradient(batch, hidden))

    def _restore_inputs(self, visit: BlockVisit) -> None:
        """Compute the inputs of the blocks up to this one again, if a killed run had them."""
        blocks = self.session.plan.blocks
        last = visit.index
        if any(batch.gradient is None for batch in self.batches):
            last = len(blocks)  # the head comes first
        if all(index in batch.inputs for batch in self.batches for index in range(visit.index, last + 1)):
            return
        for batch in self.batches:
            batch.block_batch.rewind()
        for earlier in visits(self.session):
            self.keep_inputs(earlier.index)
            if earlier.index == last:
                break
            is_here = earlier.index == visit.index
            if not is_here:
                load(self.session, earlier)
            for batch in self.batches:
                forward = batch.block_batch
                forward.hidden = run_block(earlier.block, earlier.index, forward)
            if not is_here:
                unload(self.session, earlier)
        self.keep_inputs(last)


def head_of(session: Session, batches: list[BlockBatch]) -> Head | None:
    """Return the head of a model that is a chain of its blocks, as `chain_head`. Without batches there is none."""
    if not session.head_is_known:
        # A model on disk can be asked once: it no longer runs as a whole after its head was used.
        session.head = chain_head(session.model, session.plan.blocks, batches) if batches else None
        session.head_is_known = True
    return session.head


@contextmanager
def head_on_device(session: Session) -> Iterator[None]:
    """Have all of the model but its blocks on the device where blocks are computed, while active."""
    offloaded, name = session.offloaded, _name_of_head(session)
    if offloaded is not None:
        offloaded.stop_running()  # what lets it run from disk would bring all inputs to the host
        if name is not None:
            offloaded.load(name)
    of_blocks: set[nn.Module] = set()
    for block in session.plan.blocks.values():
        of_blocks.update(block.modules())
    at_home = []
    moved: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in set(session.model.modules()) - of_blocks:
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta or tensor.device == session.device:
                continue
            if tensor not in moved:
                there = tensor.detach().to(session.device)
                moved[tensor] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there
            at_home.append((module, key, tensor))
            setattr(module, key, moved[tensor])
    try:
        yield
    finally:
        for module, key, tensor in at_home:
            setattr(module, key, tensor)
        if offloaded is not None and name is not None:
            offloaded.unload(name)


def _name_of_head(session: Session) -> str | None:
    """Return the name of the output embeddings if they are on disk."""
    output = session.model.get_output_embeddings()
    if output is None or not any(parameter.is_meta for parameter in output.parameters()):
        return None
    return next(name for name, module in session.model.named_modules() if module is output)


def curvature(session: Session, batches: list[BlockBatch]) -> LossGradients:
    """Return the gradients from which the Gram matrices G of output gradients are summed."""
    used = first_batches(session.tokens)
    own = drawn_token_batches(used, batches, session.waiting, session.plan.config.seed, session.group)
    share = sum(batch.tokens for batch in used) / sum(batch.tokens for batch in session.tokens)
    return LossGradients(session, batches, own, len(used), lambda layers: OutputGramSums(layers, share))


def squared_gradients(session: Session, batches: list[BlockBatch]) -> LossGradients:
    """Return the gradients from which the squared gradients of the weights are summed."""
    own = next_token_batches(session.tokens, batches, session.waiting, session.group)
    count = len(session.tokens)
    return LossGradients(session, batches, own, count, lambda layers: SquaredGradientSums(layers, count))


def packed_output_grams(grams: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Gram matrices of output gradients, by layer, in the form in which they wait for the building."""
    tensors: dict[str, Tensor] = {}
    for name, gram in grams.items():
        scale, codes = pack_correlations(gram)
        tensors |= {f"{name}.output_scale": scale.cpu(), f"{name}.output_codes": codes.cpu()}
    return tensors


def unpacked_output_gram(name: str, tensors: dict[str, Tensor], device: torch.device) -> Tensor | None:
    """Return the Gram matrix of a layer's output gradients, float64. None if no gradient reached the layer."""
    if f"{name}.output_scale" not in tensors:
        return None
    return unpack_correlations(tensors[f"{name}.output_scale"].to(device), tensors[f"{name}.output_codes"].to(device))


def measure_loss(session: Session, batches: list[BlockBatch]) -> None:
    """Measure the gradients that a method needs before its first walk, and leave them with the session.

    The batches are at the first block, before and after.
    """
    if not session.method.needs_gradients and not session.method.needs_output_gram:
        return
    if session.method.needs_gradients:
        gradients = squared_gradients(session, batches)
        walk_back(session, _SquaredGradients(session, gradients), gradients.batches)
    if session.method.needs_output_gram:
        gradients = curvature(session, batches)
        stage = _OutputGrams(session, gradients)
        walk_back(session, stage, gradients.batches)
        session.output_grams = stage.of
    for batch in batches:
        batch.rewind()


class _GradientStage(Stage[dict[str, Tensor]]):
    """Sum the gradients at the layers of each block."""

    surveys = True

    def __init__(self, session: Session, gradients: LossGradients) -> None:
        self.session = session
        self.gradients = gradients

    def collect(self, visit: BlockVisit) -> dict[str, Tensor]:
        return self.gradients.at_layers(visit)


class _SquaredGradients(_GradientStage):
    """Leave the squared gradients with the session."""

    name = "gradients"

    def solve(self, visit: BlockVisit, statistics: dict[str, Tensor]) -> Iterable[tuple[Layer, BuildResult]]:
        visit.findings = Record({name: tensor.cpu() for name, tensor in statistics.items()}, {})
        return ()

    def accept(self, visit: BlockVisit) -> None:
        assert visit.findings is not None
        device = self.session.device
        for name, tensor in visit.findings.tensors.items():
            self.session.squared_gradients[name] = tensor.to(device)


class _OutputGrams(_GradientStage):
    """Keep the Gram matrices of output gradients."""

    name = "curvature"

    def __init__(self, session: Session, gradients: LossGradients) -> None:
        super().__init__(session, gradients)
        self._kept = KeptFindings(session, self.name)

    def solve(self, visit: BlockVisit, statistics: dict[str, Tensor]) -> Iterable[tuple[Layer, BuildResult]]:
        visit.findings = Record(packed_output_grams(statistics), {})
        return ()

    def accept(self, visit: BlockVisit) -> None:
        self._kept.put(visit)

    def of(self, visit: BlockVisit) -> dict[str, Tensor]:
        """Return the Gram matrices of a block by layer."""
        tensors, device = self._kept.of(visit).tensors, self.session.device
        grams = {layer.name: unpacked_output_gram(layer.name, tensors, device) for layer in visit.layers}
        return {name: gram for name, gram in grams.items() if gram is not None}
