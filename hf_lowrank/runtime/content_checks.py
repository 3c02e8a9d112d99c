"""What the bits of a compressed layer must say, whatever its values: a kernel that trusts a mask must never read past the kept values."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .configuration import LayerSpec
from .errors import CheckpointError

SCALES = ("scale_in", "scale_out", "weight_scale", "lowrank_a_scale", "lowrank_b_scale")


def validate_contents(
    layer: str, spec: LayerSpec, out_features: int, in_features: int, tensors: Mapping[str, Tensor | None]
) -> None:
    """Check masks, pivots, padding bits and scales of one layer; tensors on the meta device are left out.

    Args:
        tensors: what the layer stores, by name, each of the shape that the spec says.

    Raises:
        CheckpointError: naming the tensor, what was found and what was expected.
    """
    rows, columns = spec.lowrank_shape(out_features, in_features)
    weight_columns = spec.kept if spec.sparse in ("columns", "bitmask") else in_features
    counts = {"weight_mask": spec.kept, "lowrank_pivots": spec.factor_rank}
    used_bits = {
        "weight_mask": in_features,
        "lowrank_pivots": rows,
        "sign_bits": in_features,
        "weight": weight_columns * spec.weight_bits,
        "lowrank_a": columns * spec.lowrank_bits,
        "lowrank_b": spec.factor_rank * spec.lowrank_bits,
    }
    for name, tensor in tensors.items():
        if tensor is None or tensor.device.type == "meta" or not tensor.numel():
            continue
        if name in counts:
            _check_counts(f"{layer}.{name}", tensor, counts[name])
        if name in used_bits and tensor.dtype == torch.uint8:
            _check_padding(f"{layer}.{name}", tensor.flatten(1) if tensor.dim() == 3 else tensor, used_bits[name])
        if name in SCALES:
            validate_finite(f"{layer}.{name}", tensor)


def validate_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a float tensor has an entry that is infinite or not a number."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    least, most = (float(bound) for bound in torch.aminmax(tensor.detach()))
    if not (abs(least) < float("inf") and abs(most) < float("inf")):  # false for NaN, which both bounds then are
        raise CheckpointError(
            f"{name}: has entries that are not finite (from {least} to {most}); the file is damaged, download it again"
        )


def _check_counts(name: str, bitmap: Tensor, expected: int) -> None:
    """As many set bits in every row as the layer has values for."""
    counts = _set_bits(bitmap).sum(dim=-1, dtype=torch.int64).flatten()
    wrong = counts != expected
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        where = f" in row {row}" if bitmap.dim() > 1 else ""
        raise CheckpointError(
            f"{name}: has {int(counts[row])} bits set{where}, expected {expected}; the file is damaged, download it again"
        )


def _check_padding(name: str, packed: Tensor, used: int) -> None:
    """Zeros after the last bit that stands for something."""
    spare = packed[..., -1] >> (used % 8 or 8) if used % 8 else torch.zeros((), dtype=torch.uint8)
    if bool(spare.any()):
        raise CheckpointError(
            f"{name}: has padding bits set after bit {used} of a row, expected zeros; the file is damaged, download it again"
        )


def _set_bits(packed: Tensor) -> Tensor:
    """How many bits are set in each byte: pairs, then nibbles, then bytes are added within themselves."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F
