"""Every config.json that transformers reads in this process passes here: that of a compressed checkpoint is checked before it is used.

All ways of opening a model, by class, by Auto class, by pipeline, read the config first and by one public function,
`PreTrainedConfig.get_config_dict`, which this wraps. What is no compressed checkpoint goes through untouched.
`PreTrainedTokenizerBase.from_pretrained` is wrapped for the sake of one error: of transformers' own, none names the file that is missing.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from .errors import CheckpointError

MARK = "_hf_lowrank"


def hook_configs() -> None:
    """Check compressed checkpoints from now on; a second call does nothing.

    The code that a checkpoint carries is then not run, `trust_remote_code` or not: this code does what it would do.
    """
    from transformers import PreTrainedConfig

    original: Callable[..., tuple[dict[str, Any], dict[str, Any]]] = PreTrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]
    if getattr(original, MARK, False):
        return

    @wraps(original)
    def get_config_dict(cls: Any, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        from .safetensors_headers import INDEX, WEIGHTS, read_json
        from .validation import holds_checkpoint, is_compressed, mentions_checkpoint, validate_checkpoint

        folder = os.path.join(str(source), str(kwargs.get("subfolder") or ""))
        saved_here = holds_checkpoint(folder)
        try:
            if saved_here:
                read_json(os.path.join(folder, "config.json"))  # a key that occurs twice is seen here only
            values, unused = original(cls, source, **kwargs)
        except Exception as error:
            if not isinstance(error, CheckpointError) and (saved_here or mentions_checkpoint(folder)):
                raise CheckpointError(f"{folder}/config.json: cannot be read ({error}); download it again") from error
            raise
        plain = (
            isinstance(values, dict) and "model_type" in values and "auto_map" not in values
        )  # a dense model may have taken the folder
        if saved_here and not plain and not is_compressed(values):
            raise CheckpointError(
                f"{folder}/config.json: not the config of the model that was saved there; download it again"
            )
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


def hook_tokenizers() -> None:
    """Say of a compressed checkpoint that it holds no tokenizer, if that is why none can be opened; a second call does nothing."""
    from transformers import PreTrainedTokenizerBase

    original: Callable[..., Any] = PreTrainedTokenizerBase.from_pretrained.__func__  # type: ignore[attr-defined]
    if getattr(original, MARK, False):
        return

    @wraps(original)
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        from .validation import holds_checkpoint

        try:
            return original(cls, source, *args, **kwargs)
        except Exception as error:
            folder = os.path.join(str(source), str(kwargs.get("subfolder") or ""))
            missing = os.path.join(folder, "tokenizer_config.json")
            if not holds_checkpoint(folder) or os.path.exists(missing):
                raise
            raise CheckpointError(
                f"{missing}: missing, the checkpoint has no tokenizer; save that of the model it was compressed from: "
                f"AutoTokenizer.from_pretrained(BASE).save_pretrained({folder!r})"
            ) from error

    setattr(from_pretrained, MARK, True)
    PreTrainedTokenizerBase.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]
