"""Sets configs right that say something else of compression than the checkpoint or the model that they come with.

A config is a plain object that programs copy, take apart and use again. So it may be the part of a composite config
that is for the texts alone, or one of a compressed model that a dense one was made from.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .config_checks import holds_checkpoint, is_compressed, is_ours, mentions_checkpoint
from .load_hooks import check_config, local_folder
from .origin import file_of_repo
from .safetensors_headers import read_json


def config_of_checkpoint(config: Any, source: Any, kwargs: dict[str, Any]) -> Any:
    """Return a caller's config that says of compression what the checkpoint's own says.

    It may be the part of a config that is for the texts alone, one that was made by hand, or that of another model.

    Args:
        source, kwargs: the other arguments of `from_pretrained`.
    """
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
    folder = local_folder(source, kwargs)
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
    check_config(values, folder if is_local else "", saved_here=is_local and holds_checkpoint(folder))
    return values if isinstance(values, dict) else {}


def _cached_config(source: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the config.json of a name on the Hub, as it lies in the cache. Whoever has a config has read it."""
    names = ("cache_dir", "revision", "subfolder")
    arguments = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    return file_of_repo(source, "config.json", local_files_only=True, **arguments)


@contextmanager
def config_of_dense_model(model: Any) -> Iterator[None]:
    """While active, hide what the config of a dense model has from a compressed one.

    A config of a compressed checkpoint may have been used to make a new model. What the model is, is what is saved.
    The config may belong to a compressed model, too, and so gets back afterwards what was hidden.
    """
    config = model.config
    hidden: list[tuple[Any, str, Any]] = []
    # The save of a compressed model is the instance's own, and calls the class's.
    if "save_pretrained" not in vars(model):
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
