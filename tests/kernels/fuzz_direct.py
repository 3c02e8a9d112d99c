"""Makes ordinary and hostile calls of the kernels that take tensors themselves.

`python -m tests.kernels.fuzz_direct --seconds 600`

An ordinary call must give the bits of the general kernel. Whatever else is passed, the answer must be a tensor or
None: no crash, no exception, no lost reference. For a run under sanitizers see `docs/trust.md`.
"""

import argparse
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowrank.kernels.cpu import native, products

from .layers import FORMS, operation_of, random_layer
from .test_direct import misaligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (
    -1,
    0,
    1,
    2,
    8,
    9,
    2**31 - 1,
    2**31,
    2**32 + 4,
    2**61,
    2**63 - 1,
    2**63,
    -(2**63),
    10**40,
    1.5,
    True,
    None,
    "4",
    [],
    object(),
)


class Named(Tensor):
    """A subclass of tensors, which may compute in another way."""


def without_memory(tensor: Tensor) -> Tensor:
    """Return a copy of the tensor whose memory was freed, as that of a swapped-out parameter is."""
    freed = tensor.clone()
    freed.untyped_storage().resize_(0)
    return freed


HOSTILE: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.mT if t.dim() > 1 else t[::2],
    lambda t: t[..., ::2],
    lambda t: t[..., 1:],
    lambda t: t[1:],
    lambda t: t[:0],
    lambda t: t[..., :0],
    lambda t: t[..., :1].expand(t.shape),
    lambda t: t.unsqueeze(0),
    lambda t: t.reshape(-1),
    lambda t: t.view(*[1] * 9, *t.shape),
    lambda t: t.double(),
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.complex64).conj(),
    lambda t: torch._neg_view(t),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.float().to_mkldnn(),
    lambda t: torch.nested.nested_tensor([t]),
    lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t: t.as_subclass(Named),
    lambda t: nn.Parameter(t, requires_grad=t.is_floating_point()),
    lambda t: t.clone().requires_grad_(),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: torch.full_like(t, 255),
    lambda t: torch.zeros_like(t),
    without_memory,
    misaligned,
    lambda t: t.tolist(),
    lambda t: None,
    lambda t: 7,
    lambda t: type(t),
)


def ordinary_call(rng: random.Random) -> tuple[str, list[Any]]:
    """Return a form and arguments that fit it, with shapes, dtypes and values drawn at random."""
    columns, rows = rng.choice((1, 7, 8, 31, 64, rng.randint(1, 300))), rng.randint(1, 150)
    kept, rank = rng.randint(0, columns), rng.randint(1, 40)
    bits, group = rng.randint(2, 8), rng.choice((1, 16, 32, 64, 128, 2**31 - 1, rng.randint(1, 400)))
    dtype, x_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    layer = random_layer(rows, columns, kept, dtype, rng.randint(1, 3), rank, bits, group, seed=rng.randrange(2**31))
    form = rng.choice(FORMS)
    leading = rng.choice(((), (1,), (2,), (16,), (rng.randint(0, 18),), (2, 3), (1, 1, 4), (4, 2, 2)))
    return form, [torch.randn(*leading, columns).to(x_dtype), *layer.arguments(form)]


def spoil(rng: random.Random, arguments: list[Any]) -> list[Any]:
    """Return the arguments with one or two of them replaced, or one too many, or some missing."""
    spoiled = list(arguments)
    for _ in range(rng.choice((1, 1, 2))):
        index = rng.randrange(len(arguments))
        part = arguments[index]
        try:
            spoiled[index] = rng.choice(HOSTILE)(part) if isinstance(part, Tensor) else rng.choice(NUMBERS)
        except (RuntimeError, NotImplementedError, ValueError):
            continue  # torch itself does not make this tensor
    if rng.random() < 0.03:
        spoiled = rng.choice((spoiled[:-1], [*spoiled, None], []))
    return spoiled


def tensor_references(arguments: list[Any]) -> list[int]:
    """Return the number of references to each tensor."""
    return [sys.getrefcount(part) for part in arguments if isinstance(part, Tensor)]


def main() -> int:
    """Call until the time is over, and return the exit code, which is 1 if an ordinary call gave other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    module = native.module()
    assert module is not None, "the library is not built"
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    counts: Counter[str] = Counter()
    end = time.monotonic() + settings.seconds
    while time.monotonic() < end:
        torch.set_num_threads(rng.randint(1, 4))
        form, arguments = ordinary_call(rng)
        operation = operation_of(form)
        direct = getattr(module, operation)
        sets = native.INSTRUCTION_SETS[: native.INSTRUCTION_SETS.index(native.best_instruction_set()) + 1]
        with (
            torch.inference_mode(rng.random() < 0.5),
            torch.no_grad(),
            native.forced_instruction_set(rng.choice(sets)),
        ):
            found = direct(*arguments)
            counts["ordinary, answered" if found is not None else "ordinary, left to torch"] += 1
            if found is not None and not torch.equal(found, products.KERNELS[operation](*arguments)):
                shapes = [getattr(part, "shape", part) for part in arguments]
                print(f"{form}, {shapes}: other bits than the general kernel's")
                return 1
            for _ in range(8):
                spoiled = spoil(rng, arguments)
                references = tensor_references(spoiled)
                found = direct(*spoiled)
                assert found is None or type(found) is Tensor
                assert references == tensor_references(spoiled)
                counts["hostile, answered" if found is not None else "hostile, left to torch"] += 1
    print(f"{dict(counts)}, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB: no error found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
