"""CompressionConfig holds the recipe of a compression, and in a checkpoint what every compressed layer stores."""

import copy
import dataclasses
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import CheckpointError, CompressionError, quoted
from .layer_spec import LayerSpec
from .quantization import BITS

QUANT_METHOD = "hf_lowrank"
"""Name under which transformers finds the plugin, stored in every checkpoint."""
FORMAT_VERSION = 1
"""Version of the checkpoint format that this code writes. It reads this version and all earlier ones."""


UNITS_OF_SIZE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
"""Bytes of the units in which a size may be given, before the B."""


class DefaultMethod(str):
    """The method of a recipe that names none. Some models need another one."""


class DefaultRatio(float):
    """The ratio of a recipe that names none. Options of the method may lead to another one."""


class DerivedRatio(float):
    """The ratio that the bits or the size of a recipe have led to. With another model they lead to another one."""


@dataclass
class CompressionConfig(QuantizationConfigMixin):
    """Says how a model is compressed, and in a checkpoint also what every compressed layer stores.

    At most one of `ratio`, `bits` and `size` says how small the model becomes. A checkpoint records beside `bits` or
    `size` the ratio that they have led to.

    Once `hf_lowrank` has been imported, `from_pretrained` opens checkpoints that have such a config. Given to
    `from_pretrained` as `quantization_config=` with a dense model, it compresses the model on loading.

    Raises:
        CompressionError: if a field is out of its range.
    """

    method: str = field(
        default=DefaultMethod("auto"),
        metadata={
            "help": "compression method; `hf-lowrank methods` lists all; default: auto, or slab for a model that "
            "predicts no next tokens"
        },
    )
    ratio: float = field(
        default=DefaultRatio(0.5),
        metadata={
            "help": "fraction of stored bits removed from the linear layers of the blocks, in (0, 1); "
            "default: what the method's options lead to (as bits do), else 6 bits with auto, 0.5 with other methods"
        },
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "settings of the method, by name; defaults are the paper's, where it gives any"},
    )
    calibration: str = field(
        default="bundled",
        metadata={
            "help": "calibration text: 'bundled' (installed with the package), 'self' (sampled from the model), a "
            "dataset (wikitext2, c4), or a file of texts"
        },
    )
    samples: int = field(default=128, metadata={"help": "number of calibration sequences"})
    sequence_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens per calibration sequence; default: the model's context, at most 2048, or 512 of the "
            "bundled text and 256 of a sampled one"
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "seed of everything random: same seed, same bytes (exceptions: docs/promises.md)"},
    )
    refinement_steps: int = field(
        default=0,
        metadata={"help": "training steps per block, after compression, towards the dense block's output; 0: none"},
    )
    accounting: str = field(
        default="bits", metadata={"help": "'bits' counts everything stored; 'paper' leaves bitmask bits out"}
    )
    modules_to_not_convert: list[str] = field(
        default_factory=list, metadata={"help": "layers to leave dense: names, suffixes of names, or shell patterns"}
    )
    bits: float | None = field(
        default=None,
        metadata={
            "help": "in place of the ratio: stored bits per weight of the linear layers of the blocks, with scales, "
            "masks and all"
        },
    )
    size: int | str | None = field(
        default=None,
        metadata={
            "help": "in place of the ratio: bytes of the weight files, embeddings and all, also as '80MB' or '1.5GiB'"
        },
    )
    embeddings: bool | int | None = field(
        default=None,
        metadata={
            "help": "bits of a value of embeddings and head, 2 to 8, or true (8), or false (not compressed); default: "
            "what a size needs, else not compressed"
        },
    )
    provenance: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "recorded by compress(): versions, base model, fingerprints"}
    )
    checksums: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "recorded when saving: sha256 of the files, compared by from_pretrained (weights) "
            "and `hf-lowrank verify`"
        },
    )
    companions: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "recorded when saving: sha256 of what was put beside the weights, so that later saves know it "
            "from files of the user's"
        },
    )
    experts: list[str] = field(
        default_factory=list,
        metadata={"help": "recorded by compress(): modules of fused experts that are stored expert by expert"},
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "version of the checkpoint format"})
    layers: dict[str, LayerSpec] = field(
        default_factory=dict, metadata={"help": "what each compressed layer stores, by module name"}
    )
    quant_method: str = field(  # type: ignore[assignment]  # transformers types it as its own enumeration
        default=QUANT_METHOD, init=False, metadata={"help": "the name under which transformers finds the plugin"}
    )

    def __post_init__(self) -> None:
        # `bool` has to be ruled out by itself wherever a number is expected: for Python, it is a kind of integer.
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < 1:
            raise CompressionError(
                f"ratio: found {quoted(self.ratio)}, expected a number between 0 and 1, "
                "the fraction of stored bits to remove"
            )
        self._check_target()
        if self.embeddings is not None and not isinstance(self.embeddings, bool) and self.embeddings not in BITS:
            raise CompressionError(
                f"embeddings: found {self.embeddings!r}, expected true, false, or bits from {BITS[0]} to {BITS[-1]}"
            )
        self._check_count("samples", least=1)
        if self.sequence_length is not None:
            self._check_count("sequence_length", least=1)
        self._check_count("seed", least=0)
        self._check_count("refinement_steps", least=0)
        for name in ("method", "calibration"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or not value.isprintable():
                raise CompressionError(f"{name}: found {quoted(value)}, expected a name")
        if not isinstance(self.method, DefaultMethod):
            self.method = canonical_method_name(self.method)
        for name in ("options", "provenance", "checksums", "companions"):
            if not isinstance(getattr(self, name), dict):
                raise CompressionError(f"{name}: found {quoted(getattr(self, name))}, expected a dictionary")
        self._check_names("modules_to_not_convert", expected="a list of layer names or patterns")
        self._check_names("experts", expected="a list of module names")
        for name in ("checksums", "companions"):
            for item in getattr(self, name).items():
                if not all(isinstance(text, str) for text in item):
                    raise CompressionError(f"{name}: expected sha256 sums in hexadecimal digits, by file name")
        if self.accounting not in ("bits", "paper"):
            raise CompressionError(f"accounting: found {quoted(self.accounting)}, expected 'bits' or 'paper'")

    def _check_target(self) -> None:
        """Check the bits and the size, which becomes a number of bytes, and that they do not contradict each other."""
        is_number = isinstance(self.bits, (int, float)) and not isinstance(self.bits, bool)
        if self.bits is not None and not (is_number and 0 < self.bits < math.inf):
            raise CompressionError(
                f"bits: found {self.bits!r}, expected a number above 0, "
                "the stored bits per weight of the linear layers of the blocks"
            )
        if self.size is not None:
            self.size = size_in_bytes(self.size)
        if self.size is not None and self.accounting == "paper":
            raise CompressionError("size: files hold masks, too, which accounting 'paper' leaves out; use 'bits'")
        given = {name: getattr(self, name) for name in ("bits", "size") if getattr(self, name) is not None}
        if not isinstance(self.ratio, (DefaultRatio, DerivedRatio)):
            given = {"ratio": self.ratio, **given}
        if len(given) > 1:
            found = " and ".join(f"{name} {value}" for name, value in given.items())
            raise CompressionError(f"ratio, bits, size: found {found}, expected one of the three")

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CompressionError(f"{name}: found {quoted(value)}, expected a whole number of at least {least}")

    def _check_names(self, name: str, expected: str) -> None:
        names = getattr(self, name)
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            raise CompressionError(f"{name}: found {quoted(names)}, expected {expected}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a config from a checkpoint's `quantization_config`.

        Args:
            return_unused_kwargs: whether to return, beside the config, the keyword arguments that are not its fields.
            kwargs: values of fields that replace those of the checkpoint.

        Raises:
            CheckpointError: for an unknown field, a newer format, or a layer that cannot be.
        """
        # Transformers goes on using its dictionary.
        values = copy.deepcopy(config_dict)
        # A recipe that a user wrote has no layers, and need not name a version either.
        default_version = None if values.get("layers") else FORMAT_VERSION
        version = values.get("format_version", default_version)
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: quantization_config.format_version: found {quoted(version)}, expected 1 to "
                f"{FORMAT_VERSION}; a newer checkpoint needs a newer hf_lowrank (pip install -U hf_lowrank)"
            )
        if values.pop("quant_method", QUANT_METHOD) != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config.quant_method: found {quoted(config_dict['quant_method'])}, expected "
                f"{QUANT_METHOD!r}"
            )
        field_names = {config_field.name for config_field in dataclasses.fields(cls) if config_field.init}
        for name in values:
            if name not in field_names:
                raise CheckpointError(
                    f"quantization_config.{name}: unknown field; a newer hf_lowrank may know it "
                    "(pip install -U hf_lowrank)"
                )
        layers = values.pop("layers", {})
        is_recorded = bool(layers or values.get("provenance"))
        if is_recorded and isinstance(values.get("ratio"), float) and not values.keys().isdisjoint(("bits", "size")):
            values["ratio"] = DerivedRatio(values["ratio"])
        if not isinstance(layers, dict):
            raise CheckpointError(
                f"quantization_config.layers: found {type(layers).__name__}, expected a dictionary by module name"
            )
        try:
            specs = {name: LayerSpec.from_dict(name, spec) for name, spec in layers.items()}
            config = cls(**values, layers=specs)
        except CheckpointError:
            raise
        # A mistake in a recipe is a fault of the caller; in a checkpoint it is a fault of the checkpoint.
        except CompressionError as error:
            raise CheckpointError(f"quantization_config.{error}") from error
        unused = {}
        for key, value in kwargs.items():
            if hasattr(config, key):
                setattr(config, key, value)
            else:
                unused[key] = value
        return (config, unused) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what transformers prints and saves: all fields, those with default values too."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values. A ratio that nobody gave is left out, and so stays open."""
        left_out = {"layers"} | {name for name in ("bits", "size", "embeddings") if getattr(self, name) is None}
        is_recorded = bool(self.layers or self.provenance)
        if isinstance(self.ratio, DefaultRatio) or (isinstance(self.ratio, DerivedRatio) and not is_recorded):
            left_out.add("ratio")
        values = {}
        for config_field in dataclasses.fields(self):
            if config_field.name not in left_out:
                values[config_field.name] = copy.deepcopy(getattr(self, config_field.name))
        values["layers"] = {name: spec.to_dict() for name, spec in self.layers.items()}
        return values


def size_in_bytes(size: Any) -> int:
    """Return a size as a number of bytes. 1 MB is 1,000,000 bytes, and 1 MiB is 1,048,576.

    Args:
        size: a number of bytes, or a text such as "80MB", "1.5 GiB" or "80000000".

    Raises:
        CompressionError: if it is none of these, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", str(size).strip().upper())
    if match is None or isinstance(size, bool) or match[2] not in UNITS_OF_SIZE:
        found = 0
    else:
        found = int(Decimal(match[1]) * UNITS_OF_SIZE[match[2]])
    if found < 1:
        raise CompressionError(
            f"size: found {size!r}, expected the bytes of the weight files, such as 80000000, '80MB' or '1.5GiB'"
        )
    return found


def canonical_method_name(name: str) -> str:
    """Return the form in which methods are registered and recorded: lower case, with hyphens.

    "SVD_LLM" becomes "svd-llm".
    """
    return name.lower().replace("_", "-")
