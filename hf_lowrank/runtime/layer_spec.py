"""LayerSpec says what a compressed layer stores: the shapes and types of its tensors, its bits, and its limits."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import CheckpointError, quoted
from .packing import packed_width
from .quantization import BITS, packed_shape

SPARSE_LAYOUTS = ("none", "rows", "columns", "bitmask", "full")
KINDS = ("sparse_lowrank", "sparse_lowrank_binary")
LARGEST_GROUP = 2**31 - 1
"""Maximum number of values that share a scale. A group may be larger than a row, and kernels count in 64 bits."""
OPTIONAL_FIELDS = frozenset(
    {"bias", "pivoted", "weight_bits", "weight_group", "lowrank_bits", "lowrank_group", "adapter_rank"}
)
"""Fields that a config may leave out. They then have their defaults."""


@dataclass(frozen=True)
class LayerSpec:
    """Says what one compressed layer stores.

    With the shape of the dense layer, it is enough to build an empty compressed one.
    """

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
        default=0, metadata={"help": "bits of a quantized value of the sparse part; 0: in the checkpoint's dtype"}
    )
    weight_group: int = field(default=0, metadata={"help": "quantized values of the sparse part that share a scale"})
    lowrank_bits: int = field(
        default=0, metadata={"help": "bits of a quantized value of both factors; 0: in the checkpoint's dtype"}
    )
    lowrank_group: int = field(default=0, metadata={"help": "quantized values of a factor that share a scale"})
    adapter_rank: int = field(
        default=0,
        metadata={
            "help": "how much of the rank merged adapters hold in plain factors of their own, over the whole layer"
        },
    )

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and type ("float" or "uint8") of every tensor that the layer stores, by name."""
        rows, columns = self.lowrank_shape(out_features, in_features)
        # m, n, p and k of the format: `out_features`, `in_features`, kept rows or columns, and kept values per row.
        weight_shapes = {
            "none": (0,),
            "rows": (self.kept, in_features),
            "columns": (out_features, self.kept),
            "bitmask": (out_features, self.kept),
            "full": (out_features, in_features),
        }
        stored = _value_tensors("weight", weight_shapes[self.sparse], self.weight_bits, self.weight_group)
        if self.sparse == "bitmask":
            stored["weight_mask"] = ((out_features, packed_width(in_features)), "uint8")
        if rank := self.factor_rank:
            stored |= _value_tensors("lowrank_a", (rank, columns), self.lowrank_bits, self.lowrank_group)
            # The identity block of a pivoted factor takes no space.
            free_rows = rows - rank if self.pivoted else rows
            stored |= _value_tensors("lowrank_b", (free_rows, rank), self.lowrank_bits, self.lowrank_group)
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
        """Rank of the factors `lowrank_a` and `lowrank_b`: the rank less what merged adapters hold by themselves."""
        return self.rank - self.adapter_rank

    def lowrank_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Return how many rows and columns the low-rank part covers: those that are not kept dense."""
        kept_rows = self.kept if self.sparse == "rows" else 0
        kept_columns = self.kept if self.sparse == "columns" else 0
        return out_features - kept_rows, in_features - kept_columns

    def stored_bits(self, out_features: int, in_features: int, value_bits: int, accounting: str = "bits") -> int:
        """Return the number of bits that the layer takes in a checkpoint.

        Masks, signs, scales, factors and the bias all count.

        Args:
            value_bits: bits of a float value.
            accounting: "paper" leaves the mask out, as the published ratios of sparse methods do (Wanda, arXiv
                2306.11695; SparseGPT, arXiv 2301.00774; SLaB, arXiv 2604.04493).
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
        if self.kind not in KINDS:
            raise _bad_field(layer, "kind", self.kind, f"one of {', '.join(KINDS)}")
        if self.sparse not in SPARSE_LAYOUTS:
            raise _bad_field(layer, "sparse", self.sparse, f"one of {', '.join(SPARSE_LAYOUTS)}")
        for name in ("bias", "pivoted"):
            if not isinstance(getattr(self, name), bool):
                raise _bad_field(layer, name, getattr(self, name), "true or false")
        self._check_counts(layer, out_features, in_features)
        if self.kind == "sparse_lowrank_binary" and not self.binary_rank:
            raise _bad_field(layer, "binary_rank", self.binary_rank, f"at least 1 for {self.kind}")
        if self.kind != "sparse_lowrank_binary" and self.binary_rank:
            raise _bad_field(layer, "binary_rank", self.binary_rank, f"0 for {self.kind}")
        rows, columns = self.lowrank_shape(out_features, in_features)
        if self.pivoted and not 1 <= self.factor_rank <= min(rows, columns):
            least, most = 1 + self.adapter_rank, min(rows, columns) + self.adapter_rank
            expected = f"{least} to {most} for a pivoted low-rank part of {rows} × {columns}"
            raise _bad_field(layer, "rank", self.rank, expected)
        self._check_quantization(layer, "weight", has_part=self.sparse != "none")
        self._check_quantization(layer, "lowrank", has_part=self.factor_rank > 0)
        if self.sparse == "full" and not self.weight_bits:
            expected = "at least 2 for the full layout; an nn.Linear stores plain values"
            raise _bad_field(layer, "weight_bits", self.weight_bits, expected)

    def _check_counts(self, layer: str, out_features: int, in_features: int) -> None:
        """Raise CheckpointError if a rank or the number of kept rows, columns or values does not fit the layer."""
        # A layer that keeps all of its rows, columns or values is a dense one.
        most_kept = {
            "none": 0,
            "rows": out_features - 1,
            "columns": in_features - 1,
            "bitmask": in_features - 1,
            "full": 0,
        }
        smaller_side = min(out_features, in_features)

        def check(name: str, least: int, most: int) -> None:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                expected = f"an integer from {least} to {most} in a {out_features} × {in_features} layer"
                raise _bad_field(layer, name, value, expected)

        check("kept", 0, most_kept[self.sparse])
        check("adapter_rank", 0, out_features + in_features)
        check("binary_rank", 0, smaller_side)
        # Factors of merged adapters come on top of the rank that a matrix of this shape can have.
        check("rank", self.adapter_rank, self.adapter_rank + smaller_side)

    def _check_quantization(self, layer: str, part: str, has_part: bool) -> None:
        """Raise CheckpointError if bits and group of a part are not possible, or are given without that part."""
        bits, group = getattr(self, f"{part}_bits"), getattr(self, f"{part}_group")
        allowed: tuple[int, ...] = (0,)
        expected = "0 without that part"
        if has_part:
            allowed = (0, *BITS)
            expected = f"one of {', '.join(map(str, allowed))}"
        if type(bits) is not int or bits not in allowed:
            raise _bad_field(layer, f"{part}_bits", bits, expected)
        if bits and (type(group) is not int or not 1 <= group <= LARGEST_GROUP):
            raise _bad_field(layer, f"{part}_group", group, f"1 to {LARGEST_GROUP}")
        if not bits and (type(group) is not int or group != 0):
            raise _bad_field(layer, f"{part}_group", group, f"0 without {part}_bits")

    @classmethod
    def from_dict(cls, layer: str, values: Any) -> "LayerSpec":
        """Read a spec from a config.

        Raises:
            CheckpointError: for an unknown or a missing field, naming the layer.
        """
        if not isinstance(values, dict):
            raise _bad_field(layer, "spec", values, "a dictionary of fields")
        field_names = {spec_field.name for spec_field in dataclasses.fields(cls)}
        for name in values:
            if name not in field_names:
                expected = f"only the fields {', '.join(sorted(field_names))}; a newer hf_lowrank may know it"
                raise _bad_field(layer, str(name), values[name], expected)
        # `cls(**values)` would give missing fields their defaults, and the damage would show much later.
        for name in field_names - OPTIONAL_FIELDS:
            if name not in values:
                raise CheckpointError(
                    f"{layer}: the field {name!r} is missing in quantization_config.layers; the config is damaged, "
                    "download it again"
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain values, without those optional fields that have their default (`bias` aside)."""
        values = {}
        for name, value in dataclasses.asdict(self).items():
            if value or name == "bias" or name not in OPTIONAL_FIELDS:
                values[name] = value
        return values


def _value_tensors(name: str, shape: tuple[int, ...], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the tensors of a matrix of values: itself, or if it is quantized its packed codes and scales."""
    if not bits:
        return {name: (shape, "float")}
    rows, columns = shape
    return {
        name: (packed_shape(rows, columns, bits), "uint8"),
        f"{name}_scale": ((rows, -(-columns // group)), "float"),
    }


def _bad_field(layer: str, name: str, value: Any, expected: str) -> CheckpointError:
    """Return the error for a field of a spec that has a wrong value."""
    return CheckpointError(
        f"{layer}: {name} is {quoted(value)}, expected {expected}; the config is damaged or was made for another model"
    )
