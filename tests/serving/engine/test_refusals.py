"""What vLLM cannot serve is refused before an engine starts, by a message that says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .checkpoints import REFUSED, make
from .running import engine


@pytest.mark.parametrize(
    ("family", "message"),
    [("Mixtral", "experts: vLLM fuses the experts of a mixture"), ("GPT2", "vLLM transposes the weights of gpt2")],
    ids=REFUSED,
)
def test_families_that_vllm_stores_otherwise(family: str, message: str, tmp_path: Path) -> None:
    folder = make(family, "bitmask and signs", tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*hf-lowrank dense"), engine(folder):
        pass


def test_a_dense_model_with_our_method(checkpoint: Callable[[str, str], Path]) -> None:
    with (
        pytest.raises(ValueError, match="--quantization hf_lowrank: the model is dense.*leave the option out"),
        engine(checkpoint("Llama", "dense"), quantization="hf_lowrank"),
    ):
        pass
