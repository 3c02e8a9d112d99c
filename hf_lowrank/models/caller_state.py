"""What a caller's model has beside its values: training flags of its modules, and tensors made in inference mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while active. Afterwards every module has its own training flag again.

    A module that has come into the model meanwhile, such as a compressed layer, gets the flag of the module that was
    there under its name, or else of the one around it.
    """
    flags = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            known = name
            while known not in flags:
                known = known.rpartition(".")[0]
            module.training = flags[known]


def replace_inference_tensors(model: nn.Module) -> None:
    """Put ordinary copies in the place of parameters and buffers that were made in inference mode.

    Such tensors can neither be changed nor used where gradients are recorded. Tied parameters stay tied.
    """
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            if not tensor.is_inference():
                continue
            if id(tensor) not in copies:
                copies[id(tensor)] = ordinary_copy(tensor)
            setattr(module, name, copies[id(tensor)])


def ordinary_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that was made in inference mode, with the tensor's own attributes.

    It has to be called outside inference mode.
    """
    copy = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
    copy.__dict__.update(vars(tensor))
    return copy
