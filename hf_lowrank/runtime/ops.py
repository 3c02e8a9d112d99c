"""Each operation of a compressed layer, declared once; plain torch is its meaning.

A faster back end registers itself with `register_kernel` for an operation and a device type; it only ever claims to be
faster, the functions in this file stay the oracle. A matrix is unpacked a tile of rows at a time and never saved for the
backward pass.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import functional as F

from .packing import signs_to_values, unpack_bits, unpack_values
from .pivoting import row_sources

NAMESPACE = "hf_lowrank"
TILE_ELEMENTS = 1 << 24
"""Largest number of matrix entries unpacked at once (64 MiB in float32)."""

Kernel = Callable[..., Tensor | None]
_kernels: dict[tuple[str, str], list[tuple[str, Kernel]]] = {}
_direct: dict[str, Kernel] = {}
_first_use: list[Callable[[], None]] = []


def register_kernel(operation: str, device_type: str, name: str, kernel: Kernel) -> None:
    """Offer `kernel` for an operation on a device type; the one registered last is asked first.

    A kernel takes the operation's arguments and returns its result, or None where it does not apply (dtype, CPU
    features, number of tokens); the next one is asked then, plain torch last.
    """
    offered = _kernels.setdefault((operation, device_type), [])
    offered[:] = [entry for entry in offered if entry[0] != name] + [(name, kernel)]


def register_direct(operation: str, kernel: Kernel) -> None:
    """Have `kernel` asked before all others where neither gradients nor a graph are recorded.

    It takes any arguments of the operation and looks itself at their devices, layouts in memory, and autocast.
    """
    _direct[operation] = kernel


def unregister_kernels() -> None:
    """Withdraw every kernel: plain torch computes from here on."""
    _first_use.clear()
    _kernels.clear()
    _direct.clear()


def on_first_use(load: Callable[[], None]) -> None:
    """Call `load`, which registers kernels, when an operation is first computed."""
    _first_use.append(load)


def registered_kernels(operation: str, device_type: str) -> list[str]:
    """Names of the back ends for an operation on a device type, in the order in which they are asked."""
    return [name for name, _ in reversed(_kernels.get((operation, device_type), []))]


def dispatch(operation: str, plain: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """The result of the first kernel that takes these arguments, else of the plain function."""
    result = _by_kernel(operation, x, *arguments)
    return plain(x, *arguments) if result is None else result


def _by_kernel(operation: str, x: Tensor, *arguments: Any) -> Tensor | None:
    for load in list(_first_use):
        _first_use.clear()
        load()
    for _, kernel in reversed(_kernels.get((operation, x.device.type), ())):
        result = kernel(x, *arguments)
        if result is not None:
            return result
    return None


def autocast(x: Tensor) -> Tensor:
    """What autocast does to the input of `nn.Linear` (float64 excepted), which it cannot do for operations it does not know."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def operation(name: str) -> Callable[..., Tensor]:
    """The declared operation; where nothing is recorded, neither a graph nor gradients, a kernel is called without its ceremony.

    The direct kernel comes first of all, autocast after it: a product takes a few hundred microseconds and reads more than the caches hold,
    so that a check, an attribute or a frame of Python that was needed for the last one costs one to ten of them to be read again.
    """
    declared = getattr(getattr(torch.ops, NAMESPACE), name)

    def compute(x: Tensor, *arguments: Any) -> Tensor:
        recorded = is_dynamo_compiling() or is_grad_enabled()
        if not recorded and name in _direct:
            result = _direct[name](x, *arguments)
            if result is not None:
                return result
        x = autocast(x)
        if not recorded and not is_compiling() and type(x) is Tensor:
            result = _by_kernel(name, x, *arguments)
            if result is not None:
                return result
        result = declared(x, *arguments)
        return cast(Tensor, result)

    compute.__name__ = name
    return compute


# --- the meaning of every operation -------------------------------------------------------------------------------


