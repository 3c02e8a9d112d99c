"""Checks a checkpoint, which is untrusted input, before anything is allocated.

The config is checked against the model that it names, and the headers of the files against both.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config_checks import check_config_dtype, check_generation, check_values
from .configuration import QUANT_METHOD, CompressionConfig
from .errors import CheckpointError, quoted
from .experts import ExpertBank, is_fused_experts
from .layer_spec import LayerSpec
from .safetensors_headers import FLOAT_TYPES, WEIGHTS, StoredTensor, read_headers, weight_files
from .skeletons import MOST_MODULES, limit_modules, make_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_KEY = "transformers_weights"
"""Key of a config that names a file which transformers would open in the place of those that are checked here."""
SUBCLASSES_OF_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` that compute what it computes. Others may not, and do not count as linear layers."""
MODULES_PER_TENSOR = 20
"""Maximum number of modules for each stored tensor, beside a thousand.

Where the files are there, this limit takes the place of `MOST_MODULES`.
"""
SPARE_BYTES = 64 << 20
"""Maximum number of bytes of the tables that a model computes on loading, beyond the size of its files.

Examples are position tables and causal masks.
"""

NO_LAYERS = (
    "quantization_config.layers: empty in a checkpoint that says it is compressed; delete quantization_config "
    "from config.json if the weights are dense, else download the checkpoint again"
)

Expected = tuple[tuple[int, ...], str]
"""Shape and type ("float", "uint8", or another safetensors dtype) of a tensor."""


def is_linear(module: nn.Module | None) -> bool:
    """Return whether a module is a dense linear layer that can be compressed."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    return isinstance(module, nn.Linear) and type(module).__name__ in SUBCLASSES_OF_LINEAR


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a dense `nn.Linear` or `Conv1D`."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    # Models may have computed the numbers as tensors.
    return int(module.out_features), int(module.in_features)


def resolve_experts(model: nn.Module, names: Sequence[str], most_modules: int = MOST_MODULES) -> None:
    """Put banks in the place of the fused experts that a config names.

    Raises:
        CheckpointError: for a module that the model does not have, for one that a bank cannot stand for, and for banks
            of more than `most_modules` modules.
    """
    modules = dict(model.named_modules())
    for name in names:
        module = modules.get(name)
        if not is_fused_experts(module):
            raise _unexpected_module(model, name, module, expected="fused experts")
        parent, _, child = name.rpartition(".")
        assert module is not None
        with limit_modules(most_modules):
            setattr(model.get_submodule(parent), child, ExpertBank(module))


def resolve_layers(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """Return the layers of a config, after checking each of them against the model.

    Raises:
        CheckpointError: for a layer that the model does not have, that is not a linear layer, that shares its weight
            with another module, or that does not fit the dense layer it replaces.
    """
    modules = dict(model.named_modules())
    for name, spec in layers.items():
        module = modules.get(name)
        if not is_linear(module):
            raise _unexpected_module(model, name, module, expected="a linear layer")
        assert module is not None
        spec.validate(name, *dense_shape(module))
    # A shared weight would be compressed in one place and dense in the other.
    shared_names = {name for group in tied_names(model) for name in group}
    shared_weights = shared_names & {f"{name}.weight" for name in layers}
    if shared_weights:
        raise CheckpointError(
            f"{min(shared_weights)}: is shared with another module, expected a layer of its own; the config is damaged"
        )
    return dict(layers)


def _unexpected_module(model: nn.Module, name: str, module: nn.Module | None, expected: str) -> CheckpointError:
    """Return the error for a module of another kind than the config says."""
    found = "no such module" if module is None else type(module).__name__
    return CheckpointError(
        f"{name}: found {found} in {type(model).__name__}, expected {expected}; the config was made for another model"
    )


def expected_tensors(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, Expected]:
    """Return what the files of a checkpoint must hold: all tensors of `model`, with `layers` in compressed form.

    Tensors that share their memory are all named, while a file may hold any one of them.

    Args:
        model: the dense skeleton.
    """
    expected: dict[str, Expected] = {}
    for name, tensor in model.state_dict().items():
        kind = "float" if tensor.is_floating_point() else _safetensors_name(tensor.dtype)
        expected[name] = (tuple(tensor.shape), kind)
    for layer, spec in layers.items():
        for name in model.get_submodule(layer).state_dict():
            del expected[f"{layer}.{name}"]
        expected |= _tensors_of_layer(model, layer, spec)
    return expected


def _tensors_of_layer(model: nn.Module, layer: str, spec: LayerSpec) -> dict[str, Expected]:
    """Return the tensors of a compressed layer, by their names in the checkpoint."""
    tensors = spec.tensors(*dense_shape(model.get_submodule(layer)))
    return {f"{layer}.{name}": expected for name, expected in tensors.items()}


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
        compressed_shapes_only: whether to check no shapes but those of compressed layers. The caller of
            `from_pretrained` may have changed the model's config, and with it the shapes of other tensors.

    Raises:
        CheckpointError: naming the tensor, what was found and what was expected.
    """
    expected = expected_tensors(model, layers)
    compressed: set[str] = set()
    for layer, spec in layers.items():
        compressed |= _tensors_of_layer(model, layer, spec).keys()
    optional = _optional_tensors(model, stored)
    extra = sorted(stored.keys() - expected.keys())
    # All other kinds are names of safetensors dtypes themselves.
    dtypes_of = {"float": FLOAT_TYPES, "uint8": ("U8",)}
    for name, (shape, kind) in expected.items():
        if name not in stored:
            if name in optional:
                continue
            if extra:
                raise CheckpointError(
                    f"{name}: not in the checkpoint's files, which have {extra[0]} that a {type(model).__name__} of "
                    f"transformers {transformers.__version__} does not have; open it with the version that saved it"
                )
            raise CheckpointError(
                f"{name}: missing in the checkpoint's files, expected a {kind} tensor {shape}; download it again"
            )
        if compressed_shapes_only and name not in compressed:
            continue
        tensor = stored[name]
        if tensor.shape != shape or tensor.dtype not in dtypes_of.get(kind, (kind,)):
            raise CheckpointError(
                f"{name}: {tensor.file} has {tensor.dtype} {tensor.shape}, expected {kind} {shape}; "
                "the file and the config do not belong together"
            )
    if extra:
        modules = [name.rpartition(".")[0] for name in extra]
        owner = next((module for module in modules if module in layers), type(model).__name__)
        raise CheckpointError(
            f"{owner}: unexpected tensors {extra[:5]} in the checkpoint's files; they do not belong to its config"
        )


