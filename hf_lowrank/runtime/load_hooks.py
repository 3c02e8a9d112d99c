"""Wraps functions of transformers, so that compressed checkpoints are checked before use, and open by any class.

All ways of opening a model, by class, by Auto class or by pipeline, read the config first, and by one public function:
`PreTrainedConfig.get_config_dict`. So every config.json that transformers reads in this process passes here. What is
no compressed checkpoint goes through untouched.

`PreTrainedModel.from_pretrained` is wrapped for configs that do not say that the checkpoint is compressed, such as the
part of a config that is for the texts alone. `PreTrainedModel.save_pretrained` is wrapped for dense models with a
config that says that they are compressed. `PreTrainedTokenizerBase.from_pretrained` is wrapped for the sake of one
error: transformers does not name the file that is missing.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        if not _can_tell():
            return original(cls, source, **kwargs)
        from .config_checks import holds_checkpoint, is_compressed, mentions_checkpoint
        from .safetensors_headers import read_json

        folder = _local_folder(source, kwargs)
        saved_here = holds_checkpoint(folder)
        try:
            if saved_here:
                read_json(
                    os.path.join(folder, "config.json")
                )  # finds keys that occur twice, which transformers does not
            values, unused = original(cls, source, **kwargs)
        except Exception as error:
            if not isinstance(error, CheckpointError) and (saved_here or mentions_checkpoint(folder)):
                raise CheckpointError(f"{folder}/config.json: cannot be read ({error}); download it again") from error
            raise
        _check_config(values, folder, saved_here)
        if is_compressed(values):
            _mark_part(values, cls)
            hook_models()
        return values, unused

    setattr(get_config_dict, HOOKED, True)
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[method-assign,assignment]


def _can_tell() -> bool:
    """Return whether the modules that tell compressed checkpoints from others can be imported.

    That is when a model is opened, so that `import hf_lowrank` need not wait for them. Where the package is damaged,
    other models open all the same. Of the damage, the import of the quantizer warns.
    """
    try:
        from .config_checks import holds_checkpoint  # noqa: F401
    except Exception:
        return False
    return True


def _check_config(values: Any, folder: str, saved_here: bool) -> None:
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
    """Open compressed checkpoints from now on, whatever config comes with the call, and save dense models as such.

    A second call does nothing, nor does one while transformers is still importing its models. Another one follows when
    a compressed checkpoint is read.
    """
    models = sys.modules.get("transformers.modeling_utils")
    PreTrainedModel: Any = getattr(models, "PreTrainedModel", None)
    if PreTrainedModel is None:
        return
    bound: Any = PreTrainedModel.from_pretrained
    open_model: Callable[..., Any] = bound.__func__
    save_model: Callable[..., Any] = PreTrainedModel.save_pretrained
    if getattr(open_model, HOOKED, False):
        return

    @wraps(open_model)
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("config") is not None and _can_tell():
            kwargs["config"] = _config_of_checkpoint(kwargs["config"], source, kwargs)
        return open_model(cls, source, *args, **kwargs)

    @wraps(save_model)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _dense_config(self):
            return save_model(self, *args, **kwargs)

    setattr(from_pretrained, HOOKED, True)
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    PreTrainedModel.save_pretrained = save_pretrained


def _config_of_checkpoint(config: Any, source: Any, kwargs: dict[str, Any]) -> Any:
    """Return a caller's config that says of compression what the checkpoint's own says.

    It may be the part of a config that is for the texts alone, one that was made by hand, or that of another model.

    Args:
        source, kwargs: the other arguments of `from_pretrained`.
    """
    from .config_checks import is_ours

    if isinstance(config, str | os.PathLike):
        return config
    given = getattr(config, "quantization_config", None)
    if given is not None and not is_ours(given):
        return config
    # Whoever brings the weights along knows what they are.
    values = _stored_config(source, kwargs) if kwargs.get("state_dict") is None else None
    recorded = given if values is None else values.get("quantization_config")
    if recorded is None and given is None:
        return config
    config = copy.deepcopy(config)
    if recorded is None:
        del config.quantization_config
    else:
        # Transformers asks for a dictionary here, while the config of a loaded model has an object.
        config.quantization_config = recorded if isinstance(recorded, dict) else recorded.to_dict()
    return config


def _stored_config(source: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the content of a checkpoint's config.json, or {} if that is of a dense model. None if it is not at hand.

    Raises:
        CheckpointError: for a compressed checkpoint that is damaged.
    """
    from .config_checks import holds_checkpoint, is_compressed, mentions_checkpoint
    from .safetensors_headers import read_json

    folder = _local_folder(source, kwargs)
    is_local = os.path.isdir(folder)
    if not is_local:
        folder = os.path.dirname(_cached_config(source, kwargs) or "")
    file = os.path.join(folder, "config.json")
    if not folder or not os.path.isfile(file):
        return None
    values = read_json(file) if mentions_checkpoint(folder) else {}
    if not is_compressed(values):
        return {}
    # The files of a name on the Hub are checked by the quantizer, when all of them are on this machine.
    _check_config(values, folder if is_local else "", saved_here=is_local and holds_checkpoint(folder))
    return values if isinstance(values, dict) else {}


def _cached_config(source: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the config.json of a name on the Hub, as it lies in the cache. Whoever has a config has read it."""
    from transformers.utils import cached_file

    names = ("cache_dir", "revision", "subfolder")
    arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        return cached_file(source, "config.json", local_files_only=True, **arguments, **quiet)
    except (OSError, ValueError):
        return None


@contextmanager
def _dense_config(model: Any) -> Iterator[None]:
    """While active, hide what the config of a dense model has from a compressed one.

    A config of a compressed checkpoint may have been used to make a new model. What the model is, is what is saved.
    The config may belong to a compressed model, too, and so gets back afterwards what was hidden.
    """
    config = model.config
    hidden: list[tuple[Any, str, Any]] = []
    # The save of a compressed model is the instance's own, and calls the class's.
    if "save_pretrained" not in vars(model) and _can_tell():
        from .config_checks import is_compressed, is_ours

        for part in (config, *(vars(config).get(name) for name in config.sub_configs)):
            if part is not None and is_ours(vars(part).get("quantization_config")):
                hidden.append((part, "quantization_config", part.quantization_config))
        if is_compressed({"auto_map": vars(config).get("auto_map")}):
            hidden.append((config, "auto_map", config.auto_map))
    for part, name, _ in hidden:
        delattr(part, name)
    try:
        yield
    finally:
        for part, name, value in hidden:
            setattr(part, name, value)


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
    def from_pretrained(cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(cls, source, *args, **kwargs)
        except Exception as error:
            if not _can_tell():
                raise
            from .config_checks import holds_checkpoint

            folder = _local_folder(source, kwargs)
            file = os.path.join(folder, "tokenizer_config.json")
            if not holds_checkpoint(folder) or os.path.exists(file):
                raise
            raise CheckpointError(
                f"{file}: missing, the checkpoint has no tokenizer; save that of the model it was compressed from: "
                f"AutoTokenizer.from_pretrained(BASE).save_pretrained({folder!r})"
            ) from error

    setattr(from_pretrained, HOOKED, True)
    PreTrainedTokenizerBase.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]


def _local_folder(source: Any, kwargs: dict[str, Any]) -> str:
    """Return the folder that a call of `from_pretrained` means if its source is a path on this machine."""
    return os.path.join(str(source), str(kwargs.get("subfolder") or ""))
