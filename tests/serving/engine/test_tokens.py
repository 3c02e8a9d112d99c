"""vLLM continues texts as Transformers does: every layout, every family, eager and compiled, alone and in batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import FAMILIES, LAYOUTS, REFUSED, make
from .running import assert_same, continued, engine, prompts, reference

Checkpoints = Callable[[str, str], Path]
SERVED = [family for family in FAMILIES if family not in REFUSED]
OTHERS = [(family, layout) for family in SERVED[1:] for layout in ("bitmask and signs", "mixed, quantized")]


@pytest.mark.parametrize(("family", "layout"), [*(("Llama", layout) for layout in LAYOUTS), *OTHERS])
def test_the_tokens_are_those_of_transformers(family: str, layout: str, checkpoint: Checkpoints) -> None:
    folder = checkpoint(family, layout)
    texts = prompts()
    with engine(folder) as llm:
        assert_same(continued(llm, texts), reference(folder, texts))


@pytest.mark.parametrize("layout", ["bitmask and signs", "low rank", "mixed, quantized"])
def test_a_compiled_model_gives_them_too(layout: str, checkpoint: Checkpoints) -> None:
    folder = checkpoint("Llama", layout)
    texts = prompts()
    with engine(folder, enforce_eager=False) as llm:
        assert_same(continued(llm, texts), reference(folder, texts))


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 32},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True},
        {"enable_prefix_caching": True},
    ],
    ids=["at once", "prefill in chunks", "cached prefixes"],
)
def test_batches_give_what_single_texts_give(options: dict[str, Any], checkpoint: Checkpoints) -> None:
    folder = checkpoint("Llama", "mixed, quantized")
    texts = prompts(12)
    wanted = reference(folder, texts)
    with engine(folder, **options) as llm:
        assert_same(continued(llm, texts), wanted)
        assert_same(continued(llm, texts), wanted)  # now with what the first run left in caches


def test_a_second_checkpoint_at_the_same_path_is_the_one_that_is_served(tmp_path: Path) -> None:
    texts = prompts()
    for layout in ("bitmask and signs", "low rank"):
        make("Llama", layout, tmp_path / "model")
        with engine(tmp_path / "model") as llm:
            assert_same(continued(llm, texts), reference(tmp_path / "model", texts))
