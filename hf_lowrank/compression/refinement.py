"""After any strategy: every compressed block is trained to give the outputs of the dense block again."""

from collections.abc import Iterable
from dataclasses import asdict

from transformers import PreTrainedModel

from ..budget import Layer
from ..calibration import BlockBatch, block_statistics, capture, run_block
from ..execution.work_folder import Record
from ..models.linears import dense_weight
from ..runtime.layers import CompressedLinear
from .block_training import reason_not_to_train, train_block
from .collecting import no_data
from .fallback import BuildResult
from .report import BlockRefinement, LayerReport
from .session import BlockVisit, Session
from .solving import report_on, survey_layers
from .walk import Stage, walk


def refine(session: Session, dense: PreTrainedModel) -> None:
    """Refine every block on the inputs that the refined blocks before it give, and report on its layers again.

    Args:
        dense: the model as it was, with its neurons in the order in which the method put them.
    """
    blocks = {name: dense.get_submodule(name) for name in session.plan.blocks}
    batches = capture(dense, blocks, session.group.split(session.tokens), left_dense=session.plan.dense_blocks)
    for batch in batches:
        batch.track_compressed()
    session.log.refinement = []
    walk(session, _Refine(session, dense, batches), batches)


class _Refine(Stage[None]):
    """Train a block in place. It replaces no layer: the trained values are its findings."""

    name = "refined"
    surveys = True

    def __init__(self, session: Session, dense: PreTrainedModel, batches: list[BlockBatch]) -> None:
        self.session = session
        self.dense = dense
        self.batches = batches
        self._report_positions = {report.name: position for position, report in enumerate(session.log.reports)}

    def collect(self, visit: BlockVisit) -> None:
        """Nothing is collected before the training."""

    def solve(self, visit: BlockVisit, statistics: None) -> Iterable[tuple[Layer, BuildResult]]:
        session, index = self.session, visit.index
        dense_block = self.dense.get_submodule(visit.name)
        layers = [layer for layer in visit.layers if layer.name in self._report_positions]
        originals = {layer.name: self.dense.get_submodule(layer.name) for layer in layers}
        # The batches move on to the dense outputs, which are the targets of the training.
        measured = block_statistics(
            dense_block, index, self.batches, originals, session.method.needs_gram, True, session.group
        )
        twins = [batch.compressed_twin for batch in self.batches if batch.compressed_twin is not None]
        targets = [batch.hidden for batch in self.batches]
        reason = reason_not_to_train(visit.block, index, twins, targets, session.group)
        losses: tuple[float | None, float | None] = (None, None)
        if reason is None:
            steps = session.plan.config.refinement_steps
            losses = train_block(visit.block, index, twins, targets, steps, session.group)

        def report(layer: Layer) -> Record:
            original = originals[layer.name]
            statistics = measured[layer.name] or no_data(layer, original)
            compressed = session.model.get_submodule(layer.name)
            assert isinstance(compressed, CompressedLinear)
            weight = dense_weight(original).detach().double()
            spectrum = session.log.reports[self._report_positions[layer.name]].spectrum
            new_report = report_on(session, layer, compressed, weight, statistics, spectrum)
            return Record({}, {layer.name: asdict(new_report)})

        reports = survey_layers(session, layers, examine=report).facts.values()
        for twin in twins:
            twin.hidden = run_block(visit.block, index, twin)
        facts = {"losses": [*losses], "reason": reason, "reports": [*reports]}
        visit.findings = Record(dict(visit.block.state_dict()), facts)
        return ()

    def accept(self, visit: BlockVisit) -> None:
        assert visit.findings is not None and self.session.log.refinement is not None
        visit.block.load_state_dict(visit.findings.tensors)
        facts = visit.findings.facts
        before, after = facts["losses"]
        self.session.log.refinement.append(BlockRefinement(visit.name, before, after, facts["reason"]))
        for report in facts["reports"]:
            position = self._report_positions[report["name"]]
            self.session.log.reports[position] = LayerReport(**report)
