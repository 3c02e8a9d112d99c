"""The Gram matrix of what the head reads: the rows that it multiplies by are rounded to suit it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..budget import Layer
from ..calibration import BlockBatch, Head, run_block
from ..calibration.grams import add_product, fill_upper_triangle
from ..calibration.hooks import temporary_hooks
from ..execution.work_folder import Record
from ..methods.second_order import shrunk
from .fallback import BuildResult
from .loss import head_of, head_on_device
from .session import BlockVisit, Session
from .walk import Stage, walk

GRAM = "gram"
"""Name of the matrix in the findings about the last block."""


def head_gram(session: Session, batches: list[BlockBatch]) -> Tensor | None:
    """Return Σ x xᵀ over the inputs x of the head of the dense model, `shrunk`, (n, n) float64.

    The batches are at the first block, before and after. Return None for a model that reads other things than text,
    or whose head reads other things than what the last block gives.
    """
    model = session.model
    if not model.can_generate() or model.config.is_encoder_decoder or any(batch.others for batch in session.tokens):
        return None
    head = head_of(session, batches)
    if not all(session.group.gather(head is not None or not batches)):
        return None
    stage = _HeadInputs(session, batches, head)
    walk(session, stage, batches)
    for batch in batches:
        batch.rewind()
    assert stage.gram is not None
    return shrunk(stage.gram, sum(batch.tokens for batch in session.tokens))


class _HeadInputs(Stage[None]):
    """Take the batches through the dense blocks, and sum over what the head reads in the end.

    Attributes:
        gram: the sum, after the last block.
    """

    name = "head"
    surveys = True

    def __init__(self, session: Session, batches: list[BlockBatch], head: Head | None) -> None:
        self.session = session
        self.batches = batches
        self.head = head
        self.gram: Tensor | None = None

    def collect(self, visit: BlockVisit) -> None:
        for batch in self.batches:
            batch.hidden = run_block(visit.block, visit.index, batch)

    def solve(self, visit: BlockVisit, statistics: None) -> Iterable[tuple[Layer, BuildResult]]:
        visit.findings = Record({}, {})
        if visit.index == len(self.session.plan.blocks) - 1:
            visit.findings = Record({GRAM: self._sum()}, {})
        return ()

    def accept(self, visit: BlockVisit) -> None:
        assert visit.findings is not None
        self.gram = visit.findings.tensors.get(GRAM)

    def _sum(self) -> Tensor:
        session = self.session
        output: Any = session.model.get_output_embeddings()
        parts: dict[str, Tensor] = {}
        with head_on_device(session), temporary_hooks([output.register_forward_pre_hook(_stopping_hook(parts))]):
            for batch in self.batches:
                assert self.head is not None and batch.source is not None
                mask = batch.source.attention_mask
                for row, (input_ids, hidden) in enumerate(zip(batch.source.input_ids, batch.hidden, strict=True)):
                    try:
                        counted = slice(None) if mask is None else mask[row].bool()
                        self.head.logits(input_ids[counted], hidden[counted])
                    except _HeadReached:
                        continue
        summed = session.group.all_reduce(parts)[GRAM]
        fill_upper_triangle(summed)
        return summed.cpu()


class _HeadReached(Exception):
    """Ends a forward pass at the head, as its logits are not needed."""


def _stopping_hook(parts: dict[str, Tensor]) -> Callable[..., None]:
    """Return a hook that adds the inputs of the head to the Gram matrix in `parts`, and ends the pass there."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).double()
        gram = parts.setdefault(GRAM, x.new_zeros(x.shape[1], x.shape[1]))
        add_product(gram, x)
        raise _HeadReached

    return hook