def _optional_tensors(model: nn.Module, stored: Mapping[str, StoredTensor]) -> set[str]:
    """Return the names of the tensors that may be missing in the files.

    They are those that the model's class makes by itself, and those tied to a tensor that is stored.
    """
    optional = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for group in tied_names(model):
        if any(name in stored for name in group):
            optional |= set(group)
    return optional


def validate_checkpoint(
    values: Mapping[str, Any], folder: str | None = None
) -> tuple["PreTrainedModel", CompressionConfig]:
    """Check a compressed model's config and, in a folder, the headers of its files. Nothing is allocated.

    Args:
        values: the content of config.json.
        folder: where the weights lie, None if they are not on this machine yet.

    Returns:
        The dense skeleton on the meta device, and the compression.

    Raises:
        CheckpointError: for the first fault that is found.
    """
    check_values(values)
    compression = _recorded_compression(values)
    if (other := values.get(WEIGHTS_KEY)) is not None:
        raise CheckpointError(
            f"config.json: {WEIGHTS_KEY} is {quoted(other)}, expected none: the weights are in {WEIGHTS} or its shards"
        )
    stored: dict[str, StoredTensor] | None = None
    most_modules = MOST_MODULES
    if folder is not None:
        stored = read_headers(weight_files(folder))
        check_generation(folder)
        most_modules = 1000 + MODULES_PER_TENSOR * len(stored)
    model = make_skeleton(values, most_modules)
    resolve_experts(model, compression.experts, most_modules)
    layers = resolve_layers(model, compression.layers)
    if stored is not None:
        check_config_dtype(model.config, stored)
        validate_files(model, layers, stored)
        _check_buffers(model, sum(tensor.bytes for tensor in stored.values()))
    return model, compression


def _recorded_compression(values: Mapping[str, Any]) -> CompressionConfig:
    """Return the compression that a config.json records.

    Raises:
        CheckpointError: if it records none, or one without layers.
    """
    recorded = values.get("quantization_config")
    if not isinstance(recorded, dict) or recorded.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"config.json: the auto_map is that of a compressed model, but quantization_config is {quoted(recorded)}, "
            f"expected one with quant_method {QUANT_METHOD!r}; the config is damaged, download it again"
        )
    compression: CompressionConfig = CompressionConfig.from_dict(recorded)
    if not compression.layers:
        raise CheckpointError(NO_LAYERS)
    return compression


def tied_names(model: nn.Module, by_config: bool = True) -> list[list[str]]:
    """Return groups of names of parameters and buffers that are the same tensor.

    Args:
        by_config: whether to count those, too, that transformers will tie only after it has loaded them.
    """
    # Names by the identity of the tensor.
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    tied_keys = getattr(model, "all_tied_weights_keys", {}) if by_config else {}
    for tied, source in tied_keys.items():
        for group in names.values():
            if source in group:
                group.append(tied)
    return [group for group in names.values() if len(group) > 1]


def _check_buffers(model: nn.Module, file_bytes: int) -> None:
    """Raise CheckpointError if a model would compute far larger tables on loading than its weights are."""
    # Buffers that are not saved (persistent=False) are computed on loading, however large the config makes them.
    saved = model.state_dict().keys()
    table_bytes = 0
    for name, buffer in model.named_buffers():
        if name not in saved:
            table_bytes += buffer.numel() * buffer.itemsize
    if table_bytes > file_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"config.json: asks for {table_bytes} bytes of tables beside {file_bytes} bytes of weights; "
            "the config is damaged"
        )


def _safetensors_name(dtype: torch.dtype) -> str:
    """Return the name that safetensors gives to an integer or boolean dtype."""
    names = {
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    return names.get(dtype, str(dtype))
