"""Says whether a model can be opened again once it is saved, from its config and the names and shapes of its tensors."""

import json
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, CompressionError
from .skeletons import class_of_name, make_skeleton
from .validation import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shapes = dict[str, tuple[int, ...]]


def check_reopens(model: "PreTrainedModel") -> None:
    """Raise CompressionError if what a dense model's class makes of its config has other tensors than the model.

    Whatever opens the saved model starts from that.
    """
    name = type(model).__name__
    try:
        skeleton = make_skeleton(_saved_values(model))
    except CheckpointError as error:
        raise CompressionError(f"{name}: could not be opened again once it is saved: {error}") from error
    expected, found = _shapes(skeleton), _shapes(model)
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
                f"{group[1]}: is the same tensor as {group[0]}, which {name} does not make of its config; it could not "
                "be opened again once it is saved: set tie_word_embeddings in the config, or give it a tensor of its own"
            )


def stand_in(model: "PreTrainedModel") -> str | None:
    """Return the class of transformers that has the same tensors as a model of a class outside transformers.

    Programs that do not know the own class can open the model by it. None if there is no such class, and for models of
    transformers' own classes.
    """
    if _is_native(type(model)):
        return None
    for ancestor in type(model).__mro__[1:]:
        if _is_native(ancestor) and class_of_name(ancestor.__name__) is ancestor:
            try:
                skeleton = make_skeleton({**_saved_values(model), "architectures": [ancestor.__name__]})
            except CheckpointError:
                return None
            return ancestor.__name__ if _shapes(skeleton) == _shapes(model) else None
    return None


def _is_native(model_class: type) -> bool:
    return model_class.__module__.startswith("transformers.")


def _saved_values(model: "PreTrainedModel") -> dict[str, Any]:
    """Return what the config.json of a model will hold."""
    try:
        values: dict[str, Any] = json.loads(model.config.to_json_string())
    except Exception as error:  # transformers checks a config only now, and may raise anything
        raise CheckpointError(f"its config cannot be saved ({type(error).__name__}: {error})") from error
    return {**values, "architectures": [type(model).__name__.removeprefix("FSDP")]}


def _shapes(model: "PreTrainedModel") -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shape(shapes: Shapes, tensor: str) -> str:
    return str(shapes[tensor]) if tensor in shapes else "missing"
