"""The HfQuantizer of the plugin. It swaps linear layers for compressed ones before the weights arrive, and back."""

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .checksums import check_weights
from .compressed_linear import has_compressed_layers
from .config_checks import config_beside
from .configuration import QUANT_METHOD, CompressionConfig
from .content_checks import check_contents
from .counterparts import Counterparts, Renaming, check_shapes, check_sources, find_counterparts, tie_as_saved
from .embeddings import (
    CompressedEmbedding,
    compress_embedding,
    decompress_embeddings,
    has_compressed_embeddings,
    is_embedding,
    keep_ties,
    refuse_resize,
    swap_module,
)
from .errors import CompressionError
from .experts import ExpertBank
from .layer_spec import LayerSpec
from .layers import CompressedLinear, build_layer
from .load_hooks import hook_configs, hook_models, hook_tokenizers
from .safetensors_headers import read_headers
from .saving import CompleteSave
from .skeletons import STAND_IN, make_skeleton, saved_skeleton
from .validation import NO_LAYERS, dense_shape, resolve_experts, resolve_layers, tied_heads, validate_files
from .widths import usual_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHE_LINE = 64
"""Number of bytes. Torch's own allocations start at multiples of it."""
NOT_SPLIT = (
    "tp_plan: compressed layers are not split over processes; load without it, for instance with device_map='auto'"
)
CAST_METHODS = ("float", "half")
"""Methods that transformers refuses on every quantized model.

The float tensors of a compressed model can be cast like those of a dense one.
"""


EMBEDDING_METHODS = {"resize_token_embeddings": refuse_resize, "tie_weights": keep_ties}
"""Methods of ours that stand in for those of a model with compressed embeddings."""


