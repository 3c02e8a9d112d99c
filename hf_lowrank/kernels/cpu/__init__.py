"""CPU back end in C++: fused products for a few tokens, unpacked tiles for many."""

from ...runtime.ops import register_direct, register_kernel
from . import native, operators, products

NAME = "cpp"
ON_BY_DEFAULT = True


def register() -> None:
    """Offer the kernels for the "cpu" device, if the library was built."""
    if native.library() is None:
        return
    native.share_instruction_set()
    operators.use(True)
    functions = native.module()
    for operation, kernel in products.KERNELS.items():
        register_kernel(operation, "cpu", NAME, kernel)
        # The module has functions for the products of few tokens only, and none at all where torch is too old for it.
        if hasattr(functions, operation):
            register_direct(operation, getattr(functions, operation))


def withdraw() -> None:
    """Leave compiled graphs, too, to plain torch. `runtime.ops` forgets the other kernels by itself."""
    if native.library() is not None:
        operators.use(False)


def describe(operation: str) -> tuple[str, str]:
    """Return the name of the back end of an operation, and what it does here or why it cannot compute it."""
    if native.library() is None:
        return "torch", "the C++ library was not built; install a C++ compiler and reinstall hf_lowrank"
    name = f"{NAME} ({native.instruction_set_in_use()})"
    if operation.endswith("_grad"):
        return name, "tiles unpacked in C++ and multiplied by torch; bfloat16, float16, float32"
    many = "tiles unpacked in C++ and multiplied by torch"
    if operation in ("lowrank_linear", "pivoted_linear"):
        many = "two products of torch"
    few = f"up to {products.FEW_TOKENS} tokens"
    if operation.startswith(("bitmask", "quantized")) and native.instruction_set_in_use() == "avx512":
        few += f" (bfloat16: {products.FEW_TOKENS_BY_BFLOAT16})"
    return name, f"{few} from the packed form, more: {many}; bfloat16, float16, float32"
