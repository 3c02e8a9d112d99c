"""The base of every strategy: it compresses the blocks, and says beforehand how much work that is."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ...budget import Layer
from ...calibration import BlockBatch, TokenBatch
from ...methods import Method
from ...runtime.errors import CompressionError
from ..session import Session


@dataclass(frozen=True)
class Passes:
    """How often the calibration tokens go through a block.

    Attributes:
        forward: forward passes of all tokens, the capture of the inputs among them.
        sums: how often the Gram matrices of all tokens are summed.
    """

    forward: int
    sums: int


class Strategy(ABC):
    """A way of treating the model as a whole.

    Attributes:
        methods: the class of the methods that it can use.
        trained: the class of those that it can train.
    """

    methods: ClassVar[type[Method]] = Method
    trained: ClassVar[type[Method] | None] = None

    @classmethod
    def check(cls, method: Method) -> None:
        """Raise CompressionError if the strategy cannot use a method that names it."""
        if not isinstance(method, cls.methods):
            raise CompressionError(
                f"{method.name}: found {type(method).__name__}, expected a {cls.methods.__name__} for the strategy "
                f"{method.strategy!r}"
            )
        if method.trains and (cls.trained is None or not isinstance(method, cls.trained)):
            which = "no method" if cls.trained is None else f"{cls.trained.__name__} and its subclasses only"
            raise CompressionError(f"{method.name}: trains, and the strategy {method.strategy!r} trains {which}")

    @staticmethod
    def adapt_tokens(method: Method, tokens: list[TokenBatch], seed: int) -> list[TokenBatch]:
        """Return the calibration batches as the strategy wants them."""
        return tokens

    @staticmethod
    @abstractmethod
    def compress(session: Session, batches: list[BlockBatch]) -> None:
        """Compress the blocks of the model, in place.

        Args:
            batches: this process's calibration batches, at the first block.
        """

    @staticmethod
    @abstractmethod
    def passes(method: Method) -> Passes:
        """Return how often the calibration tokens go through a block."""

    @staticmethod
    def survey_bytes(layers: list[Layer]) -> int:
        """Return the bytes in the work folder that a survey of these layers takes until they are built."""
        return 0


def statistics_input(layer: Layer) -> str:
    """Return a name for the input of a layer, which is the same for layers that see the same input."""
    shared = {"query": "attention", "key": "attention", "value": "attention", "ffn_in": "ffn_in"}
    return shared.get(layer.role, layer.name)
