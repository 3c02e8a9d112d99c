"""Every config.json that transformers reads in this process passes here: that of a compressed checkpoint is checked before it is used.

All ways of opening a model, by class, by Auto class, by pipeline, read the config first and by one public function,
`PreTrainedConfig.get_config_dict`, which this wraps. What is no compressed checkpoint goes through untouched.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from .errors import CheckpointError

MARK = "_hf_lowrank"


def guard_configs() -> None:
    """Check compressed checkpoints from now on; a second call does nothing.

    The code that a checkpoint carries is then not run, `trust_remote_code` or not: this code does what it would do.
    """
    from transformers import PreTrainedConfig

    original: Callable[..., tuple[dict[str, Any], dict[str, Any]]] = PreTrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]
    if getattr(original, MARK, False):
        return

    @wraps(original)
    def get_config_dict(cls: Any, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        from .headers import INDEX, WEIGHTS, read_json
        from .validation import holds_checkpoint, is_compressed, validate_checkpoint

        folder = os.path.join(str(source), str(kwargs.get("subfolder") or ""))
        saved_here = holds_checkpoint(folder)
        try:
            if saved_here:
                read_json(os.path.join(folder, "config.json"))  # a key that occurs twice is seen here only
            values, unused = original(cls, source, **kwargs)
        except Exception as error:
            if saved_here and not isinstance(error, CheckpointError):
                raise CheckpointError(f"{folder}/config.json: cannot be read ({error}); download it again") from error
            raise
        plain = isinstance(values, dict) and "model_type" in values and "auto_map" not in values  # a dense model may have taken the folder
        if saved_here and not plain and not is_compressed(values):
            raise CheckpointError(f"{folder}/config.json: not the config of the model that was saved there; download it again")
        if is_compressed(values):
            names = os.listdir(folder) if os.path.isdir(folder) else []
            weights = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
            usual = [
                name for name in weights if name in (WEIGHTS, INDEX) or name.startswith("model-")
            ]  # those of a variant are called otherwise
            here = bool(usual) or (saved_here and not weights)
            validate_checkpoint(values, folder if here else None)
            values.pop("auto_map", None)
        return values, unused

    setattr(get_config_dict, MARK, True)
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[method-assign,assignment]
