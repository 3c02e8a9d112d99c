"""CompressionConfig: the recipe of a compression, and what each compressed layer stores."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import CheckpointError, CompressionError
from .packing import packed_width
from .quantization import BITS, packed_shape

QUANT_METHOD = "hf_lowrank"
FORMAT_VERSION = 1

SPARSE_LAYOUTS = ("none", "rows", "columns", "bitmask", "full")
KINDS = ("sparse_lowrank", "sparse_lowrank_binary")
LARGEST_GROUP = 2**31 - 1
"""Of values that share a scale, in rows that may be shorter; kernels count in 64 bits."""
OPTIONAL_FIELDS = frozenset(
    {"bias", "pivoted", "weight_bits", "weight_group", "lowrank_bits", "lowrank_group", "adapter_rank"}
)


@dataclass(frozen=True)
class LayerSpec:
    """What one compressed layer stores; enough, with the shape of the dense layer, to build its skeleton."""

    kind: str = field(default="sparse_lowrank", metadata={"help": f"one of {', '.join(KINDS)}"})
    sparse: str = field(
        default="none", metadata={"help": f"layout of the sparse part: one of {', '.join(SPARSE_LAYOUTS)}"}
    )
    kept: int = field(
        default=0, metadata={"help": "kept rows, kept columns, or kept values per row, according to the layout"}
    )
    rank: int = field(default=0, metadata={"help": "rank of the low-rank part"})
    binary_rank: int = field(default=0, metadata={"help": "rank of the magnitudes of the binary part"})
    bias: bool = field(default=False, metadata={"help": "whether the layer stores a bias"})
    pivoted: bool = field(
        default=False, metadata={"help": "whether the left factor is stored without its identity block"}
    )
    weight_bits: int = field(
        default=0, metadata={"help": "bits of a quantised value of the sparse part; 0: in the checkpoint's dtype"}
    )
    weight_group: int = field(default=0, metadata={"help": "quantised values of the sparse part that share a scale"})
    lowrank_bits: int = field(
        default=0, metadata={"help": "bits of a quantised value of both factors; 0: in the checkpoint's dtype"}
    )
    lowrank_group: int = field(default=0, metadata={"help": "quantised values of a factor that share a scale"})
    adapter_rank: int = field(
        default=0,
        metadata={
            "help": "how much of the rank merged adapters hold in plain factors of their own, over the whole layer"
        },
    )

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type ("float", or "uint8") of every tensor that the layer stores, by name."""
        rows, columns = self.lowrank_shape(out_features, in_features)
        values = {
            "none": (0,),
            "rows": (self.kept, in_features),
            "columns": (out_features, self.kept),
            "bitmask": (out_features, self.kept),
            "full": (out_features, in_features),
        }
        stored = _values("weight", values[self.sparse], self.weight_bits, self.weight_group)
        if self.sparse == "bitmask":
            stored["weight_mask"] = ((out_features, packed_width(in_features)), "uint8")
        if rank := self.factor_rank:
            stored |= _values("lowrank_a", (rank, columns), self.lowrank_bits, self.lowrank_group)
            free_rows = rows - rank if self.pivoted else rows
            stored |= _values("lowrank_b", (free_rows, rank), self.lowrank_bits, self.lowrank_group)
            if self.pivoted:
                stored["lowrank_pivots"] = ((packed_width(rows),), "uint8")
        if self.adapter_rank:
            stored["adapter_a"] = ((self.adapter_rank, in_features), "float")
            stored["adapter_b"] = ((out_features, self.adapter_rank), "float")
        if self.binary_rank:
            stored["sign_bits"] = ((out_features, packed_width(in_features)), "uint8")
            stored["scale_in"] = ((self.binary_rank, in_features), "float")
            stored["scale_out"] = ((out_features, self.binary_rank), "float")
        if self.bias:
            stored["bias"] = ((out_features,), "float")
        return stored

    @property
    def factor_rank(self) -> int:
        """Rank of the factors `lowrank_a` and `lowrank_b`: the rank without what merged adapters hold by themselves."""
        return self.rank - self.adapter_rank

    def lowrank_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns that the low-rank part covers: those that are not kept dense."""
        return (
            out_features - (self.kept if self.sparse == "rows" else 0),
            in_features - (self.kept if self.sparse == "columns" else 0),
        )

    def stored_bits(self, out_features: int, in_features: int, value_bits: int, accounting: str = "bits") -> int:
        """Bits that the layer takes in a checkpoint: masks, signs, scales, factors and bias all count.

        `accounting="paper"` leaves the mask out, as published ratios of sparse methods do (papers: Wanda, SparseGPT, SLaB).
        """
        total = 0
        for name, (shape, kind) in self.tensors(out_features, in_features).items():
            if name == "weight_mask" and accounting == "paper":
                continue
            total += torch.Size(shape).numel() * (8 if kind == "uint8" else value_bits)
        return total

    def validate(self, layer: str, out_features: int, in_features: int) -> None:
        """Check the spec against the dense layer that it replaces.

        Raises:
            CheckpointError: naming the layer, the field, what was found and what was expected.
        """
        limits = {
            "none": 0,
            "rows": out_features - 1,
            "columns": in_features - 1,
            "bitmask": in_features - 1,
            "full": 0,
        }
        if self.kind not in KINDS:
            raise _bad_field(layer, "kind", self.kind, f"one of {', '.join(KINDS)}")
        if self.sparse not in SPARSE_LAYOUTS:
            raise _bad_field(layer, "sparse", self.sparse, f"one of {', '.join(SPARSE_LAYOUTS)}")
        for name in ("bias", "pivoted"):
            if not isinstance(getattr(self, name), bool):
                raise _bad_field(layer, name, getattr(self, name), "true or false")
        smaller_side = min(out_features, in_features)
        for name, limit in (
            ("kept", limits[self.sparse]),
            ("adapter_rank", out_features + in_features),
            ("binary_rank", smaller_side),
        ):
            self._validate_count(layer, name, 0, limit, out_features, in_features)
        self._validate_count(
            layer, "rank", self.adapter_rank, self.adapter_rank + smaller_side, out_features, in_features
        )
        if (self.kind == "sparse_lowrank_binary") != (self.binary_rank > 0):
            raise _bad_field(
                layer,
                "binary_rank",
                self.binary_rank,
                f"{'at least 1' if self.kind.endswith('binary') else '0'} for {self.kind}",
            )
        covered = self.lowrank_shape(out_features, in_features)
        if self.pivoted and not 1 <= self.factor_rank <= min(covered):
            least, most = 1 + self.adapter_rank, min(covered) + self.adapter_rank
            raise _bad_field(
                layer,
                "rank",
                self.rank,
                f"{least} to {most} for a pivoted low-rank part of {covered[0]} × {covered[1]}",
            )
        self._validate_bits(layer, "weight", self.sparse != "none")
        self._validate_bits(layer, "lowrank", self.factor_rank > 0)
        if self.sparse == "full" and not self.weight_bits:
            raise _bad_field(
                layer,
                "weight_bits",
                self.weight_bits,
                "at least 2 for the full layout; an nn.Linear stores plain values",
            )

    def _validate_count(
        self, layer: str, name: str, least: int, most: int, out_features: int, in_features: int
    ) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            raise _bad_field(
                layer, name, value, f"an integer from {least} to {most} in a {out_features} × {in_features} layer"
            )

    def _validate_bits(self, layer: str, part: str, stored: bool) -> None:
        bits, group = getattr(self, f"{part}_bits"), getattr(self, f"{part}_group")
        allowed = (0, *BITS) if stored else (0,)
        if type(bits) is not int or bits not in allowed:
            expected = f"one of {', '.join(map(str, allowed))}" if stored else "0 without that part"
            raise _bad_field(layer, f"{part}_bits", bits, expected)
        if type(group) is not int or not (1 <= group <= LARGEST_GROUP if bits else group == 0):
            raise _bad_field(
                layer, f"{part}_group", group, f"1 to {LARGEST_GROUP}" if bits else f"0 without {part}_bits"
            )

    @classmethod
    def from_dict(cls, layer: str, values: Any) -> "LayerSpec":
        """Read a spec from a config; unknown and missing fields are errors that name the layer."""
        if not isinstance(values, dict):
            raise _bad_field(layer, "spec", values, "a dictionary of fields")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise _bad_field(
                    layer,
                    str(name),
                    values[name],
                    f"only the fields {', '.join(sorted(known))}; a newer hf_lowrank may know it",
                )
        for name in known - OPTIONAL_FIELDS:
            if name not in values:
                raise CheckpointError(
                    f"{layer}: the field {name!r} is missing in quantization_config.layers; the config is damaged, download it again"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain values, without those optional fields that say nothing; `from_dict` reads it."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value or name not in OPTIONAL_FIELDS - {"bias"}}


@dataclass
class CompressionConfig(QuantizationConfigMixin):
    """How a model is compressed, and, in a checkpoint, what every compressed layer stores.

    Register-and-forget: importing `hf_lowrank` makes `from_pretrained` understand checkpoints that carry it.
    Passed as `quantization_config=` with a dense model it compresses on load.

    Raises:
        CompressionError: if a field is out of its range.
    """

    method: str = field(default="slab", metadata={"help": "compression method; `hf-lowrank methods` lists all"})
    ratio: float = field(
        default=0.5,
        metadata={"help": "fraction of stored bits removed from the linear layers of the blocks, in (0, 1)"},
    )
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "settings of the method, by name; defaults are the paper's"}
    )
    calibration: str = field(
        default="self",
        metadata={
            "help": "calibration text: 'self' (sampled from the model), a dataset (wikitext2, c4), or a file of texts"
        },
    )
    samples: int = field(default=128, metadata={"help": "number of calibration sequences"})
    sequence_length: int | None = field(
        default=None, metadata={"help": "tokens per calibration sequence; default: the model's context, at most 2048"}
    )
    seed: int = field(default=0, metadata={"help": "seed of everything random: same seed, same bytes"})
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
    provenance: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "recorded by compress(): versions, base model, fingerprints"}
    )
    checksums: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "recorded when saving: sha256 of the files, compared by from_pretrained (weights) and `hf-lowrank verify`"
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
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < 1:
            raise CompressionError(
                f"ratio: found {self.ratio!r}, expected a number between 0 and 1, the fraction of stored bits to remove"
            )
        for name, least in (("samples", 1), ("sequence_length", 1), ("seed", 0), ("refinement_steps", 0)):
            value = getattr(self, name)
            if name == "sequence_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CompressionError(f"{name}: found {value!r}, expected a whole number of at least {least}")
        for name in ("method", "calibration"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or not value.isprintable():
                raise CompressionError(f"{name}: found {value!r}, expected a name")
        self.method = canonical_method_name(self.method)
        for name in ("options", "provenance", "checksums"):
            if not isinstance(getattr(self, name), dict):
                raise CompressionError(f"{name}: found {getattr(self, name)!r}, expected a dictionary")
        names = self.modules_to_not_convert
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CompressionError(
                f"modules_to_not_convert: found {names!r}, expected a list of layer names or patterns"
            )
        if not isinstance(self.experts, list) or not all(isinstance(name, str) for name in self.experts):
            raise CompressionError(f"experts: found {self.experts!r}, expected a list of module names")
        if not all(isinstance(text, str) for item in self.checksums.items() for text in item):
            raise CompressionError("checksums: expected sha256 sums in hexadecimal digits, by file name")
        if self.accounting not in ("bits", "paper"):
            raise CompressionError(f"accounting: found {self.accounting!r}, expected 'bits' or 'paper'")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a config from a checkpoint's `quantization_config`.

        Raises:
            CheckpointError: for an unknown field, a newer format, or a layer that cannot be.
        """
        values = copy.deepcopy(config_dict)
        version = values.get(
            "format_version", None if values.get("layers") else FORMAT_VERSION
        )  # a recipe that a user wrote has none
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: quantization_config.format_version: found {version!r}, expected 1 to {FORMAT_VERSION}; "
                "a newer checkpoint needs a newer hf_lowrank (pip install -U hf_lowrank)"
            )
        if values.pop("quant_method", QUANT_METHOD) != QUANT_METHOD:
            raise CheckpointError(
                f"quantization_config.quant_method: found {config_dict['quant_method']!r}, expected {QUANT_METHOD!r}"
            )
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for name in values:
            if name not in known:
                raise CheckpointError(
                    f"quantization_config.{name}: unknown field; a newer hf_lowrank may know it (pip install -U hf_lowrank)"
                )
        layers = values.pop("layers", {})
        if not isinstance(layers, dict):
            raise CheckpointError(
                f"quantization_config.layers: found {type(layers).__name__}, expected a dictionary by module name"
            )
        try:
            config = cls(**values, layers={name: LayerSpec.from_dict(name, spec) for name, spec in layers.items()})
        except CheckpointError:
            raise
        except CompressionError as error:
            raise CheckpointError(f"quantization_config.{error}") from error
        unused = {key: value for key, value in kwargs.items() if not hasattr(config, key)}
        for key in kwargs.keys() - unused.keys():
            setattr(config, key, kwargs[key])
        return (config, unused) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """What transformers prints and saves: all fields, so that a recipe can be read whole."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        values = {
            field.name: copy.deepcopy(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "layers"
        }
        return values | {"layers": {name: spec.to_dict() for name, spec in self.layers.items()}}


def canonical_method_name(name: str) -> str:
    """Return the form in which methods are registered and recorded: lower case, with hyphens ("SVD_LLM" becomes "svd-llm")."""
    return name.lower().replace("_", "-")


def _values(name: str, shape: tuple[int, ...], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """The tensors of a matrix of values: themselves, or packed codes and a scale per group."""
    if not bits:
        return {name: (shape, "float")}
    rows, columns = shape
    return {
        name: (packed_shape(rows, columns, bits), "uint8"),
        f"{name}_scale": ((rows, -(-columns // group)), "float"),
    }


def _bad_field(layer: str, name: str, found: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{layer}: {name} is {found!r}, expected {expected}; the config is damaged or was made for another model"
    )