class CompressionQuantizer(HfQuantizer):
    """Loads, saves and dequantizes compressed models in transformers' own `from_pretrained` and `save_pretrained`.

    Attributes:
        compress_on_load: called after loading for `from_pretrained(dense, quantization_config=...)`. The package sets
            it, as the runtime alone can open compressed checkpoints but not make them.
        checkpoint_files: files that the weights come from. There are none where the caller brings a state dict.
        renaming: what renames the tensors on loading; None for a model of the class that was saved.
    """

    quantization_config: CompressionConfig
    requires_calibration = False
    compress_on_load: ClassVar[Any] = None
    checkpoint_files: Sequence[str] = ()
    renaming: Renaming | None = None

    def __init__(self, quantization_config: CompressionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized and not quantization_config.layers:
            raise CompressionError(NO_LAYERS)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.compress_on_load is None:
            raise CompressionError(
                "compressing a dense model needs the package: pip install hf_lowrank, then import hf_lowrank"
            )

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        """Check the checkpoint's files, and put empty compressed layers in the place of the skeleton's dense ones."""
        if not self.pre_quantized:
            return
        distributed_config = getattr(model.config, "distributed_config", None)
        if getattr(distributed_config, "tp_plan", None) is not None:
            raise CompressionError(NOT_SPLIT)
        config = self.quantization_config
        self.checkpoint_files = kwargs.get("checkpoint_files") or []
        self._fit_to(model)
        resolve_layers(model, config.layers)
        for name, spec in config.layers.items():
            module = model.get_submodule(name)
            if is_embedding(module):
                compress_embedding(model, name, spec, tied_heads(model, name) or {})
            else:
                swap_module(model, name, _build_like(module, spec))

    def _fit_to(self, model: "PreTrainedModel") -> None:
        """Check the checkpoint's files, and name the compressed layers as `model` does, which may be of another class.

        What the model has no place for is left out, such as the pictures' part of a checkpoint that is opened by the
        class of its language model.

        Raises:
            CheckpointError: if files and config do not fit, or if the model would have random weights in the place of
                compressed ones.
        """
        config = self.quantization_config
        values = config_beside(self.checkpoint_files[0]) if self.checkpoint_files else None
        if values is None:
            saved = saved_skeleton(model)
        else:
            saved = make_skeleton(values)
            recorded: CompressionConfig = CompressionConfig.from_dict(values["quantization_config"])
            config.experts, config.layers = recorded.experts, recorded.layers
        same_class = type(saved) is type(model)
        counterparts = Counterparts({"": ""}) if same_class else find_counterparts(saved, model)
        check_sources(saved, model, counterparts, config)
        resolve_experts(saved, config.experts)
        layers = resolve_layers(saved, config.layers)
        stored = read_headers(self.checkpoint_files)
        if self.checkpoint_files:
            # Where the config is not the one of the files, the sizes of other tensors may have been changed.
            validate_files(saved, layers, stored, compressed_shapes_only=values is None)
        if not same_class:
            self.renaming = Renaming(counterparts, set(stored))
            tie_as_saved(saved, model, counterparts, stored)
        config.experts = list(counterparts.of(dict.fromkeys(config.experts), model))
        resolve_experts(model, config.experts)
        config.layers = counterparts.of(config.layers, model)
        shapes = counterparts.of({name: dense_shape(saved.get_submodule(name)) for name in layers}, model)
        check_shapes(model, shapes)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Check what was loaded, and make the model a compressed one.

        A model that was loaded dense is compressed instead.
        """
        if not self.pre_quantized:
            assert self.compress_on_load is not None
            self.compress_on_load(model, self.quantization_config)
            return model
        # The oldest versions 5.x of transformers do not tell of a tensor parallel plan any sooner.
        if model.tp_size is not None and not hasattr(model.config, "distributed_config"):
            raise CompressionError(NOT_SPLIT)
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear):
                module.restore_bytes()
            if isinstance(module, (CompressedLinear, CompressedEmbedding)):
                tensors = dict(module.named_parameters()) | dict(module.named_buffers())
                check_contents(name, module.spec, *compressed_shape(module), tensors)
        check_weights(self.checkpoint_files, self.quantization_config.checksums)
        if self.renaming is not None:
            # It is for those files alone. A save by transformers would apply it backwards.
            vars(model)["_weight_conversions"] = []
            self.renaming = None
        # They belong to those files, and not to what becomes of the model.
        self.quantization_config.checksums = {}
        self.quantization_config.companions = {}
        attach(model, self)
        if self.checkpoint_files:
            CompleteSave.attach(model).stored_dtype = usual_dtype(read_headers(self.checkpoint_files))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Return how the tensors are renamed while they are loaded.

        Transformers' own conversions are for the names of the dense files of a family. Not all of its versions give
        the model, too.
        """
        return weight_conversions if self.renaming is None else [self.renaming]

    def get_weight_conversions(self) -> list[Any]:
        """Return what the older versions 5.x of transformers add to their own conversions."""
        return [] if self.renaming is None else [self.renaming]

    def dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Make all layers dense, in their own dtype if no other is asked for.

        Transformers' own `dequantize` would take the dtype of the last load or save instead.
        """
        # This replaces the base class's method, and so has to do all that it does.
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Make all layers dense, and undo what `attach` does."""
        for name, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear):
                swap_module(model, name, dense_module(module, dtype))
        decompress_embeddings(model, dtype)
        fuse_experts(model)
        for method in (*CAST_METHODS, *EMBEDDING_METHODS):
            model.__dict__.pop(method, None)
        CompleteSave.detach(model)
        # Loading a compressed checkpoint needs no conversions, and leaves an empty list of them. Without the list,
        # transformers saves the dense model in the format of its family.
        if not model.__dict__.get("_weight_conversions"):
            model.__dict__.pop("_weight_conversions", None)
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Return the state dict that `save_pretrained` was given.

        Transformers drops it for a quantized model and asks here instead.
        """
        save = model.__dict__.get("save_pretrained")
        return (save.state_dict if isinstance(save, CompleteSave) else None), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register(override: bool = False) -> None:
    """Make transformers know the plugin.

    Args:
        override: whether to displace a plugin that is registered already. The package does so. A checkpoint's copy of
            this file does not, as it must not displace the package.
    """
    if override or QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        # Transformers' own functions for this refuse to register a name for a second time.
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = CompressionConfig
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = CompressionQuantizer
        if not override:
            register_module_module_registration_hook(_watch_adapters)
    hook_configs()
    hook_models()
    hook_tokenizers()


def _watch_adapters(adapter: nn.Module, name: str, layer: nn.Module | None) -> None:
    """Make whatever PEFT wraps around a compressed layer refuse to be merged, where the package is not there to do it.

    PEFT would change `weight` as if that were the whole matrix. Some shapes allow it, and the result would be silently
    wrong. Torch calls this function for every module that is registered as part of another one.
    """
    if name == "base_layer" and isinstance(layer, CompressedLinear):
        adapter.merge = _refuse_merge  # type: ignore[assignment]  # a method of PEFT's layers


def _refuse_merge(*args: Any, **kwargs: Any) -> None:
    raise CompressionError(
        "merging adapters into compressed layers needs the package: pip install hf_lowrank, "
        "then open the model again; unmerged they run"
    )


def attach_part(model: "PreTrainedModel") -> bool:
    """Attach a quantizer to a model that has none but holds compressed layers. Return whether that was so.

    It is a part of a compressed model, such as the base model under a head, or was given layers of one.

    Raises:
        CompressionError: if its config does not say how the layers were made.
    """
    if "save_pretrained" in vars(model) or not has_compressed_layers(model):
        return False
    recorded = getattr(model.config, "quantization_config", None)
    if not isinstance(recorded, CompressionConfig):
        raise CompressionError(
            f"{type(model).__name__}: holds compressed layers of another model, and its config says nothing of them; "
            "make it with the config of that model, or save that model"
        )
    config = copy.deepcopy(recorded)
    config.provenance.pop(STAND_IN, None)  # for the class of the whole model
    attach(model, CompressionQuantizer(config, pre_quantized=True))
    return True


def attach(model: "PreTrainedModel", quantizer: CompressionQuantizer) -> None:
    """Mark a model that holds compressed layers as transformers marks quantized ones, and make its saves complete."""
    align(model)
    hook_models()  # its config may be used for a dense model
    marked: Any = model
    # `PreTrainedModel` does not declare these attributes. Transformers asks for them at many places.
    marked.hf_quantizer = quantizer
    marked.is_quantized = True
    marked.quantization_method = quantizer.quantization_config.quant_method
    marked.config.quantization_config = quantizer.quantization_config
    marked.config._is_quantized = True
    marked.add_model_tags(QUANT_METHOD)  # for the cards that trainers write
    for cast in CAST_METHODS:
        # Transformers' own methods raise for quantized models; those of torch do not.
        marked.__dict__[cast] = functools.partial(getattr(nn.Module, cast), model)
    if has_compressed_embeddings(model):
        for method, stand_in in EMBEDDING_METHODS.items():
            marked.__dict__[method] = functools.partial(stand_in, model)
    CompleteSave.attach(model)


def align(model: nn.Module) -> None:
    """Move tensors that do not start at a cache line to memory of their own. Tensors mapped from a file are such.

    The order in which matrix products sum depends on it, and so does the last bit of a logit. Without this, a model
    would not give the same logits before saving and after loading.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % CACHE_LINE:
            tensor.data = tensor.data.clone()


