"""After any strategy: the compressed blocks in turn are trained to give the dense blocks' outputs."""

from transformers import PreTrainedModel

from ..calibration import BlockBatch, block_statistics, capture, run_block, starts_anew
from ..linears import dense_weight
from ..refinement import refine_block
from ..report import BlockRefinement, layer_report
from ..runtime.layers import CompressedLinear
from .run import Run, no_data


def refine(run: Run, dense: PreTrainedModel) -> None:
    """Refine every block on the inputs that the refined ones before it give, and report on its layers anew.

    Args:
        dense: the model as it was, its neurons in the order in which the method put them.
    """
    blocks = {name: dense.get_submodule(name) for name in run.blocks}
    batches = capture(dense, blocks, run.tokens)
    for batch in batches:
        batch.shifted = BlockBatch(batch.hidden, batch.calls)
    reported = {report.name: at for at, report in enumerate(run.reports)}
    run.refinement = []
    for index, (name, block) in enumerate(run.blocks.items()):
        run.step(f"refining {name}", index, len(run.blocks))
        if starts_anew(batches, index):
            run.start_list(index, batches)
        layers = [layer for layer in run.compressed if layer.block == index and layer.name in reported]
        originals = {layer.name: dense.get_submodule(layer.name) for layer in layers}
        statistics, targets = block_statistics(blocks[name], index, batches, originals, run.method.needs_gram)
        shifted = [batch.shifted for batch in batches if batch.shifted is not None]
        before, after = refine_block(block, index, shifted, targets, run.config.refinement_steps)
        run.refinement.append(BlockRefinement(name, before, after))
        for layer in layers:
            made, known = run.model.get_submodule(layer.name), statistics[layer.name] or no_data(layer, originals[layer.name])
            assert isinstance(made, CompressedLinear)
            weight, bits = dense_weight(originals[layer.name]).detach().double(), run.budget.dense_bits(layer)
            at = reported[layer.name]
            run.reports[at] = layer_report(layer.name, made, weight, known, bits, run.reports[at].spectrum)
        for batch, target in zip(batches, targets, strict=True):
            assert batch.shifted is not None
            batch.shifted.hidden = run_block(block, index, batch.shifted)
            batch.hidden = target
