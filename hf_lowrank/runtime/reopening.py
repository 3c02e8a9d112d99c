"""Says whether a model can be opened again once it is saved, judged by its config and its tensors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .compressed_linear import has_compressed_layers
from .config_checks import PART_OF_COMPRESSED
from .configuration import CompressionConfig
from .errors import CheckpointError, CompressionError
from .experts import ExpertBank
from .layer_spec import LayerSpec
from .skeletons import make_skeleton
from .validation import expected_tensors, resolve_experts, resolve_layers, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]


def check_reopens(model: "PreTrainedModel") -> None:
    """Check that what a model's class makes of its config has the tensors of the model, as whatever opens it needs.

    Args:
        model: dense, or compressed with a config that says which layers are.

    Raises:
        CompressionError: naming a tensor that would be missing, too much, or of another shape.
    """
    name = type(model).__name__
    compression = getattr(model.config, "quantization_config", None)
    try:
        skeleton = make_skeleton(_saved_values(model))
        # A config object that several models share says of a dense one what was done to another.
        if isinstance(compression, CompressionConfig) and _is_compressed(model):
            resolve_experts(skeleton, compression.experts)
            expected = _expected_shapes(skeleton, resolve_layers(skeleton, compression.layers))
        else:
            expected = _expected_shapes(skeleton, {})
    except CheckpointError as error:
        reason = error.__cause__ or error  # without the advice that is for files
        raise CompressionError(
            f"{name}: could not be opened again once it is saved: its config makes no such model ({reason}); change "
            "the config as the model was changed"
        ) from error
    found = _shapes(model)
    for tensor in sorted(expected.keys() | found.keys()):
        if expected.get(tensor) != found.get(tensor):
            raise CompressionError(
                f"{tensor}: {_shape(found, tensor)} in the model, {_shape(expected, tensor)} in what {name} makes of "
                f"its config; it could not be opened again once it is saved: change the config as the model was "
                "changed (num_hidden_layers, for instance), or define a class of your own that makes such a model"
            )
    untied = {tied for group in tied_names(skeleton) for tied in group}
    for group in tied_names(model, by_config=False):
        if not untied.issuperset(group):
            raise CompressionError(
                f"{group[1]}: is the same tensor as {group[0]}, which {name} does not make of its config; it could "
                "not be opened again once it is saved: set tie_word_embeddings in the config, or give it a tensor of "
                "its own"
            )


def stand_in(model: "PreTrainedModel") -> str | None:
    """Return the class of transformers that has the same tensors as a model of a class outside transformers.

    Programs that do not know the own class can open the model by it. None if there is no such class, and for models of
    transformers' own classes.
    """
    natives = [ancestor for ancestor in type(model).__mro__ if _is_native(ancestor)]
    if type(model) in natives:
        return None
    name = natives[0].__name__  # PreTrainedModel, if there is no other
    try:
        own_skeleton = make_skeleton(_saved_values(model))
        skeleton = make_skeleton({**_saved_values(model), "architectures": [name]})
    except CheckpointError:
        return None
    return name if _shapes(skeleton) == _shapes(own_skeleton) else None


@contextmanager
def marked_parts(config: "PreTrainedConfig") -> Iterator[None]:
    """While active, the parts of a composite model's config say that they are of a compressed model."""
    parts = list(_parts(config))
    for part in parts:
        part.quantization_config = dict(PART_OF_COMPRESSED)
    try:
        yield
    finally:
        for part in parts:
            del part.quantization_config


def _parts(config: "PreTrainedConfig") -> "Iterator[PreTrainedConfig]":
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part
            yield from _parts(part)


def _is_compressed(model: "PreTrainedModel") -> bool:
    return has_compressed_layers(model) or any(isinstance(module, ExpertBank) for module in model.modules())


def _is_native(model_class: type) -> bool:
    return model_class.__module__.startswith("transformers.")


def _saved_values(model: "PreTrainedModel") -> dict[str, Any]:
    """Return what the config.json of a model will hold."""
    try:
        values: dict[str, Any] = json.loads(model.config.to_json_string())
    except Exception as error:  # transformers checks a config only now, and may raise anything
        raise CheckpointError(f"its config cannot be saved ({type(error).__name__}: {error})") from error
    return {**values, "architectures": [type(model).__name__.removeprefix("FSDP")]}


def _expected_shapes(skeleton: "PreTrainedModel", layers: Mapping[str, LayerSpec]) -> Shapes:
    return {name: shape for name, (shape, _) in expected_tensors(skeleton, layers).items()}


def _shapes(model: "PreTrainedModel") -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shape(shapes: Shapes, tensor: str) -> str:
    return str(shapes[tensor]) if tensor in shapes else "missing"
