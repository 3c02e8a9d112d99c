"""The entry that a checkpoint's `auto_map` names: with `trust_remote_code=True` it opens the checkpoint without the package.

Each class here, `Compressed` + the name of an Auto class, registers the plugin and hands over to transformers, so that
the native class (say, `LlamaForCausalLM`) comes back. An installed `hf_lowrank` is used instead of the files beside this
one, which are then not even imported.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import transformers

if (
    TYPE_CHECKING
):  # never run: transformers copies the files that are named here, older 5.x only those named in this very file
    from .checksums import record_checksums  # noqa: F401
    from .configuration import CompressionConfig  # noqa: F401
    from .content_checks import validate_contents  # noqa: F401
    from .errors import CompressionError  # noqa: F401
    from .experts import ExpertBank  # noqa: F401
    from .layers import CompressedLinear  # noqa: F401
    from .load_hooks import hook_configs  # noqa: F401
    from .ops import bitmask_linear  # noqa: F401
    from .packing import pack_bits  # noqa: F401
    from .pivoting import pivot  # noqa: F401
    from .quantization import Quantized  # noqa: F401
    from .quantized_ops import quantized_linear  # noqa: F401
    from .quantizer import CompressionQuantizer  # noqa: F401
    from .safetensors_headers import read_header  # noqa: F401
    from .saving import CompleteSave  # noqa: F401
    from .validation import validate_files  # noqa: F401


def _register() -> None:
    if importlib.util.find_spec("hf_lowrank") is not None:
        importlib.import_module("hf_lowrank")
        return
    from .quantizer import register

    register()


class _Entry:
    """What transformers asks of a remote class, answered by the Auto class of the same name."""

    auto_class: Any

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to remember: the native class is what comes back, and its saves carry this code by themselves."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        _register()
        kwargs["trust_remote_code"] = False
        # for the folder of an adapter, transformers passes its base model here and says where the adapter lies, but takes that only once
        adapter = dict(kwargs.pop("adapter_kwargs", None) or {})
        path, name = adapter.pop("_adapter_model_path", None), kwargs.pop("adapter_name", "default")
        model = cls.auto_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if path not in (None, pretrained_model_name_or_path):
            model.load_adapter(path, adapter_name=name, adapter_kwargs=adapter)
        return model


def __getattr__(name: str) -> type[_Entry]:
    auto_class = (
        getattr(transformers, name.removeprefix("Compressed"), None) if name.startswith("CompressedAuto") else None
    )
    if auto_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (_Entry,), {"auto_class": auto_class})
