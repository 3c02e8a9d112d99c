"""Finds the modules of a checkpoint in a model of another class than the one that was saved.

A checkpoint of a model of pictures and texts may be opened by the class of its language model, a full model by its
base model's class, and the other way round. The same modules have other names there, or are missing.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers.core_model_loading import WeightRenaming

from .configuration import CompressionConfig
from .errors import CheckpointError
from .validation import dense_shape, is_linear, tied_names

Value = TypeVar("Value")


class Counterparts:
    """Says which name a module or tensor of the saved model has in another model.

    Attributes:
        prefixes: names of modules of the saved model → the names that they have in the other one. What is in such a
            module has the same name within it in both models.
    """

    def __init__(self, prefixes: Mapping[str, str]) -> None:
        self.prefixes = dict(prefixes)

    def name(self, saved_name: str) -> str | None:
        """Return the name in the other model, None for what is in no module that both models have."""
        parent, rest = saved_name, ""
        while True:
            if parent in self.prefixes:
                return ".".join(filter(None, (self.prefixes[parent], rest)))
            if not parent:
                return None
            parent, _, child = parent.rpartition(".")
            rest = f"{child}.{rest}".rstrip(".")

    def of(self, by_saved_name: Mapping[str, Value], model: nn.Module) -> dict[str, Value]:
        """Return the values of those modules that `model` has, by their names there."""
        modules = {name for name, _ in model.named_modules()}
        named = {self.name(saved_name): value for saved_name, value in by_saved_name.items()}
        return {name: value for name, value in named.items() if name is not None and name in modules}


def find_counterparts(saved: nn.Module, model: nn.Module) -> Counterparts:
    """Return where the modules of a saved model are in a model of another class.

    Two modules are taken for the same if they are of one class, or if they have the same name and the same tensors.

    Args:
        saved, model: dense models, of which only the names, classes and shapes matter.
    """
    return Counterparts(_Search(saved).in_model(model))


class _Search:
    """Looks for the modules of one saved model."""

    def __init__(self, saved: nn.Module) -> None:
        self.modules = dict(saved.named_modules())
        self.by_class: dict[type[nn.Module], list[str]] = {}
        for name, module in self.modules.items():
            self.by_class.setdefault(type(module), []).append(name)

    def in_model(self, model: nn.Module) -> dict[str, str]:
        """Return names of modules of the saved model → names in `model`, of the outermost modules that both have."""
        prefixes: dict[str, str] = {}
        pending = [("", model)]
        while pending:
            name, module = pending.pop()
            saved_name = self.counterpart(name, module)
            if saved_name is not None and saved_name not in prefixes:
                prefixes[saved_name] = name
                continue
            for child_name, child in module.named_children():
                pending.append((f"{name}.{child_name}".lstrip("."), child))
        return prefixes

    def counterpart(self, name: str, module: nn.Module) -> str | None:
        """Return the name of the saved module that is the same as this one, None if there is none, or no telling."""
        same_place = self.modules.get(name)
        if same_place is not None and _is_same(same_place, module):
            return name
        # Whole models, such as the one for the texts in a composite model, have another name in every class. A layer
        # or a norm beside them is the same under the same name. What is in a block is so only with the whole block.
        is_whole = isinstance(module, transformers.PreTrainedModel)
        is_beside = not any(module.children()) and not any(map(str.isdigit, name.split(".")))
        if not is_whole and not is_beside:
            return None
        best: list[str] = []
        best_length = 0
        for candidate in self.by_class.get(type(module), []):
            length = _common_end(candidate, name)
            if is_beside and (length == 0 or not _has_same_tensors(self.modules[candidate], module)):
                continue
            if length > best_length or not best:
                best, best_length = [candidate], length
            elif length == best_length:
                best.append(candidate)
        return best[0] if len(best) == 1 else None


def _is_same(saved: nn.Module, module: nn.Module) -> bool:
    """Return whether two modules of the same name are the same: in their class, or in the names of their tensors."""
    if isinstance(saved, nn.ModuleList):
        return _names(saved) == _names(module)
    if isinstance(saved, type(module)) or isinstance(module, type(saved)):
        return True
    return bool(_names(module)) and _names(saved) == _names(module)


def _names(module: nn.Module) -> set[str]:
    return set(module.state_dict())


def _has_same_tensors(saved: nn.Module, module: nn.Module) -> bool:
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (saved, module)]
    return bool(shapes[0]) and shapes[0] == shapes[1]


def _common_end(one: str, other: str) -> int:
    """Return how many parts at the ends of two dotted names are the same."""
    length = 0
    for part, other_part in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if part != other_part:
            break
        length += 1
    return length


def check_sources(saved: nn.Module, model: nn.Module, counterparts: Counterparts, config: CompressionConfig) -> None:
    """Check that what was compressed is in `model`, too, or has no place there.

    Args:
        saved, model: as for `find_counterparts`.
        config: names the compressed layers of the saved model.

    Raises:
        CheckpointError: if `model` would have random weights in the place of compressed ones. A new head and the like
            are random, as transformers makes them.
    """
    names = set(model.state_dict())
    sources = names & {counterparts.name(name) for name in saved.state_dict()}
    experts = tuple(f"{name}." for name in config.experts)  # a layer in them has no name of its own in a dense model
    compressed = [*config.experts, *(name for name in config.layers if not name.startswith(experts))]
    is_complete = len(counterparts.of(dict.fromkeys(compressed), model)) == len(compressed)
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in sorted(names - sources):
        is_of_block = any(name.startswith(prefix) for prefix in lists)
        if not sources or (is_of_block and not is_complete):
            raise CheckpointError(
                f"{name}: the checkpoint has no such weights of a {type(model).__name__}; it is that of a "
                f"{type(saved).__name__}, open it by that class"
            )


def check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise CheckpointError if linear layers of a model have other shapes than the dense ones of the saved model.

    The caller of `from_pretrained` may have changed sizes in the config.

    Args:
        shapes: those of the saved model, by the names of the layers in `model`.
    """
    for name, shape in shapes.items():
        module = model.get_submodule(name)
        if is_linear(module) and dense_shape(module) != shape:
            raise CheckpointError(
                f"{name}: is {dense_shape(module)} in the model, but {shape} in the checkpoint; "
                "open it with the sizes of its own config"
            )


