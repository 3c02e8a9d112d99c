"""An accelerator that is not there: tensors that say they are on another device, and refuse to meet those of the CPU.

Their values are computed on the CPU. Every operation checks that all of its tensors are on one device, as a real
accelerator does, and the bytes on the device are counted. Moves between the devices are as on a real one: by `to`,
`cpu`, `copy_` and the `device` argument of what makes tensors.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("ipu", 0)
"""The device that the tensors pretend to be on: of a type that torch knows and has no code for."""

MIXING = ("aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""Operations that take tensors of both: copies, and an index on the CPU beside values on an accelerator."""

MAKERS = ("zeros", "ones", "empty", "full", "arange", "eye", "tensor", "rand", "randn", "as_tensor", "linspace")
"""Functions of torch that make a tensor on the device that they are told."""


class StandInDevice:
    """Counts the bytes that are on the device.

    Attributes:
        bytes: the bytes there now.
        peak: the most bytes there were at a time.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.peak = 0
        self._holders: Counter[int] = Counter()

    def hold(self, tensor: "DeviceTensor") -> None:
        """Count the memory of a tensor, until the last tensor that shares it is gone."""
        storage = tensor.values.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._holders[key]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._holders[key] += 1
        # The finalizer keeps the values, so that the key is not given to other memory before.
        weakref.finalize(tensor, self._release, key, size, storage)

    def _release(self, key: int, size: int, storage: Any) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.bytes -= size


_counting = StandInDevice()


class DeviceTensor(Tensor):
    """A tensor on the stand-in device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # a parameter like this one, of values that may be elsewhere
            return nn.Parameter(values, requires_grad)
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="cpu",
        )
        made.values = values
        _counting.hold(made)
        return made

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.values})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = DeviceTensor(self.values.detach().clone()).requires_grad_(self.requires_grad)
        if hasattr(self, "_is_param"):
            copy._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[int, Tensor] = {}
        strangers: list[Tensor] = []

        def values(argument: Any) -> Any:
            if isinstance(argument, DeviceTensor):
                given[id(argument.values)] = argument
                return argument.values
            if isinstance(argument, Tensor) and argument.dim():
                strangers.append(argument)
            return type(argument)(map(values, argument)) if type(argument) in (list, tuple) else argument

        def wrapped(result: Any) -> Any:
            if isinstance(result, Tensor):
                # What is computed in place is the tensor that was given.
                return given[id(result)] if id(result) in given else DeviceTensor(result)
            return type(result)(map(wrapped, result)) if type(result) in (list, tuple) else result

        kwargs = kwargs or {}
        plain_args, plain_kwargs = values(args), {key: values(value) for key, value in kwargs.items()}
        if strangers and func._schema.name not in MIXING:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {tuple(strangers[0].shape)} on "
                f"{strangers[0].device} and others on {DEVICE}"
            )
        result = func(*plain_args, **plain_kwargs)
        if torch.Tag.inplace_view in func.tags:  # the shape that torch sees changes along
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], DeviceTensor):
            return args[0]
        return wrapped(result)


def _values(tensor: DeviceTensor) -> Tensor:
    return tensor.values


class _Devices(TorchFunctionMode):
    """Gives tensors their place where Python names one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        name = getattr(func, "__name__", "")
        if name == "__get__":
            is_device = getattr(func, "__self__", None) is Tensor.device and isinstance(first, DeviceTensor)
            return DEVICE if is_device else func(*args, **kwargs)
        if name in ("to", "cpu", "cuda") and isinstance(first, Tensor):
            return _moved(first, name, args[1:], kwargs)
        if func is Tensor.tolist and isinstance(first, DeviceTensor):
            return first.values.tolist()
        if func is Tensor.register_hook:
            return func(first, _within_devices(args[1]))
        place = kwargs.get("device")
        if place is None or (first is not None and isinstance(first, Tensor) and not _is_maker(func)):
            return func(*args, **kwargs)
        plain = tree_map_only(DeviceTensor, _values, args)
        result = func(*plain, **{**kwargs, "device": "cpu" if _is_ours(place) else place})
        return DeviceTensor(result) if _is_ours(place) else result


def _within_devices(hook: Any) -> Any:
    """Return a hook that a backward pass calls, and that finds the device although this mode is off meanwhile."""

    def run(gradient: Tensor) -> Any:
        with _Devices():
            return hook(gradient)

    return run


def _is_maker(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in MAKERS or name.endswith("_like") or name.startswith("new_")


def _is_ours(place: Any) -> bool:
    return torch.device(place).type == DEVICE.type


def _moved(tensor: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what `tensor.to(*args, **kwargs)`, or `tensor.cpu()`, gives."""
    kwargs = {key: value for key, value in kwargs.items() if key != "non_blocking"}
    place: torch.device | None = torch.device("cpu") if name == "cpu" else None
    rest = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            place = DEVICE if isinstance(value, DeviceTensor) else torch.device(value.device)
            rest.append(value.dtype)
        elif isinstance(value, (str, torch.device)):
            place = torch.device(value)
        elif isinstance(value, torch.dtype):
            rest.append(value)
    is_here = isinstance(tensor, DeviceTensor)
    goes_there = is_here if place is None else place.type == DEVICE.type
    with torch._C.DisableTorchFunction():
        if place is not None and place.type == "meta" and is_here:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if not is_here and not goes_there:
            return tensor.to(*args, **kwargs) if name == "to" else tensor.cpu()
        for dtype in rest:
            tensor = tensor.to(dtype)
        if is_here == goes_there:
            return tensor
        return _Move.apply(tensor, goes_there)


class _Move(torch.autograd.Function):
    """A copy to the other device, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: bool) -> Tensor:
        ctx.there = there
        if there:
            return DeviceTensor(tensor.detach().clone())
        assert isinstance(tensor, DeviceTensor)
        return tensor.values.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Move.apply(gradient, not ctx.there), None


@contextmanager
def stand_in_device() -> Iterator[StandInDevice]:
    """Have an accelerator while active, at `DEVICE`."""
    _counting.peak = _counting.bytes
    # Parameters of modules that move are made anew: the memory of a plain tensor cannot become that of another class.
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Devices():
            yield _counting
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
