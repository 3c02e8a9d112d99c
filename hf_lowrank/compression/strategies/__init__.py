"""The strategies: ways of treating the model as a whole. A method names its own (`Method.strategy`).

- `layerwise`: every layer has its budget beforehand, and is solved as soon as its statistics are there.
- `spectral`: the spectra of all layers are measured first, then one budget decides on all ranks, then the layers are
  truncated.
- `mixed`: what each layer could become is measured first, then one budget chooses, then the layers are fitted one
  after the other.
"""

from ...methods import Method
from ...runtime.errors import CompressionError
from .base import Passes, Strategy
from .layerwise import Layerwise
from .mixed import Mixed
from .spectral import Spectral

STRATEGIES: dict[str, type[Strategy]] = {"layerwise": Layerwise, "spectral": Spectral, "mixed": Mixed}

__all__ = ["STRATEGIES", "Passes", "Strategy", "strategy_of"]


def strategy_of(method: Method) -> type[Strategy]:
    """Return the strategy that a method names.

    Raises:
        CompressionError: if there is none of that name, or it cannot use the method.
    """
    if method.strategy not in STRATEGIES:
        raise CompressionError(
            f"{method.name}: found strategy {method.strategy!r}, expected one of {', '.join(STRATEGIES)}"
        )
    strategy = STRATEGIES[method.strategy]
    strategy.check(method)
    return strategy
