"""CompressedLinear holds the tensors of a compressed layer. Its subclasses in `layers` compute with them.

`weight` holds the packed values of the sparse part. Its shape differs from that of the dense weight on purpose: a load
without this plugin then fails, instead of filling the layer with noise.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import CompressionError
from .layer_spec import LayerSpec
from .packing import pack_bits, signs_to_values, unpack_bits, unpack_values
from .pivoting import unpivot
from .quantization import Quantized, unpack_codes

VALUES = ("weight", "lowrank_a", "lowrank_b")
"""Tensors that may be quantized. They are then buffers of packed codes, beside a parameter `<name>_scale`."""
FLOATS = ("adapter_a", "adapter_b", "scale_in", "scale_out", "bias")
BITMAPS = ("weight_mask", "lowrank_pivots", "sign_bits")
MADE_FROM_WEIGHT = ("weight_orig", "weight_g", "weight_v")
"""Names under which `torch.nn.utils` keeps a weight that it changes in every pass."""
SHOWN_FIELDS = (
    "rank",
    "pivoted",
    "binary_rank",
    "weight_bits",
    "weight_group",
    "lowrank_bits",
    "lowrank_group",
    "adapter_rank",
)
"""Fields of the spec that `repr` shows where they are not zero."""


class CompressedLinear(nn.Linear):
    """Stands in for an `nn.Linear` of the same shape. Its `LayerSpec` says what it stores.

    Only float tensors are parameters. Masks, signs and quantized values are buffers, so that training cannot lose the
    sparsity.

    Args:
        in_features, out_features: n and m of the dense layer.
        spec: what the layer stores.
        device, dtype: as for `nn.Linear`.

    Raises:
        CheckpointError: if the spec does not fit the shape.
    """

    replaces_conv1d = False
    """Whether the dense layer is a transformers `Conv1D`, which `dequantize` then puts back."""

    # For type checkers. All are registered by `__init__`, some as None.
    lowrank_a: Tensor
    lowrank_b: Tensor
    adapter_a: Tensor
    adapter_b: Tensor
    scale_in: Tensor
    scale_out: Tensor
    weight_mask: Tensor
    lowrank_pivots: Tensor
    sign_bits: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # `nn.Linear.__init__` would allocate the dense weight
        spec.validate(type(self).__name__, out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.spec = spec
        # All names are registered, with None for what is not stored, and always in the same order: `reset_parameters`
        # draws the values of one parameter after the other.
        stored = spec.tensors(out_features, in_features)
        for name in VALUES:
            self._register(name, stored.get(name, (None, "float")), device, dtype)
        for name in VALUES:
            self._register(f"{name}_scale", stored.get(f"{name}_scale", (None, "float")), device, dtype)
        for name in FLOATS:
            self._register(name, stored.get(name, (None, "float")), device, dtype)
        for name in BITMAPS:
            self._register(name, stored.get(name, (None, "uint8")), device, dtype)
        self.reset_parameters()

    def _register(
        self, name: str, tensor: tuple[tuple[int, ...] | None, str], device: Any, dtype: torch.dtype | None
    ) -> None:
        """Register an empty tensor of a shape and a type ("float" or "uint8"), or None where the shape is None."""
        shape, kind = tensor
        # An empty weight stands for no sparse part. DDP would stop at a parameter that never gets a gradient.
        is_parameter = kind == "float" and shape != (0,)
        empty = None
        if shape is not None:
            empty = torch.empty(shape, device=device, dtype=dtype if kind == "float" else torch.uint8)
        if is_parameter:
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        elif empty is None:
            setattr(self, name, None)  # and no buffer: torch.export counts one that is None, and then misses another
        else:
            self.register_buffer(name, empty)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter.

        Raises:
            CompressionError: if `torch.nn.utils.prune` or its old norms are to work on `weight`. The mask of a pruning
                would take the place of `weight_mask`, which says where the kept values belong.
        """
        if name in MADE_FROM_WEIGHT:
            raise _no_dense_weight()
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute.

        Raises:
            CompressionError: if a parametrization of `torch.nn.utils` is to take the place of `weight`. It would make
                the packed values orthogonal, or of norm 1, which says nothing of the matrix that the layer stands for.
        """
        caller = sys._getframe(1).f_globals.get("__name__")
        if name == "weight" and caller == parametrize.__name__:
            raise _no_dense_weight()
        super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take the layer's tensors from a state dict.

        Raises:
            CompressionError: if packed bits come as numbers of another type, as after an average over all tensors. To
                copy them would round them to other masks, signs and codes, without a word.
        """
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and isinstance(given, Tensor) and given.dtype != buffer.dtype == torch.uint8:
                raise CompressionError(
                    f"{prefix}{name}: packed bits as {given.dtype}, expected {buffer.dtype}; "
                    "average or scale only what is_floating_point(), and take the other tensors as they are"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def restore_bytes(self) -> None:
        """Make packed bits bytes again that transformers has loaded as floats.

        Its oldest versions 5.x cast all tensors of a module that is to stay in float32 in every model (T5). No float
        type rounds a byte.
        """
        stored = self.spec.tensors(self.out_features, self.in_features)
        for name, (_, kind) in stored.items():
            if kind == "uint8" and getattr(self, name).dtype != torch.uint8:
                setattr(self, name, getattr(self, name).to(torch.uint8))

    def reset_parameters(self) -> None:
        """Make the layer a valid random one.

        Float tensors are drawn as those of an `nn.Linear` of n inputs are. The first k columns are kept, the first r
        rows are pivots, all signs are −1, and all codes are 0.
        """
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        for name in VALUES:
            bits, _ = self._quantization(name)
            if bits and getattr(self, name) is not None:
                getattr(self, name).zero_()
                # The outermost level is about 2ᵇ⁻¹ scales from zero: this brings the values into the bounds above.
                getattr(self, f"{name}_scale").data /= 2 ** (bits - 1)
        rows, _ = self.spec.lowrank_shape(self.out_features, self.in_features)
        self._set_first_bits(self.weight_mask, self.spec.kept, self.in_features)
        self._set_first_bits(self.lowrank_pivots, self.spec.factor_rank, rows)
        if self.sign_bits is not None:
            self.sign_bits.zero_()

    @staticmethod
    def _set_first_bits(bitmap: Tensor | None, count: int, length: int) -> None:
        """Set the first `count` of the `length` bits in every row of a bitmap, and clear the others."""
        # On the meta device there are no values to set.
        if bitmap is not None and bitmap.device.type != "meta":
            bitmap.copy_(pack_bits(torch.arange(length, device=bitmap.device) < count))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the float tensors. `weight` itself may hold packed codes."""
        return next(self.parameters(recurse=False), self.weight).dtype

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the (m, n) matrix that the layer multiplies by.

        The parts are summed in float64 and rounded once.

        Args:
            dtype: data type of the result, by default the layer's own.
        """
        dense = self._sparse_lowrank_dense()
        if self.spec.adapter_rank:
            dense = dense + self.adapter_b.detach().double() @ self.adapter_a.detach().double()
        if self.spec.binary_rank:
            signs = signs_to_values(self.sign_bits, self.in_features, torch.float64)
            # The largest intermediate results are matrices (m, n) in float64, so they are made in place.
            dense += signs.mul_(self.scale_out.detach().double() @ self.scale_in.detach().double())
        return dense.to(dtype or self.dtype)

    def _sparse_lowrank_dense(self) -> Tensor:
        """Return the sum of the sparse and the low-rank part, (m, n) in float64."""
        m, n, spec = self.out_features, self.in_features, self.spec
        dense = torch.zeros(m, n, dtype=torch.float64, device=self.weight.device)
        if spec.sparse == "bitmask":
            dense = unpack_values(self._values("weight", spec.kept), unpack_bits(self.weight_mask, n))
        elif spec.sparse == "full":
            dense = self._values("weight", n)
        elif spec.sparse == "rows":
            dense[: spec.kept] = self._values("weight", n)
        elif spec.sparse == "columns":
            dense[:, : spec.kept] = self._values("weight", spec.kept)
        if spec.factor_rank:
            rows, columns = spec.lowrank_shape(m, n)
            a, b = self._values("lowrank_a", columns), self._values("lowrank_b", spec.factor_rank)
            if spec.pivoted:
                b = unpivot(b, unpack_bits(self.lowrank_pivots, rows))
            dense[m - rows :, n - columns :].addmm_(b, a)  # kept rows come first, and so do kept columns
        return dense

    def _values(self, name: str, columns: int) -> Tensor:
        """Return a matrix of values, dequantized if it is quantized, in float64."""
        values: Tensor = getattr(self, name)
        bits, group = self._quantization(name)
        if not bits:
            return values.detach().double()
        scale = getattr(self, f"{name}_scale").detach().double()
        return Quantized(unpack_codes(values, bits, columns), scale, bits, group).dequantize()

    def _quantization(self, name: str) -> tuple[int, int]:
        """Return bits and group of a matrix of values, 0 and 0 if it is not quantized."""
        spec = self.spec
        return (spec.weight_bits, spec.weight_group) if name == "weight" else (spec.lowrank_bits, spec.lowrank_group)

    def _stored(self, *names: str) -> list[Tensor]:
        """Return the tensors of these names, without the search that `nn.Module` makes for an attribute.

        By measurement that search takes 4 µs per name where the caches have forgotten what it reads.
        """
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return [
            parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(self, name)
            for name in names
        ]

    def stored_bits(self, accounting: str = "bits") -> int:
        """Return the number of bits that the layer takes in a checkpoint of its dtype, see `LayerSpec.stored_bits`."""
        return self.spec.stored_bits(self.out_features, self.in_features, self.dtype.itemsize * 8, accounting)

    def extra_repr(self) -> str:
        spec = self.spec
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}"]
        if spec.sparse == "full":
            parts.append("sparse=full")
        elif spec.sparse != "none":
            total = {
                "rows": f"{self.out_features} rows",
                "columns": f"{self.in_features} columns",
                "bitmask": f"{self.in_features} per row",
            }
            parts.append(f"sparse={spec.sparse}({spec.kept} of {total[spec.sparse]})")
        parts += [f"{name}={getattr(spec, name)}" for name in SHOWN_FIELDS if getattr(spec, name)]
        bits = self.stored_bits() / max(self.in_features * self.out_features, 1)
        return ", ".join([*parts, f"bias={spec.bias}", f"bits_per_weight={bits:.2f}"])


def _no_dense_weight() -> CompressionError:
    return CompressionError(
        "weight: torch.nn.utils works on the dense weight of a layer, which a compressed layer does not have; "
        "make the model dense first (model.dequantize()), or name only dense layers"
    )


def has_compressed_layers(module: nn.Module) -> bool:
    """Return whether a model, or a part of one, holds compressed layers."""
    return any(isinstance(part, CompressedLinear) for part in module.modules())
