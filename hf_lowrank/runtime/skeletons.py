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

from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    model_type = dense_values.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, "
            f"expected one that transformers {transformers.__version__} knows"
        )
    names = dense_values.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    model_class = _model_class(name)
    if model_class is None:
        raise CheckpointError(
            f"config.json: architectures is {names!r}, expected the name of a model class of transformers"
        )
    # The pair must fit: a config of another family would make a model of other layers, or none.
    expected = model_class.config_class
    if expected is not None and not issubclass(transformers.CONFIG_MAPPING[model_type], expected):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, expected {expected.model_type!r}, that of {name}; "
            "the config is damaged"
        )
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(dense_values)
        with torch.device("meta"), limit_modules(most_modules):
            return model_class._from_config(config)
    # Raised by `limit_modules`.
    except CheckpointError:
        raise
    except Exception as error:  # transformers may raise anything for what somebody wrote into the file
        raise CheckpointError(
            f"config.json: transformers cannot make a {name} of it ({type(error).__name__}: {error}); "
            "download it again"
        ) from error


def _model_class(name: str) -> "type[PreTrainedModel] | None":
    """Return the model class of transformers that has this name, None if there is no such class."""
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
        return model_class
    return None


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
    model_class = _model_class(str(names[0])) or type(model)
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(model.config))
