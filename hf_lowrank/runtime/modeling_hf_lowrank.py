"""The entry that a checkpoint's `auto_map` names, for use with `trust_remote_code=True` and without the package.

Each class here is named `Compressed` and then like an Auto class of transformers. It registers the plugin and hands
over to that Auto class, so that the native class (such as `LlamaForCausalLM`) comes back. Where the package
`hf_lowrank` is installed, it is used instead of the files beside this one, which are then not even imported.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import transformers

# This block is never run. Transformers copies the files that are imported relatively, and its older versions 5.x only
# those that this very file imports. So every file of the runtime must be named here.
if TYPE_CHECKING:
    from .checksums import record_checksums  # noqa: F401
    from .compressed_linear import CompressedLinear  # noqa: F401
    from .config_checks import is_compressed  # noqa: F401
    from .configuration import CompressionConfig  # noqa: F401
    from .content_checks import check_contents  # noqa: F401
    from .errors import CompressionError  # noqa: F401
    from .experts import ExpertBank  # noqa: F401
    from .layer_spec import LayerSpec  # noqa: F401
    from .layers import SparseLowRankLinear  # noqa: F401
    from .load_hooks import hook_configs  # noqa: F401
    from .ops import bitmask_linear  # noqa: F401
    from .packing import pack_bits  # noqa: F401
    from .pivoting import pivot  # noqa: F401
    from .plain_ops import plain_bitmask_linear  # noqa: F401
    from .quantization import Quantized  # noqa: F401
    from .quantized_ops import quantized_linear  # noqa: F401
    from .quantizer import CompressionQuantizer  # noqa: F401
    from .reports import read_report  # noqa: F401
    from .safetensors_headers import read_header  # noqa: F401
    from .saving import CompleteSave  # noqa: F401
    from .skeletons import make_skeleton  # noqa: F401
    from .tracing import must_decompose  # noqa: F401
    from .validation import validate_files  # noqa: F401


def _register() -> None:
    """Make transformers know the plugin, by the installed package if there is one."""
    if importlib.util.find_spec("hf_lowrank") is not None:
        importlib.import_module("hf_lowrank")
        return
    from .quantizer import register

    register()


class _Entry:
    """Answers what transformers asks of a remote class, by the Auto class of the same name."""

    auto_class: Any

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the native class is what comes back, and its saves carry this code by themselves."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Register the plugin, and open the checkpoint by the Auto class."""
        _register()
        # This very code has been trusted already. With True, transformers would come back here for ever.
        kwargs["trust_remote_code"] = False
        # For the folder of an adapter, transformers passes its base model here and says where the adapter lies. It
        # takes that path only once, so the path is kept from the base model and the adapter is loaded afterwards.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter_path = adapter_kwargs.pop("_adapter_model_path", None)
        adapter_name = kwargs.pop("adapter_name", "default")
        model = cls.auto_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if adapter_path not in (None, pretrained_model_name_or_path):
            model.load_adapter(adapter_path, adapter_name=adapter_name, adapter_kwargs=adapter_kwargs)
        return model


def __getattr__(name: str) -> type[_Entry]:
    """Return the entry class for an Auto class of transformers, such as `CompressedAutoModel`."""
    auto_class = None
    if name.startswith("CompressedAuto"):
        auto_class = getattr(transformers, name.removeprefix("Compressed"), None)
    if auto_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Made when asked for, as a newer transformers may have more Auto classes.
    return type(name, (_Entry,), {"auto_class": auto_class})