def tie_as_saved(saved: nn.Module, model: Any, counterparts: Counterparts, stored: Collection[str]) -> None:
    """Tie the head of a model to its embeddings where the saved model had them tied, so that files hold only one.

    The part of a config that a model of another class takes may not say so.

    Args:
        stored: names of the tensors in the files.

    Raises:
        CheckpointError: for a tensor that is tied in the saved model and has no value in another model.
    """
    for _ in range(2):
        lost = _lost_ties(saved, model, counterparts, stored)
        if not lost:
            return
        model.config.tie_word_embeddings = True
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    raise CheckpointError(
        f"{lost[0]}: is tied to another tensor in a {type(saved).__name__} and not in a {type(model).__name__}; "
        f"open the checkpoint as a {type(saved).__name__}"
    )


def _lost_ties(saved: nn.Module, model: nn.Module, counterparts: Counterparts, stored: Collection[str]) -> list[str]:
    """Return the tensors of `model` that get no values, as the saved model has them tied to others."""
    own_names = set(model.state_dict())
    tied_here = {name for group in tied_names(model) for name in group}
    lost = []
    for group in tied_names(saved):
        for saved_name in group:
            name = counterparts.name(saved_name)
            if saved_name not in stored and name in own_names and name not in tied_here:
                lost.append(name)
    return lost


class Renaming(WeightRenaming):
    """Gives the tensors of a checkpoint the names that they have in a model of another class, while it is loaded.

    Transformers knows such renamings for many families, but asks for them by patterns, and for the names of older
    files. This one takes the place of them all.
    """

    def __init__(self, counterparts: Counterparts, stored: Collection[str]) -> None:
        """Make the renaming for files with tensors of the names `stored`; empty if it is not known what they hold."""
        super().__init__("(?!)", "")  # a pattern that matches nothing, as none is asked for
        self.counterparts = counterparts
        self.stored = stored

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        # Older versions 5.x of transformers apply conversions of their own before this.
        if self.stored and source_key not in self.stored:
            raise CheckpointError(
                f"{source_key}: transformers {transformers.__version__} renames the tensors of the checkpoint for the "
                "class by which it is opened; open it by the class that saved it, or by a newer transformers"
            )
        return self.counterparts.name(source_key) or source_key, None
