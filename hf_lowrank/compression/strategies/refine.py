"""After any strategy: the compressed blocks in turn are trained to give the dense blocks' outputs."""

from dataclasses import asdict

from transformers import PreTrainedModel

from ...budget import Layer
from ...calibration import BlockBatch, block_statistics, capture, run_block
from ...execution.work_folder import Record
from ...models.linears import dense_weight
from ...runtime.layers import CompressedLinear
from ..refinement import refine_block
from ..report import BlockRefinement, LayerReport, layer_report
from ..run import BlockVisit, Run, no_data


def refine(run: Run, dense: PreTrainedModel) -> None:
    """Refine every block on the inputs that the refined ones before it give, and report on its layers anew.

    Args:
        dense: the model as it was, its neurons in the order in which the method put them.
    """
    blocks = {name: dense.get_submodule(name) for name in run.blocks}
    batches = capture(dense, blocks, run.group.split(run.tokens))
    for batch in batches:
        batch.track_compressed()
    reported = {report.name: at for at, report in enumerate(run.reports)}
    run.refinement = []
    for visit in run.walk("refined", batches, surveys=True):
        if visit.found is None:
            visit.found = _refine_block(
                run, visit, dense, batches, [layer for layer in visit.layers if layer.name in reported]
            )
        visit.block.load_state_dict(visit.found.tensors)
        run.refinement.append(BlockRefinement(visit.name, *visit.found.facts["losses"]))
        for report in visit.found.facts["reports"]:
            run.reports[reported[report["name"]]] = LayerReport(**report)


def _refine_block(
    run: Run, visit: BlockVisit, dense: PreTrainedModel, batches: list[BlockBatch], layers: list[Layer]
) -> Record:
    """Refine one block, and move the batches on; what became of it, with its losses before and after."""
    spectra = {report.name: report.spectrum for report in run.reports}
    originals = {layer.name: dense.get_submodule(layer.name) for layer in layers}
    statistics = block_statistics(
        dense.get_submodule(visit.name), visit.index, batches, originals, run.method.needs_gram, True, run.group
    )
    shifted = [batch.compressed_twin for batch in batches if batch.compressed_twin is not None]
    losses = refine_block(
        visit.block, visit.index, shifted, [batch.hidden for batch in batches], run.config.refinement_steps, run.group
    )

    def report(layer: Layer) -> Record:
        made, known = (
            run.model.get_submodule(layer.name),
            statistics[layer.name] or no_data(layer, originals[layer.name]),
        )
        assert isinstance(made, CompressedLinear)
        weight, bits = dense_weight(originals[layer.name]).detach().double(), run.budget.dense_bits(layer)
        return Record(
            {}, {layer.name: asdict(layer_report(layer.name, made, weight, known, bits, spectra[layer.name]))}
        )

    reports = [*run.survey(layers, report).facts.values()]
    for each in shifted:
        each.hidden = run_block(visit.block, visit.index, each)
    return Record(dict(visit.block.state_dict()), {"losses": [*losses], "reports": reports})
