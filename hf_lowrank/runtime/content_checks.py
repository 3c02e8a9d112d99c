"""Checks the contents of a compressed layer's tensors after loading.

A kernel trusts the masks: with too many bits set it would read past the kept values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import CheckpointError
from .layer_spec import LayerSpec

SCALES = ("scale_in", "scale_out", "weight_scale", "lowrank_a_scale", "lowrank_b_scale")


def check_contents(
    layer: str, spec: LayerSpec, out_features: int, in_features: int, tensors: Mapping[str, Tensor | None]
) -> None:
    """Check masks, pivots, padding bits and scales of one layer. Tensors on the meta device are passed over.

    Args:
        tensors: what the layer stores, by name. Every tensor has the shape that the spec says.

    Raises:
        CheckpointError: naming the tensor, what was found and what was expected.
    """
    rows, columns = spec.lowrank_shape(out_features, in_features)
    # Values per row of the stored weight, before they are packed.
    weight_columns = spec.kept if spec.sparse in ("columns", "bitmask") else in_features
    counts = {"weight_mask": spec.kept, "lowrank_pivots": spec.factor_rank}
    # Number of bits in a row that stand for something; the rest of its last byte is padding.
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
            is_packed_codes = tensor.dim() == 3
            _check_padding(f"{layer}.{name}", tensor.flatten(1) if is_packed_codes else tensor, used_bits[name])
        if name in SCALES:
            check_finite_values(f"{layer}.{name}", tensor)


def check_finite_values(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a float tensor has an entry that is infinite or not a number."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    least, most = map(float, torch.aminmax(tensor.detach()))
    # Both bounds are NaN where an entry is, and no comparison with NaN is true.
    if not (abs(least) < float("inf") and abs(most) < float("inf")):
        raise CheckpointError(
            f"{name}: has entries that are not finite (from {least} to {most}); the file is damaged, download it again"
        )


def _check_counts(name: str, bitmap: Tensor, expected: int) -> None:
    """Raise CheckpointError if a row of a bitmap has not the expected number of bits set."""
    counts = _set_bits(bitmap).sum(dim=-1, dtype=torch.int64).flatten()
    wrong = counts != expected
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        where = f" in row {row}" if bitmap.dim() > 1 else ""
        raise CheckpointError(
            f"{name}: has {int(counts[row])} bits set{where}, expected {expected}; the file is damaged, "
            "download it again"
        )


def _check_padding(name: str, packed: Tensor, used: int) -> None:
    """Raise CheckpointError if a bit of a row is set after its first `used` bits."""
    spare_bits = used % 8
    if spare_bits and bool((packed[..., -1] >> spare_bits).any()):
        raise CheckpointError(
            f"{name}: has padding bits set after bit {used} of a row, expected zeros; the file is damaged, "
            "download it again"
        )


def _set_bits(packed: Tensor) -> Tensor:
    """Return how many bits are set in each byte. Pairs, then nibbles, then whole bytes add up their own bits."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F