def plain_bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor:
    """S x for the sparse S (m, n) with kept values `weight` (m, k) and bitmap `weight_mask` (m, ⌈n/8⌉); x (..., n)."""
    compute = compute_dtype(x)
    y = [
        F.linear(x.to(compute), _sparse_rows(weight, weight_mask, rows, x.shape[-1], compute))
        for rows in row_tiles(weight_mask, x)
    ]
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
    """Σ_b scale_out_b ⊙ (±1 · (scale_in_b ⊙ x)); `sign_bits` (m, ⌈n/8⌉), `scale_in` (b, n), `scale_out` (m, b); x (..., n)."""
    compute = compute_dtype(x)
    y = [
        F.linear(x.to(compute), _binary_rows(sign_bits, scale_in, scale_out, rows, compute))
        for rows in row_tiles(sign_bits, x)
    ]
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_bitmask_binary_linear(
    x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor:
    """The sum of `bitmask_linear` and `binary_linear`, rounded once; the product of a SLaB layer."""
    compute = compute_dtype(x)
    y = []
    for rows in row_tiles(sign_bits, x):
        tile = _sparse_rows(weight, weight_mask, rows, x.shape[-1], compute)
        y.append(F.linear(x.to(compute), tile + _binary_rows(sign_bits, scale_in, scale_out, rows, compute)))
    return torch.cat(y, dim=-1).to(x.dtype)


def plain_lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor:
    """B (A x) for A (r, n) and B (m, r); x (..., n)."""
    return F.linear(F.linear(x, lowrank_a.to(x.dtype)), lowrank_b.to(x.dtype))


def plain_pivoted_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int) -> Tensor:
    """P [I; B'] (A' x) for A' (r, n), B' (m − r, r) and the bitmap of the pivots, (⌈m/8⌉,); x (..., n), `rows` = m."""
    z = F.linear(x, lowrank_a.to(x.dtype))
    y = torch.cat([z, F.linear(z, lowrank_b.to(x.dtype))], dim=-1)
    return y.index_select(-1, row_sources(lowrank_pivots, rows, lowrank_a.shape[0]))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The input's dtype; float32 for half precision on a CPU, where it is the exact and usually the faster product."""
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


