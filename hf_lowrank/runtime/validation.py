"""A checkpoint is untrusted input: its config is checked against the model, its files against both, before anything is allocated."""

import contextlib
import copy
import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from .configuration import QUANT_METHOD, CompressionConfig, LayerSpec
from .errors import CheckpointError
from .experts import ExpertBank, is_fused_experts
from .safetensors_headers import (
    BITS,
    FLOAT_TYPES,
    REPORT_FILE,
    WEIGHTS,
    StoredTensor,
    read_headers,
    read_json,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY_FILE = "modeling_hf_lowrank.py"
OTHER_WEIGHTS = "transformers_weights"
"""Names a file that transformers would open in the place of those that are checked here."""
SUBCLASSES_OF_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` that compute just what it does; others may not, and are no linear layers here."""
COUNTED = ("layer", "block", "stage", "depth", "expert", "head", "label")
"""In the names of numbers of which transformers makes as many objects."""
MOST_COUNTED = 100_000
MOST_NESTED = 100
"""Levels of lists and dictionaries in a config."""
MOST_MODULES = 200_000
"""In a model whose files are not here yet; else so many for each stored tensor, and a thousand."""
MODULES_PER_TENSOR = 20
SPARE_BYTES = 64 << 20
"""What a model may compute for itself on loading (position tables, causal masks) beyond the size of its files."""
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Value = TypeVar("Value")
Expected = tuple[tuple[int, ...], str]
"""Shape and type ("float", "uint8", or another safetensors dtype) of a tensor."""


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a dense linear layer that can be compressed."""
    return type(module) in (nn.Linear, Conv1D) or (
        isinstance(module, nn.Linear) and type(module).__name__ in SUBCLASSES_OF_LINEAR
    )


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense `nn.Linear` or `Conv1D`."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def resolve_experts(model: nn.Module, names: Sequence[str], most_modules: int = MOST_MODULES) -> list[str]:
    """Put banks in the place of the fused experts that a config names, and return the names that these have in `model`.

    Raises:
        CheckpointError: for a module that the model does not have, that a bank cannot stand for, or banks of more than `most_modules`.
    """
    modules = dict(model.named_modules())
    names = list(_renamed(model, dict.fromkeys(names), modules.keys()))
    for name in names:
        module = modules.get(name)
        if not is_fused_experts(module):
            found = "no such module" if module is None else type(module).__name__
            raise CheckpointError(
                f"{name}: found {found} in {type(model).__name__}, expected fused experts; the config was made for another model"
            )
        parent, _, child = name.rpartition(".")
        assert module is not None
        with at_most(most_modules):
            setattr(model.get_submodule(parent), child, ExpertBank(module))
    return names


def resolve_layers(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """The layers of a config under the names that they have in `model`, each checked against the dense module it replaces.

    A checkpoint of a full model may be opened as its base model and the other way round, so the base model's prefix may differ.

    Raises:
        CheckpointError: for a layer that the model does not have, that is not a linear layer, shares its weight, or does not fit.
    """
    modules = dict(model.named_modules())
    layers = _renamed(model, layers, modules.keys())
    for name, spec in layers.items():
        module = modules.get(name)
        if not is_linear(module):
            found = "no such module" if module is None else type(module).__name__
            raise CheckpointError(
                f"{name}: found {found} in {type(model).__name__}, expected a linear layer; the config was made for another model"
            )
        assert module is not None
        spec.validate(name, *dense_shape(module))
    tied = {f"{name}.weight" for name in layers} & {name for group in _tied_names(model) for name in group}
    if tied:
        raise CheckpointError(
            f"{min(tied)}: is shared with another module, expected a layer of its own; the config is damaged"
        )
    return dict(layers)


def _renamed(model: nn.Module, by_name: Mapping[str, Value], modules: Collection[str]) -> dict[str, Value]:
    """What belongs to modules of a checkpoint, by the names that these have in `model`: with its base model's prefix or without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if by_name and prefix != "." and not any(name in modules for name in by_name):
        if all(name.startswith(prefix) for name in by_name):
            return {name.removeprefix(prefix): value for name, value in by_name.items()}
        return {prefix + name: value for name, value in by_name.items()}
    return dict(by_name)


def expected_tensors(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, Expected]:
    """What the files of a checkpoint must hold: every tensor of `model`, a dense skeleton, with `layers` compressed.

    Tensors that share their memory are all named; a file may hold any of them.
    """
    expected: dict[str, Expected] = {}
    for name, tensor in model.state_dict().items():
        kind = "float" if tensor.is_floating_point() else _safetensors_name(tensor.dtype)
        expected[name] = (tuple(tensor.shape), kind)
    for layer, spec in layers.items():
        module = model.get_submodule(layer)
        for name in module.state_dict():
            del expected[f"{layer}.{name}"]
        expected |= {f"{layer}.{name}": found for name, found in spec.tensors(*dense_shape(module)).items()}
    return expected


def validate_files(
    model: nn.Module,
    layers: Mapping[str, LayerSpec],
    stored: Mapping[str, StoredTensor],
    compressed_shapes_only: bool = False,
) -> None:
    """Check every stored tensor against the model and its compressed layers, from the safetensors headers alone.

    Args:
        model: the dense skeleton of the class that the checkpoint was saved from.
        layers: what the config says of the compressed layers.
        stored: what the headers say.
        compressed_shapes_only: whether the caller may have changed the model's config, and with it the shapes of other tensors.

    Raises:
        CheckpointError: naming the tensor, what was found and what was expected.
    """
    expected = expected_tensors(model, layers)
    own = {
        f"{layer}.{name}"
        for layer, spec in layers.items()
        for name in spec.tensors(*dense_shape(model.get_submodule(layer)))
    }
    optional = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # tensors that the class makes itself
    for group in _tied_names(model):
        if any(name in stored for name in group):
            optional |= set(group)
    for name, (shape, kind) in expected.items():
        if name not in stored:
            if name in optional:
                continue
            raise CheckpointError(
                f"{name}: missing in the checkpoint's files, expected a {kind} tensor {shape}; download it again"
            )
        found = stored[name]
        if compressed_shapes_only and name not in own:
            continue
        if found.shape != shape or found.dtype not in {"float": FLOAT_TYPES, "uint8": ("U8",)}.get(kind, (kind,)):
            raise CheckpointError(
                f"{name}: {found.file} has {found.dtype} {found.shape}, expected {kind} {shape}; "
                "the file and the config do not belong together"
            )
    extra = stored.keys() - expected.keys()
    if extra:
        owner = next(
            (name.rpartition(".")[0] for name in sorted(extra) if name.rpartition(".")[0] in layers),
            type(model).__name__,
        )
        raise CheckpointError(
            f"{owner}: unexpected tensors {sorted(extra)[:5]} in the checkpoint's files; they do not belong to its config"
        )


def validate_checkpoint(
    values: Mapping[str, Any], folder: str | None = None
) -> tuple["PreTrainedModel", CompressionConfig]:
    """Check a compressed model's config and, in a folder, the headers of its files; nothing is allocated.

    Args:
        values: the content of config.json.
        folder: where the weights lie; None if they are not on this machine yet.

    Returns:
        The dense skeleton on the meta device, and the compression.

    Raises:
        CheckpointError: for whatever is wrong first.
    """
    check_values(values)
    recorded = values.get("quantization_config")
    if not isinstance(recorded, dict) or recorded.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"config.json: the auto_map is that of a compressed model, but quantization_config is {recorded!r}, expected one with "
            f"quant_method {QUANT_METHOD!r}; the config is damaged, download it again"
        )
    compression: CompressionConfig = CompressionConfig.from_dict(recorded)
    if not compression.layers:
        raise CheckpointError(
            "quantization_config.layers: empty in a checkpoint that says it is compressed; "
            "delete quantization_config from config.json if the weights are dense, else download the checkpoint again"
        )
    if (other := values.get(OTHER_WEIGHTS)) is not None:
        raise CheckpointError(
            f"config.json: {OTHER_WEIGHTS} is {other!r}, expected none: the weights are in {WEIGHTS} or its shards"
        )
    stored: dict[str, StoredTensor] | None = None
    if folder is not None:
        stored = read_headers(weight_files(folder))
        check_generation(folder)
    most_modules = MOST_MODULES if stored is None else 1000 + MODULES_PER_TENSOR * len(stored)
    model = make_skeleton(values, most_modules)
    experts = resolve_experts(model, compression.experts, most_modules)
    layers = resolve_layers(model, compression.layers)
    if [*experts, *layers] != [*compression.experts, *compression.layers]:
        name = next(iter([*compression.experts, *compression.layers]))
        raise CheckpointError(
            f"{name}: no such module in {type(model).__name__}; the config was made for another model"
        )
    if stored is not None:
        check_dtype(model.config, stored)
        validate_files(model, layers, stored)
        _check_buffers(model, sum(math.prod(tensor.shape) * BITS[tensor.dtype] // 8 for tensor in stored.values()))
    return model, compression


def make_skeleton(values: Mapping[str, Any], most_modules: int = MOST_MODULES) -> "PreTrainedModel":
    """The dense model of a config.json, of the class that it names, on the meta device.

    Raises:
        CheckpointError: if transformers cannot make one, or it has more than `most_modules` modules.
    """
    values = {
        name: copy.deepcopy(value) for name, value in values.items() if name not in ("auto_map", "quantization_config")
    }
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, expected one that transformers {transformers.__version__} knows"
        )
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json: architectures is {names!r}, expected the name of a model class of transformers"
        )
    expected = model_class.config_class
    if expected is not None and not issubclass(transformers.CONFIG_MAPPING[model_type], expected):
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}, expected {expected.model_type!r}, that of {name}; the config is damaged"
        )
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(values)
        with torch.device("meta"), at_most(most_modules):
            return model_class._from_config(config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers makes of what somebody wrote into the file
        raise CheckpointError(
            f"config.json: transformers cannot make a {name} of it ({type(error).__name__}: {error}); download it again"
        ) from error


@contextlib.contextmanager
def at_most(modules: int) -> Iterator[None]:
    """While active, this thread makes no more than so many modules; a config that asks for more would take hours and all memory."""
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal made
        if threading.get_ident() == thread:
            made += 1
            if made > modules:
                raise CheckpointError(
                    f"config.json: asks for more than {modules} modules, which its weights cannot fill; it is damaged"
                )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_values(values: Any, key: str = "", depth: int = 0) -> None:
    """Raise CheckpointError for a number of layers, heads, experts or labels that no model has, as some configs make lists as long,
    for what no dtype is called, wherever it stands, as transformers looks for a name in it, and for values nested so deep that to copy
    them would end in a RecursionError.
    """
    if depth > MOST_NESTED:
        raise CheckpointError(
            f"config.json: nested more than {MOST_NESTED} levels deep; it is damaged, download it again"
        )
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_values(value, str(name), depth + 1)
    elif isinstance(values, list):
        for value in values:
            check_values(value, key, depth + 1)
    elif isinstance(values, (int, float)) and not abs(values) <= MOST_COUNTED and any(word in key for word in COUNTED):
        raise CheckpointError(
            f"config.json: {key} is {values!r}, expected at most {MOST_COUNTED}; the config is damaged"
        )
    if key == "dtype" and not isinstance(
        values, (str, int, Mapping, type(None))
    ):  # an integer: a token of that name in a vocabulary
        raise CheckpointError(f"config.json: {key} is {values!r}, expected the name of one; the config is damaged")


def check_dtype(config: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if a config asks for a dtype in which no tensor is stored: loading would take more memory than the files."""
    dtypes = {TORCH_NAMES[tensor.dtype] for tensor in stored.values() if tensor.dtype in FLOAT_TYPES}
    if config.dtype is not None and str(config.dtype).removeprefix("torch.") not in dtypes:
        raise CheckpointError(
            f"config.json: dtype is {config.dtype}, expected one that is stored: {', '.join(sorted(dtypes))}"
        )


def check_generation(folder: str) -> None:
    """Raise CheckpointError if there is a generation_config.json beside the weights that transformers cannot read."""
    file = os.path.join(folder, "generation_config.json")
    if os.path.isfile(file):
        values = read_json(file)
        try:
            transformers.GenerationConfig.from_dict(values)
        except Exception as error:  # whatever transformers makes of what somebody wrote into the file
            raise CheckpointError(
                f"{file}: cannot be used ({type(error).__name__}: {error}); download it again, or delete it"
            ) from error


def saved_skeleton(model: "PreTrainedModel") -> "PreTrainedModel":
    """A dense skeleton of the class that a model's checkpoint was saved from, or of its own, if unknown."""
    names = getattr(model.config, "architectures", None) or [""]
    model_class = getattr(transformers, str(names[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        model_class = type(model)
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(model.config))


def is_compressed(values: Any) -> bool:
    """Whether the content of a config.json is, or once was, that of a compressed model."""
    if not isinstance(values, Mapping):
        return False
    recorded, entries = values.get("quantization_config"), values.get("auto_map")
    if isinstance(recorded, dict) and recorded.get("quant_method") == QUANT_METHOD:
        return True
    return isinstance(entries, dict) and any(
        str(entry).startswith("modeling_hf_lowrank.") for entry in entries.values()
    )


def holds_checkpoint(folder: str) -> bool:
    """Whether a compressed model was saved in a folder, whatever has become of its config."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in (ENTRY_FILE, REPORT_FILE))


def mentions_checkpoint(folder: str) -> bool:
    """Whether a config that cannot be read is likely to be that of a compressed model: a folder may have lost all its other files."""
    config = os.path.join(folder, "config.json")
    if not os.path.isfile(config):
        return False
    with open(config, "rb") as stream:
        return QUANT_METHOD.encode() in stream.read()


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Names of parameters and buffers that are the same tensor, or will be: transformers ties weights only after it has loaded them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for tied, source in getattr(model, "all_tied_weights_keys", {}).items():
        for group in names.values():
            if source in group:
                group.append(tied)
    return [group for group in names.values() if len(group) > 1]


def _check_buffers(model: nn.Module, file_bytes: int) -> None:
    saved = model.state_dict().keys()
    made = sum(buffer.numel() * buffer.itemsize for name, buffer in model.named_buffers() if name not in saved)
    if made > file_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"config.json: asks for {made} bytes of tables beside {file_bytes} bytes of weights; the config is damaged"
        )


def _safetensors_name(dtype: torch.dtype) -> str:
    names = {
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    return names.get(dtype, str(dtype))
