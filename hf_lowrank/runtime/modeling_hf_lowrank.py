"""Opens a compressed checkpoint where the package hf_lowrank is not installed, by `trust_remote_code=True`.

Each class that the `auto_map` of config.json names is called `Compressed` and then like an Auto class of transformers.
It registers the plugin and hands over to that Auto class, so that the native class (such as `LlamaForCausalLM`) comes
back. Where the package is installed, it is used instead of the code in this file.
"""

import hashlib
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from .checksums import LOADING_CODE, checksum_mismatch
from .quantizer import register
from .saving import CompleteSave

# What a model writes that was opened by this code. Git may have changed the ends of the lines.
CompleteSave.own_code = Path(__file__).read_bytes().replace(b"\r\n", b"\n")


class _Entry:
    """Answers what transformers asks of a remote class, by the Auto class of the same name."""

    auto_class: Any

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: the native class is what comes back, and its saves carry this code by themselves."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Register the plugin, and open the checkpoint by the Auto class.

        Raises:
            CheckpointError: if this file is not the one that was saved with the checkpoint.
        """
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)[0]
        _check_own_code(config)
        register()
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


def _check_own_code(config: dict[str, Any] | PreTrainedConfig) -> None:
    """Raise CheckpointError if a checkpoint's config has another checksum for this file. It may have none."""
    values = config if isinstance(config, dict) else vars(config)
    recorded = values.get("quantization_config")
    checksums = recorded.get("checksums") if isinstance(recorded, dict) else None
    expected = checksums.get(LOADING_CODE) if isinstance(checksums, dict) else None
    found = hashlib.sha256(CompleteSave.own_code).hexdigest()
    if expected is not None and found != expected:
        raise checksum_mismatch(LOADING_CODE, found, expected)


def __getattr__(name: str) -> type[_Entry]:
    """Return the entry class for an Auto class of transformers, such as `CompressedAutoModel`."""
    auto_class = None
    if name.startswith("CompressedAuto"):
        auto_class = getattr(transformers, name.removeprefix("Compressed"), None)
    if auto_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Made when asked for, as a newer transformers may have more Auto classes.
    return type(name, (_Entry,), {"auto_class": auto_class})
