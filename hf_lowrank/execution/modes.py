"""The modes of torch, and the random generators, in which this package computes whatever the caller has set."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
"""Types of devices for which a caller may have turned autocast on."""

FULL_PRECISION = ("none", "ieee")
"""Values of torch's newer switches with which products of float32 matrices are computed in float32."""


@contextmanager
def own_modes() -> Iterator[None]:
    """Compute in modes of our own while active, without gradients. Afterwards all modes are those of the caller again.

    The same input then gives the same bytes under autocast, in inference mode, with another default dtype or device,
    and where the caller lets products of float32 matrices be computed in a narrower format. Tensors that are made
    while active are ordinary ones, which can be trained later.

    Deterministic algorithms stay on where the caller turned them on. An operation that has none is then a warning of
    torch's and no error.

    The global random generators come back to their states, too. Nothing here draws from them, but what the caller
    gives may, such as a loader that shuffles.
    """
    with ExitStack() as stack:
        stack.enter_context(_kept_random_states())
        for device_type in AUTOCAST_DEVICES:
            if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                # Autocast keeps casts of parameters, which may be changed in place here.
                stack.callback(torch.clear_autocast_cache)
                stack.enter_context(torch.autocast(device_type, enabled=False))
        # Leaving inference mode turns gradients on, so that `no_grad` comes after it.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # A device context costs a little at every operation, and is entered only where there is another one.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_changed(torch.get_default_dtype, torch.set_default_dtype, torch.float32))
        if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=False)
            torch.use_deterministic_algorithms(True, warn_only=True)
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Bring the global random generators back to their states afterwards."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def _changed(get: Callable[[], Any], change: Callable[[Any], None], value: Any) -> Iterator[None]:
    """Change a setting while active."""
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Let products of float32 matrices be computed in float32 while active.

    Torch has one old setting for that, and since 2.9 a switch for each back end beside it.
    """
    switches = _precision_switches()
    precision = _matmul_precision()
    values = [switch.fp32_precision for switch in switches]
    if precision == "highest" and set(values) <= set(FULL_PRECISION):
        yield
        return
    torch.set_float32_matmul_precision("highest")
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for switch, value in zip(switches, values, strict=True):
            # A switch without a value of its own follows the one above it. Where that gives the value that it had
            # before, it goes on following.
            switch.fp32_precision = "none"
            if switch.fp32_precision != value:
                switch.fp32_precision = value


def _precision_switches() -> list[Any]:
    """Return those of torch's newer switches that stand for products of matrices."""
    candidates = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [switch for switch in candidates if hasattr(switch, "fp32_precision")]


def _matmul_precision() -> str:
    """Return the older setting, which torch refuses to tell where only the newer switches were used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
