"""Makes dense models on the meta device, where they take no memory.

A checkpoint is checked against such a skeleton before anything is allocated for it.
"""

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .config_checks import is_own_entry
from .errors import CheckpointError, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTO_CLASSES = tuple(name for name in dir(transformers) if name.startswith("AutoModel"))
STAND_IN = "opens_as"
"""Key in `provenance`, for a class outside transformers: the class of transformers that has the same tensors."""
MOST_MODULES = 200_000
"""Maximum number of modules of a model whose files are not on this machine yet."""


def make_skeleton(values: Mapping[str, Any], most_modules: int = MOST_MODULES) -> "PreTrainedModel":
    """Return the dense model of a config.json, of the class that it names, on the meta device.

    Raises:
        CheckpointError: if transformers cannot make one, or if it has more than `most_modules` modules.
    """
    # Neither the code of the checkpoint nor its quantizer may have a part in this.
    dense_values = {}
    for key, value in values.items():
        if key not in ("auto_map", "quantization_config"):
            dense_values[key] = copy.deepcopy(value)
    model_class = saved_class(values)
    config_class = _config_class(dense_values.get("model_type"), model_class)
    try:
        config = config_class.from_dict(dense_values)
        with torch.device("meta"), limit_modules(most_modules):
            return model_class._from_config(config)
    # Raised by `limit_modules`.
    except CheckpointError:
        raise
    except Exception as error:  # transformers may raise anything for what somebody wrote into the file
        raise CheckpointError(
            f"config.json: transformers cannot make a {model_class.__name__} of it ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


def saved_class(values: Mapping[str, Any]) -> "type[PreTrainedModel]":
    """Return the model class that a config.json was saved from.

    A program's own class is known while the module that defines it is imported. In other programs, the class of
    transformers that has the same tensors takes its place, where `compress` found one.

    Raises:
        CheckpointError: if it names no class that this program knows.
    """
    model_class = class_of_name(_class_name(values)) or class_of_name(_recorded_stand_in(values))
    if model_class is None:
        names = values.get("architectures")
        raise CheckpointError(
            f"config.json: architectures is {quoted(names)}, expected the name of a model class of transformers; "
            "if it is a class of your own, import the module that defines it"
        )
    return model_class


def is_known(values: Mapping[str, Any]) -> bool:
    """Return whether this program knows the class that a config.json was saved from."""
    return class_of_name(_class_name(values)) is not None


def own_code(values: Mapping[str, Any]) -> dict[str, str]:
    """Return those entries of a config's `auto_map` that name the code of a class outside transformers.

    A class of transformers needs no code, whatever the `auto_map` says.
    """
    entries = values.get("auto_map")
    if not isinstance(entries, Mapping) or hasattr(transformers, _class_name(values)):
        return {}
    return {name: entry for name, entry in entries.items() if not is_own_entry(entry)}


def _class_name(values: Mapping[str, Any]) -> str:
    names = values.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _recorded_stand_in(values: Mapping[str, Any]) -> str:
    """Return the name of the class of transformers by which a config.json says that it can be opened, too, or ""."""
    recorded = values.get("quantization_config")
    provenance = recorded.get("provenance") if isinstance(recorded, Mapping) else None
    name = provenance.get(STAND_IN) if isinstance(provenance, Mapping) else None
    return name if isinstance(name, str) else ""


def class_of_name(name: str) -> "type[PreTrainedModel] | None":
    """Return the model class of this name: one of transformers, or else one that the program has defined or imported.

    None if there is no such class.
    """
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        return model_class
    # A cell of a notebook that runs twice defines its class twice: the last one counts.
    own_classes = [found for found in _subclasses(transformers.PreTrainedModel) if found.__name__ == name]
    return own_classes[-1] if own_classes else None


def _subclasses(model_class: "type[PreTrainedModel]") -> "Iterator[type[PreTrainedModel]]":
    for subclass in model_class.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _config_class(model_type: Any, model_class: "type[PreTrainedModel]") -> "type[PreTrainedConfig]":
    """Return the class of the config of a saved model.

    Raises:
        CheckpointError: for a type of model that nothing knows, and for one that does not fit the model's class. A
            config of another family would make a model of other layers, or none.
    """
    own_class = getattr(model_class, "config_class", None)
    if own_class is not None and isinstance(model_type, str) and own_class.model_type == model_type:
        return own_class
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: model_type is {quoted(model_type)}, "
            f"expected one that transformers {transformers.__version__} knows"
        )
    config_class = transformers.CONFIG_MAPPING[model_type]
    if own_class is None or issubclass(config_class, own_class) or _is_mapped(config_class, model_class):
        return config_class
    raise CheckpointError(
        f"config.json: model_type is {quoted(model_type)}, expected {own_class.model_type!r}, that of "
        f"{model_class.__name__}; the config is damaged"
    )


def _is_mapped(config_class: "type[PreTrainedConfig]", model_class: "type[PreTrainedModel]") -> bool:
    """Return whether an Auto class opens a config by a model class, as some types borrow another family's class."""
    for name in AUTO_CLASSES:
        found = getattr(transformers, name)._model_mapping.get(config_class, ())
        if model_class in (found if isinstance(found, (list, tuple)) else (found,)):
            return True
    return False


@contextlib.contextmanager
def limit_modules(most_modules: int) -> Iterator[None]:
    """While active, raise CheckpointError as soon as this thread has made more than `most_modules` modules.

    A config can ask for so many that making them would take hours and all memory.
    """
    thread = threading.get_ident()
    count = 0

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        if threading.get_ident() == thread:  # torch calls the hook for the models of all threads
            count += 1
            if count > most_modules:
                raise CheckpointError(
                    f"config.json: asks for more than {most_modules} modules, which its weights cannot fill; "
                    "it is damaged"
                )

    hook = register_module_module_registration_hook(count_module)
    try:
        yield
    finally:
        hook.remove()


def saved_skeleton(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a dense skeleton of the class that a model's checkpoint was saved from, or else of its own class."""
    names = getattr(model.config, "architectures", None) or [""]
    own_name = type(model).__name__
    model_class = type(model) if names[0] == own_name else class_of_name(str(names[0])) or type(model)
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(model.config))
