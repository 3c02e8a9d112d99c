"""Tells whether a computation has to be made of torch's own operations only.

`torch.compile` keeps the operations that `ops` declares, and so their kernels. Three kinds of callers cannot:

- What `torch.export`, `torch.onnx.export` and `torch.jit.trace` write is opened where this package is not installed.
- The transforms of `torch.func` (`vmap`, `jvp`, `hessian`, …) have rules for torch's own operations.
- So have derivatives in forward mode.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

# These have no public name in any version of torch. Where one is missing, its case is not noticed, and torch says that
# it has no rule for an operation.
_function_transforms: Callable[[], int] = getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", lambda: 0)
"""Returns how many transforms of torch.func are active."""
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
"""Returns how many modes are watching the operations of torch, such as those of `make_fx` and of counters."""


# Dynamo calls a function with this decorator while it is tracing, and takes its result for a constant.
@torch.compiler.assume_constant_result
def _dynamo_transforms() -> bool:
    """Return whether Dynamo is inside a transform of torch.func."""
    return _function_transforms() > 0


@torch.compiler.assume_constant_result
def _dynamo_is_exporting() -> bool:
    """Return whether Dynamo is tracing for `torch.export`, in torch 2.6."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return bool(getattr(InstructionTranslator.current_tx(), "export", False))


def _is_exporting_2_6() -> bool:
    """Return whether `torch.export` is tracing, as `torch.compiler.is_exporting` of torch 2.7 does."""
    if is_dynamo_compiling():
        return _dynamo_is_exporting()
    # Apart from Dynamo, which has been asked, only an export compiles.
    return is_compiling()


is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _is_exporting_2_6)
"""Returns whether `torch.export` is tracing."""


def must_decompose() -> bool:
    """Return whether an operation has to be computed by torch's own operations, see the head of this file."""
    if is_dynamo_compiling():
        return is_exporting() or _dynamo_transforms()
    if is_exporting() or _function_transforms() > 0:
        return True
    return torch.jit.is_tracing() or getattr(forward_ad, "_current_level", -1) >= 0
