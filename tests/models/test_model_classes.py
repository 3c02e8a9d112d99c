"""A sample of the sweep over transformers' model classes: what is most unlike a stack of decoder blocks."""

import json
from pathlib import Path

import pytest
import transformers

from benchmarks.model_sweep.run import model_classes, trial
from benchmarks.model_sweep.table import RESULTS, page

SAMPLE = {
    "AlbertForMaskedLM": "one block, run several times",
    "CLIPModel": "two towers, no one place of embeddings",
    "DINOv3ViTModel": "its base model is a part that reads no pictures",
    "FunnelForMaskedLM": "lists of blocks in lists, and fewer tokens from stage to stage",
    "Gemma3nForCausalLM": "linear layers in a list, hidden states of four dimensions",
    "Glm4vVisionModel": "a vision tower that reads patches",
    "HrmTextForCausalLM": "several rounds through its blocks",
    "InklingModel": "sizes of layers that are tensors",
    "OpenAIGPTLMHeadModel": "blocks that return lists",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "experts that the model initializes from outside",
    "ReformerModelWithLMHead": "two streams, by keyword only",
    "SegformerForImageClassification": "lists in lists",
    "SwinModel": "stages that change shape",
    "Wav2Vec2ForCTC": "sounds",
    "YolosForObjectDetection": "linear layers in a list, in its head",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_it_is_compressed_saved_and_opened_by_both_classes(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers does not have it")
    status, detail = trial(name, model_classes()[name], "slab")
    assert status == "round-trips", detail


def test_the_page_of_classes_is_current_and_has_no_fault() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    written = (Path(__file__).parents[2] / "docs" / "model_classes.md").read_text(encoding="utf-8")
    assert written == page(results)
    assert {key for key, result in results.items() if result["status"] == "FAILS"} == set()