def compressed_shape(module: CompressedLinear | CompressedEmbedding) -> tuple[int, int]:
    """Return the shape of the matrix that a compressed layer or embedding stands for."""
    if isinstance(module, CompressedEmbedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def fuse_experts(model: nn.Module) -> None:
    """Put fused experts, as the model's class has them, in the place of banks, all layers of which must be dense."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertBank):
            swap_module(model, name, module.fuse())


def dense_module(layer: CompressedLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the dense layer with the same matrix: a `Conv1D` where there was one, else an `nn.Linear`."""
    weight = layer.to_dense(dtype)
    dense: Conv1D | nn.Linear
    if layer.replaces_conv1d:
        # On the meta device, so that no memory is taken and no random number drawn before the weight is put in.
        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)
        dense.weight = nn.Parameter(weight.T.contiguous())
        dense.bias = nn.Parameter(weight.new_zeros(layer.out_features))
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    return dense


def _build_like(module: nn.Module, spec: LayerSpec) -> CompressedLinear:
    """Return an empty compressed layer with shape, device and dtype of a dense one."""
    out_features, in_features = dense_shape(module)
    weight: Any = module.weight
    layer = build_layer(spec, in_features, out_features, device=weight.device, dtype=weight.dtype)
    layer.replaces_conv1d = isinstance(module, Conv1D)
    return layer
