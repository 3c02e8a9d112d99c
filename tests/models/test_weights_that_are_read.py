"""Code of models that reads the weight of a layer, for its dtype, works on the compressed layers, too."""

from pathlib import Path

import pytest
import torch

from hf_lowrank import CompressionConfig, compress
from hf_lowrank.budget import Layer
from hf_lowrank.methods import make_method, method_class, registered_methods

from ..support.model_families import FAMILIES
from ..support.whole_models import answers, in_fresh_memory

TRIED = ("Llama", "GPT-2", "Mixtral", "BERT", "T5", "T5 1.1, FLAN-T5", "Whisper", "ViT")


@pytest.mark.parametrize(("family", "method"), [*((family, "rtn") for family in TRIED), ("T5", "gptq")])
def test_a_quantized_model_runs(family: str, method: str, tmp_path: Path) -> None:
    batches, model = FAMILIES[family].batches(), FAMILIES[family].make()
    recipe = CompressionConfig(method, samples=4, sequence_length=28, options={"bits": 8, "group_size": 64})
    compress(model, recipe, calibration=batches, progress=False)
    report = model.save_pretrained.report
    for outputs in zip(answers(model, batches), answers(FAMILIES[family].make(), batches), strict=True):
        torch.testing.assert_close(*outputs, rtol=0.2, atol=0.2)
    reads = [name for name, reason in report["dense"].items() if "asks for the dtype of its weight" in reason]
    assert bool(reads) == family.startswith("T5") and all(name.endswith(".wo") for name in reads)
    if reads:
        model.save_pretrained(tmp_path)
        opened = in_fresh_memory(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16))
        assert all(torch.isfinite(output).all() for output in answers(opened, batches))


@pytest.mark.parametrize("name", registered_methods())
def test_methods_whose_smallest_layer_is_made_of_codes_say_so(name: str) -> None:
    """Others find the layers that must not get any by that."""
    layer = Layer("layer", 0, 1, "other", 64, 64)
    assert method_class(name).quantizes or not make_method(name).min_spec(layer).weight_bits
