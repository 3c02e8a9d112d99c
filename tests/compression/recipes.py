"""Recipes, models and calibration data with which tests compress in fractions of a second."""

from typing import Any

from hf_lowrank import CompressionConfig

from ..support import tiny_models

RECIPES: dict[str, dict[str, Any]] = {
    "svd": {},
    "svd-llm": {},
    "sola": {},
    "soco": {"steps": 6, "finish_steps": 2, "batch_tokens": 64},
    "slab": {"iterations": 2},
    "lowrank": {},
    "slab-gram": {},
    "auto": {},
}
"""The options of methods that together use every strategy."""
MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "opt": tiny_models.opt}
IDS = tiny_models.token_ids(4, 24).tolist()
"""Four calibration sequences of 24 tokens."""


def config(method: str, ratio: float = 0.4, **changes: Any) -> CompressionConfig:
    """Return the config of a method with its options in `RECIPES` and four samples."""
    fields = {"options": RECIPES.get(method, {}), "samples": 4, "sequence_length": 24, **changes}
    return CompressionConfig(method=method, ratio=ratio, **fields)
