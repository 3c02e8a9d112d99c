"""Wraps functions of transformers, so that compressed checkpoints are checked before use, and open by any class.

All ways of opening a model, by class, by Auto class or by pipeline, read the config first, and by one public function:
`PreTrainedConfig.get_config_dict`. So every config.json that transformers reads in this process passes here. What is
no compressed checkpoint goes through untouched.

`PreTrainedModel.from_pretrained` is wrapped to remember the subfolder that a model was loaded from, which it forgets
itself, and for configs that do not say that the checkpoint is compressed, such as the part of a config that is for the
texts alone. `PreTrainedModel.save_pretrained` is wrapped for dense models with a config that says that they are
compressed. `PreTrainedTokenizerBase.from_pretrained` is wrapped for the sake of one error: transformers does not name
the file that is missing.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from .errors import CheckpointError

HOOKED = "_hf_lowrank"
"""Attribute of a function that is wrapped already."""


def hook_configs() -> None:
    """Check compressed checkpoints from now on. A second call does nothing.

    The code that a checkpoint carries is then not run, whatever `trust_remote_code` says, as it would do the same as
    the code here.
    """
    from transformers import PreTrainedConfig

    bound: Any = PreTrainedConfig.get_config_dict
    original: Callable[..., tuple[dict[str, Any], dict[str, Any]]] = bound.__func__
    if getattr(original, HOOKED, False):
        return

    @wraps(original)
    def get_config_dict(cls: Any, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if not can_tell():
            return original(cls, source, **kwargs)
        from .config_checks import holds_checkpoint, is_compressed, mentions_checkpoint
        from .origin import note_source
        from .safetensors_headers import read_json

        folder = local_folder(source, kwargs)
        saved_here = holds_checkpoint(folder)
        try:
            if saved_here:
                # It finds keys that occur twice, which transformers does not.
                read_json(os.path.join(folder, "config.json"))
            values, unused = original(cls, source, **kwargs)
        except Exception as error:
            if not isinstance(error, CheckpointError) and (saved_here or mentions_checkpoint(folder)):
                raise CheckpointError(f"{folder}/config.json: cannot be read ({error}); download it again") from error
            raise
        check_config(values, folder, saved_here)
        if is_compressed(values):
            _mark_part(values, cls)
        hook_models()
        note_source(source, kwargs)
        return values, unused

    setattr(get_config_dict, HOOKED, True)
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[method-assign,assignment]


def can_tell() -> bool:
    """Return whether the modules that tell compressed checkpoints from others can be imported.

    That is when a model is opened, so that `import hf_lowrank` need not wait for them. Where the package is damaged,
    other models open all the same. Of the damage, the import of the quantizer warns.
    """
    try:
        from .config_checks import holds_checkpoint  # noqa: F401
    except Exception:
        return False
    return True


def check_config(values: Any, folder: str, saved_here: bool) -> None:
    """Check the content of a config.json if it is that of a compressed model, and take our `auto_map` out.

    Args:
        folder: where it lies, if it lies on this machine.
        saved_here: whether a compressed model was saved in that folder.

    Raises:
        CheckpointError: for a fault of the checkpoint, or if the config is not that of the model that was saved there.
    """
    from .config_checks import is_compressed, unmark_parts
    from .safetensors_headers import INDEX, WEIGHTS
    from .skeletons import is_known, own_code
    from .validation import validate_checkpoint

    if not is_compressed(values):
        # A dense model may have been saved over a compressed one. Its config is whole and names no code.
        is_dense = isinstance(values, dict) and "model_type" in values and "auto_map" not in values
        if saved_here and not is_dense:
            raise CheckpointError(
                f"{folder}/config.json: not the config of the model that was saved there; download it again"
            )
        return
    unmark_parts(values)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    weights = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    # The weights of a variant (`model.fp16.safetensors`) have other names, and are not looked for.
    has_usual_weights = any(name in (WEIGHTS, INDEX) or name.startswith("model-") for name in weights)
    has_lost_weights = saved_here and not weights
    code = own_code(values)
    if not code or is_known(values):
        validate_checkpoint(values, folder if has_usual_weights or has_lost_weights else None)
    # Else the class comes with the checkpoint, and is imported after this, if the user has consented to its code. The
    # checkpoint is checked when the class opens it.
    values.pop("auto_map", None)
    if code:
        values["auto_map"] = code


def _mark_part(values: dict[str, Any], config_class: Any) -> None:
    """Copy the `quantization_config` of a compressed model into the part of its config that a class takes by itself.

    Transformers reads nothing else of the config then.
    """
    model_type = getattr(config_class, "model_type", "")
    if not model_type or values.get("model_type") == model_type:
        return
    for key, part in values.items():
        if isinstance(part, dict) and (key == config_class.base_config_key or part.get("model_type") == model_type):
            part["quantization_config"] = values.get("quantization_config")


def hook_models() -> None:
    """Remember where models are loaded from, and open and save each as what it is, whatever its config says.

    A second call does nothing, nor does one while transformers' models are being imported. The next config that is
    read calls again.
    """
    PreTrainedModel: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    bound = getattr(PreTrainedModel, "from_pretrained", None)
    if bound is None or getattr(bound.__func__, HOOKED, False):
        return
    open_model: Callable[..., Any] = bound.__func__
    save_model: Callable[..., Any] = PreTrainedModel.save_pretrained

    @wraps(open_model)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not can_tell():
            return open_model(cls, *args, **kwargs)
        from .caller_configs import config_of_checkpoint
        from .origin import REMEMBERED, loading

        source = _source(args, kwargs)
        if kwargs.get("config") is not None:
            kwargs["config"] = config_of_checkpoint(kwargs["config"], source, kwargs)
        with loading(source, kwargs) as told:
            loaded = open_model(cls, *args, **kwargs)
        # With `output_loading_info=True` it is a pair.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model, PreTrainedModel):
            model.__dict__[REMEMBERED] = told
        return loaded

    @wraps(save_model)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not can_tell():
            return save_model(self, *args, **kwargs)
        from .caller_configs import config_of_dense_model
        from .quantizer import attach_part

        if attach_part(self):
            return self.save_pretrained(*args, **kwargs)
        with config_of_dense_model(self):
            return save_model(self, *args, **kwargs)

    setattr(from_pretrained, HOOKED, True)
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    PreTrainedModel.save_pretrained = save_pretrained


def hook_tokenizers() -> None:
    """Raise CheckpointError from now on where a compressed checkpoint has no tokenizer. A second call does nothing.

    Transformers' own error comes through in all other cases.
    """
    from transformers import PreTrainedTokenizerBase

    bound: Any = PreTrainedTokenizerBase.from_pretrained
    original: Callable[..., Any] = bound.__func__
    if getattr(original, HOOKED, False):
        return

    @wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(cls, *args, **kwargs)
        except Exception as error:
            if not can_tell():
                raise
            from .config_checks import holds_checkpoint

            folder = local_folder(_source(args, kwargs), kwargs)
            file = os.path.join(folder, "tokenizer_config.json")
            if not holds_checkpoint(folder) or os.path.exists(file):
                raise
            raise CheckpointError(
                f"{file}: missing, the checkpoint has no tokenizer; save that of the model it was compressed from: "
                f"AutoTokenizer.from_pretrained(BASE).save_pretrained({folder!r})"
            ) from error

    setattr(from_pretrained, HOOKED, True)
    PreTrainedTokenizerBase.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]


def _source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a call of `from_pretrained` is to load, by place or by name."""
    return args[0] if args else kwargs.get("pretrained_model_name_or_path", "")


def local_folder(source: Any, kwargs: dict[str, Any]) -> str:
    """Return the folder that a call of `from_pretrained` means if its source is a path on this machine."""
    return os.path.join(str(source), str(kwargs.get("subfolder") or ""))
