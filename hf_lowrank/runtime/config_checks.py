"""Checks the values of a config.json before anything is made of them, and tells compressed models from others."""

import os
from collections.abc import Mapping
from typing import Any

import transformers

from .checksums import LOADING_CODE
from .configuration import QUANT_METHOD, CompressionConfig
from .errors import CheckpointError, quoted
from .reports import REPORT_FILE
from .safetensors_headers import FLOAT_TYPES, StoredTensor, read_json

COUNTED = ("layer", "block", "stage", "depth", "expert", "head", "label")
"""Words in the names of those numbers of a config of which transformers makes as many objects."""
MOST_COUNTED = 100_000
"""Maximum of such a number."""
PART_OF_COMPRESSED = {"compressed_with": "the whole model, by hf_lowrank"}
"""The `quantization_config` that each part of a compressed model's config has in its config.json.

Without the package, transformers would open a part by itself and fill it with random weights. As this has no
`quant_method`, transformers raises instead.
"""
MOST_NESTED = 100
"""Maximum number of levels of lists and dictionaries in a config."""
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of torch's float dtypes, by those of safetensors."""


def is_ours(quantization_config: Any) -> bool:
    """Return whether the `quantization_config` of a config, an object or as it is stored, is one of this package."""
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == QUANT_METHOD
    return isinstance(quantization_config, CompressionConfig)


def unmark_parts(values: Any) -> None:
    """Take out of the content of a config.json what its parts have for the sake of programs without the package."""
    for part in values.values() if isinstance(values, dict) else ():
        if isinstance(part, dict):
            if part.get("quantization_config") == PART_OF_COMPRESSED:
                del part["quantization_config"]
            unmark_parts(part)


def is_compressed(values: Any) -> bool:
    """Return whether the content of a config.json is, or once was, that of a compressed model."""
    if not isinstance(values, Mapping):
        return False
    recorded, entries = values.get("quantization_config"), values.get("auto_map")
    if is_ours(recorded):
        return True
    if not isinstance(entries, dict):
        return False
    return any(map(is_own_entry, entries.values()))


def is_own_entry(entry: Any) -> bool:
    """Return whether an entry of an `auto_map` names the code that this package puts into checkpoints."""
    return str(entry).startswith(LOADING_CODE.removesuffix("py"))


def holds_checkpoint(folder: str) -> bool:
    """Return whether a compressed model was saved in a folder, whatever has become of its config."""
    # `lexists`, as a link that leads nowhere shows it, too.
    return any(os.path.lexists(os.path.join(folder, name)) for name in (LOADING_CODE, REPORT_FILE))


def mentions_checkpoint(folder: str) -> bool:
    """Return whether a config.json that cannot be read is likely to be that of a compressed model.

    It is needed where a folder has lost all other files that would tell.
    """
    config = os.path.join(folder, "config.json")
    if not os.path.isfile(config):
        return False
    try:
        with open(config, "rb") as stream:
            # As bytes: what cannot be read may not even be text.
            return QUANT_METHOD.encode() in stream.read()
    except OSError:
        return False


def config_beside(file: str) -> dict[str, Any] | None:
    """Return the content of the config.json beside a weight file, None if none of a compressed model lies there."""
    config = os.path.join(os.path.dirname(file), "config.json")
    values = read_json(config) if os.path.isfile(config) else None
    recorded = values.get("quantization_config") if isinstance(values, dict) else None
    return values if is_compressed(values) and isinstance(recorded, dict) else None


def check_values(values: Any, key: str = "", depth: int = 0) -> None:
    """Check the values of a config that could make transformers hang, run out of memory, or fail with another error.

    Args:
        values: the content of a config.json, or a value in it.
        key: name of the value.
        depth: number of levels that the value lies deep.

    Raises:
        CheckpointError: for a number of layers, heads, experts or labels that no model has, as some configs make lists
            of that length; for a dtype, at any place, that is no name, as transformers looks up a name there; and for
            values nested so deep that copying them would end in a RecursionError.
    """
    if depth > MOST_NESTED:
        raise CheckpointError(
            f"config.json: nested more than {MOST_NESTED} levels deep; it is damaged, download it again"
        )
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_values(value, str(name), depth + 1)
    elif isinstance(values, list):
        for value in values:
            check_values(value, key, depth + 1)
    # Not `abs(values) > MOST_COUNTED`, which is false for NaN.
    elif isinstance(values, (int, float)) and not abs(values) <= MOST_COUNTED and _counts(key):
        raise CheckpointError(
            f"config.json: {key} is {quoted(values)}, expected at most {MOST_COUNTED}; the config is damaged"
        )
    # An integer may stand there, too: a vocabulary can have a token of that name.
    if key == "dtype" and not isinstance(values, (str, int, Mapping, type(None))):
        raise CheckpointError(
            f"config.json: {key} is {quoted(values)}, expected the name of one; the config is damaged"
        )


def _counts(key: str) -> bool:
    """Return whether a number of this name says how many objects there are."""
    # The base of rotary positions (`layer_rope_theta`) is large and counts nothing.
    return any(word in key for word in COUNTED) and not key.endswith("_theta")


def check_config_dtype(config: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if a config asks for a dtype in which no tensor is stored.

    Loading could then take more memory than the files.
    """
    dtypes = {TORCH_NAMES[tensor.dtype] for tensor in stored.values() if tensor.dtype in FLOAT_TYPES}
    if config.dtype is not None and str(config.dtype).removeprefix("torch.") not in dtypes:
        raise CheckpointError(
            f"config.json: dtype is {config.dtype}, expected one that is stored: {', '.join(sorted(dtypes))}"
        )


def check_generation(folder: str) -> None:
    """Raise CheckpointError if a generation_config.json beside the weights cannot be read by transformers."""
    file = os.path.join(folder, "generation_config.json")
    if os.path.isfile(file):
        values = read_json(file)
        try:
            transformers.GenerationConfig.from_dict(values)
        except Exception as error:  # transformers may raise anything for what somebody wrote into the file
            raise CheckpointError(
                f"{file}: cannot be used ({type(error).__name__}: {error}); download it again, or delete it"
            ) from error
