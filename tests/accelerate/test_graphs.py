"""torch.compile and torch.export take a whole compressed model as one graph, which answers as the model does."""

import pytest
import torch

from hf_lowrank.runtime.ops import NAMESPACE
from tests.support.compressed import compressed_model, logits
from tests.support.fresh_process import INPUT_IDS


@pytest.mark.parametrize("name", ["sola", "slab", "quantized"])
def test_a_model_compiles_in_one_graph(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch._dynamo.reset()
    model = compressed_model(name, tmp_path_factory).model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sola", "slab"])
def test_a_model_is_exported_for_any_number_of_tokens(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = compressed_model(name, tmp_path_factory).model()
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=2, max=32)
    arguments = {"input_ids": torch.tensor(INPUT_IDS), "use_cache": False}
    shapes = {"input_ids": {0: batch, 1: length}, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)
        # No operation of ours is in the graph, so that it runs without the package.
        assert not any(NAMESPACE in str(node.target) for node in exported.graph.nodes)
        for ids in (torch.tensor(INPUT_IDS), torch.tensor(INPUT_IDS + INPUT_IDS[:1])[:, :5]):
            answer = exported.module()(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(answer, model(ids).logits, rtol=1e-5, atol=1e-6)