def row_tiles(packed: Tensor, x: Tensor) -> Iterator[slice]:
    """The rows of a packed matrix in tiles of at most `TILE_ELEMENTS` entries, as many columns as x (..., n) has."""
    rows, columns = packed.shape[0], max(x.shape[-1], 1)
    step = max(TILE_ELEMENTS // columns, 1)
    yield from (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


def _sparse_rows(weight: Tensor, weight_mask: Tensor, rows: slice, columns: int, dtype: torch.dtype) -> Tensor:
    return unpack_values(weight[rows], unpack_bits(weight_mask[rows], columns)).to(dtype)


def _binary_rows(sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    magnitudes = scale_out[rows].to(dtype) @ scale_in.to(dtype)
    return magnitudes * signs_to_values(sign_bits[rows], scale_in.shape[1], dtype)


# --- gradients: the matrix is unpacked again, tile by tile --------------------------------------------------------


def plain_bitmask_input_grad(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor:
    """Sᵀ g for g (..., m): the gradient of `bitmask_linear` in x."""
    return sum_over_tiles(
        grad, weight_mask, columns, lambda rows, dtype: _sparse_rows(weight, weight_mask, rows, columns, dtype)
    )


def plain_bitmask_weight_grad(grad: Tensor, x: Tensor, weight_mask: Tensor, kept: int) -> Tensor:
    """The entries of g xᵀ where the mask is set, (m, k): the gradient of `bitmask_linear` in its kept values."""
    compute = torch.promote_types(x.dtype, torch.float32)
    g, inputs = as_matrix(grad).to(compute), as_matrix(x).to(compute)
    kept_grad = [
        (g[:, rows].T @ inputs)[unpack_bits(weight_mask[rows], x.shape[-1])].view(-1, kept)
        for rows in row_tiles(weight_mask, x)
    ]
    return torch.cat(kept_grad)


def plain_binary_input_grad(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
    """The gradient of `binary_linear` in x."""
    return sum_over_tiles(
        grad,
        sign_bits,
        scale_in.shape[1],
        lambda rows, dtype: _binary_rows(sign_bits, scale_in, scale_out, rows, dtype),
    )


def plain_bitmask_binary_input_grad(
    grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> Tensor:
    """The gradient of `bitmask_binary_linear` in x."""
    columns = scale_in.shape[1]

    def rows_of(rows: slice, dtype: torch.dtype) -> Tensor:
        return _sparse_rows(weight, weight_mask, rows, columns, dtype) + _binary_rows(
            sign_bits, scale_in, scale_out, rows, dtype
        )

    return sum_over_tiles(grad, sign_bits, columns, rows_of)


def plain_binary_scale_grads(
    grad: Tensor, x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `binary_linear` in `scale_in` (b, n) and `scale_out` (m, b)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    g, inputs = as_matrix(grad).to(compute), as_matrix(x).to(compute)
    in_grad = torch.zeros(scale_in.shape, dtype=compute, device=x.device)
    out_grad = []
    for rows in row_tiles(sign_bits, x):
        signed = (g[:, rows].T @ inputs) * signs_to_values(sign_bits[rows], x.shape[-1], compute)
        in_grad += scale_out[rows].to(compute).T @ signed
        out_grad.append(signed @ scale_in.to(compute).T)
    return in_grad, torch.cat(out_grad)


def as_matrix(x: Tensor) -> Tensor:
    """x (..., n) as (tokens, n); a single vector is one token."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def sum_over_tiles(
    grad: Tensor, packed: Tensor, columns: int, rows_of: Callable[[slice, torch.dtype], Tensor]
) -> Tensor:
    """Mᵀ g, (..., n), for g (..., m) and the matrix M whose rows `rows_of` unpacks, a tile at a time."""
    compute = compute_dtype(grad)
    total = torch.zeros(*grad.shape[:-1], columns, dtype=compute, device=grad.device)
    for rows in row_tiles(packed, total):
        total += grad[..., rows].to(compute) @ rows_of(rows, compute)
    return total.to(grad.dtype)


# --- the declarations ---------------------------------------------------------------------------------------------


def outputs(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _declare() -> None:
    """Declare the operations with torch.library: implementation, fake (for torch.compile) and gradient."""

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_input_grad", mutates_args=())
    def bitmask_input_grad(grad: Tensor, weight: Tensor, weight_mask: Tensor, columns: int) -> Tensor:
        return dispatch("bitmask_input_grad", plain_bitmask_input_grad, grad, weight, weight_mask, columns)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_weight_grad", mutates_args=())
    def bitmask_weight_grad(grad: Tensor, x: Tensor, weight_mask: Tensor, kept: int) -> Tensor:
        return plain_bitmask_weight_grad(grad, x, weight_mask, kept)

    @torch.library.custom_op(f"{NAMESPACE}::binary_input_grad", mutates_args=())
    def binary_input_grad(grad: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        return dispatch("binary_input_grad", plain_binary_input_grad, grad, sign_bits, scale_in, scale_out)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_binary_input_grad", mutates_args=())
    def bitmask_binary_input_grad(
        grad: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> Tensor:
        parts = (weight, weight_mask, sign_bits, scale_in, scale_out)
        return dispatch("bitmask_binary_input_grad", plain_bitmask_binary_input_grad, grad, *parts)

    @torch.library.custom_op(f"{NAMESPACE}::binary_scale_grads", mutates_args=())
    def binary_scale_grads(
        grad: Tensor, x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        return plain_binary_scale_grads(grad, x, sign_bits, scale_in, scale_out)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_linear", mutates_args=())
    def bitmask_linear(x: Tensor, weight: Tensor, weight_mask: Tensor) -> Tensor:
        return dispatch("bitmask_linear", plain_bitmask_linear, x, weight, weight_mask)

    @torch.library.custom_op(f"{NAMESPACE}::binary_linear", mutates_args=())
    def binary_linear(x: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        return dispatch("binary_linear", plain_binary_linear, x, sign_bits, scale_in, scale_out)

    @torch.library.custom_op(f"{NAMESPACE}::bitmask_binary_linear", mutates_args=())
    def bitmask_binary_linear(
        x: Tensor, weight: Tensor, weight_mask: Tensor, sign_bits: Tensor, scale_in: Tensor, scale_out: Tensor
    ) -> Tensor:
        return dispatch(
            "bitmask_binary_linear",
            plain_bitmask_binary_linear,
            x,
            weight,
            weight_mask,
            sign_bits,
            scale_in,
            scale_out,
        )

    @torch.library.custom_op(f"{NAMESPACE}::lowrank_linear", mutates_args=())
    def lowrank_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor) -> Tensor:
        return dispatch("lowrank_linear", plain_lowrank_linear, x, lowrank_a, lowrank_b)

    @torch.library.custom_op(f"{NAMESPACE}::pivoted_linear", mutates_args=())
    def pivoted_linear(x: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, lowrank_pivots: Tensor, rows: int) -> Tensor:
        return dispatch("pivoted_linear", plain_pivoted_linear, x, lowrank_a, lowrank_b, lowrank_pivots, rows)

    bitmask_input_grad.register_fake(lambda grad, weight, weight_mask, columns: outputs(grad, columns))
    bitmask_weight_grad.register_fake(
        lambda grad, x, weight_mask, kept: x.new_empty(
            weight_mask.shape[0], kept, dtype=torch.promote_types(x.dtype, torch.float32)
        )
    )
    binary_input_grad.register_fake(lambda grad, sign_bits, scale_in, scale_out: outputs(grad, scale_in.shape[1]))
    bitmask_binary_input_grad.register_fake(
        lambda grad, weight, weight_mask, sign_bits, scale_in, scale_out: outputs(grad, scale_in.shape[1])
    )
    binary_scale_grads.register_fake(
        lambda grad, x, sign_bits, scale_in, scale_out: tuple(
            torch.empty_like(scale, dtype=torch.promote_types(x.dtype, torch.float32))
            for scale in (scale_in, scale_out)
        )
    )
    bitmask_linear.register_fake(lambda x, weight, weight_mask: outputs(x, weight_mask.shape[0]))
    binary_linear.register_fake(lambda x, sign_bits, scale_in, scale_out: outputs(x, sign_bits.shape[0]))
    bitmask_binary_linear.register_fake(
        lambda x, weight, weight_mask, sign_bits, scale_in, scale_out: outputs(x, sign_bits.shape[0])
    )
    lowrank_linear.register_fake(lambda x, lowrank_a, lowrank_b: outputs(x, lowrank_b.shape[0]))
    pivoted_linear.register_fake(lambda x, lowrank_a, lowrank_b, lowrank_pivots, rows: outputs(x, rows))

    bitmask_linear.register_autograd(_bitmask_backward, setup_context=_save_inputs)
    binary_linear.register_autograd(_binary_backward, setup_context=_save_inputs)
    bitmask_binary_linear.register_autograd(_bitmask_binary_backward, setup_context=_save_inputs)
    lowrank_linear.register_autograd(_lowrank_backward, setup_context=_save_inputs)
    pivoted_linear.register_autograd(_pivoted_backward, setup_context=_save_pivoted)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _bitmask_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, weight_mask = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_lowrank.bitmask_input_grad(grad, weight, weight_mask, x.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.hf_lowrank.bitmask_weight_grad(grad, x, weight_mask, weight.shape[1]).to(weight.dtype)
    return grad_x, grad_weight, None


def _binary_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, sign_bits, scale_in, scale_out = ctx.saved_tensors
    grad_x = grad_in = grad_out = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_lowrank.binary_input_grad(grad, sign_bits, scale_in, scale_out)
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        grad_in, grad_out = torch.ops.hf_lowrank.binary_scale_grads(grad, x, sign_bits, scale_in, scale_out)
        grad_in, grad_out = grad_in.to(scale_in.dtype), grad_out.to(scale_out.dtype)
    return grad_x, None, grad_in, grad_out


def _bitmask_binary_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, weight_mask, sign_bits, scale_in, scale_out = ctx.saved_tensors
    grad_x = grad_weight = grad_in = grad_out = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_lowrank.bitmask_binary_input_grad(
            grad, weight, weight_mask, sign_bits, scale_in, scale_out
        )
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.hf_lowrank.bitmask_weight_grad(grad, x, weight_mask, weight.shape[1]).to(weight.dtype)
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        grad_in, grad_out = torch.ops.hf_lowrank.binary_scale_grads(grad, x, sign_bits, scale_in, scale_out)
        grad_in, grad_out = grad_in.to(scale_in.dtype), grad_out.to(scale_out.dtype)
    return grad_x, grad_weight, None, None, grad_in, grad_out


def _lowrank_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, lowrank_a, lowrank_b = ctx.saved_tensors
    inner_grad = grad @ lowrank_b.to(grad.dtype)
    grad_x = inner_grad @ lowrank_a.to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_a = grad_b = None
    if ctx.needs_input_grad[1]:
        grad_a = (as_matrix(inner_grad).T @ as_matrix(x)).to(lowrank_a.dtype)
    if ctx.needs_input_grad[2]:
        inner = F.linear(x, lowrank_a.to(x.dtype))
        grad_b = (as_matrix(grad).T @ as_matrix(inner)).to(lowrank_b.dtype)
    return grad_x, grad_a, grad_b


def _save_pivoted(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4])


def _pivoted_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, lowrank_a, lowrank_b, lowrank_pivots = ctx.saved_tensors
    rows, rank = grad.shape[-1], lowrank_a.shape[0]
    sorted_grad = grad.index_select(-1, row_sources(lowrank_pivots, rows, rank).argsort())
    pivot_grad, other_grad = sorted_grad[..., :rank], sorted_grad[..., rank:]
    inner_grad = pivot_grad + other_grad @ lowrank_b.to(grad.dtype)
    grad_x = inner_grad @ lowrank_a.to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_a = grad_b = None
    if ctx.needs_input_grad[1]:
        grad_a = (as_matrix(inner_grad).T @ as_matrix(x)).to(lowrank_a.dtype)
    if ctx.needs_input_grad[2]:
        inner = F.linear(x, lowrank_a.to(x.dtype))
        grad_b = (as_matrix(other_grad).T @ as_matrix(inner)).to(lowrank_b.dtype)
    return grad_x, grad_a, grad_b, None, None


# The operations belong to the process: a checkpoint's copy of this file finds those of the package, or of another checkpoint.
if not hasattr(getattr(torch.ops, NAMESPACE), "lowrank_linear"):
    _declare()

bitmask_linear = operation("bitmask_linear")
binary_linear = operation("binary_linear")
bitmask_binary_linear = operation("bitmask_binary_linear")
lowrank_linear = operation("lowrank_linear")
pivoted_linear = operation("pivoted_linear")
