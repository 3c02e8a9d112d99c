"""What became of the layers in an exported file."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import CompressionError


@dataclass(frozen=True)
class ExportedLayer:
    """One compressed layer in the exported file.

    Attributes:
        name: module name.
        form: how the file stores it.
        loss: what that rounds, or why the layer is dense; None if it has exactly the values of the checkpoint.
    """

    name: str
    form: str
    loss: str | None = None


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        path: the folder or the file.
        bytes: size of the weights, in bytes.
        layers: the layers that were compressed, in the order of the model.
    """

    path: Path
    bytes: int
    layers: list[ExportedLayer]

    def summary(self) -> list[tuple[int, str, str]]:
        """Return how many layers have the same form and the same loss, these two, and so on for all."""
        counts = Counter((layer.form, layer.loss or "exactly the values of the checkpoint") for layer in self.layers)
        return [(count, form, loss) for (form, loss), count in counts.items()]


def check_exact(layers: list[ExportedLayer], target: str) -> None:
    """Raise CompressionError if a layer does not have exactly the values of the checkpoint."""
    changed = [layer for layer in layers if layer.loss is not None]
    for layer in changed[:1]:
        others = f" ({len(changed)} layers are changed)" if len(changed) > 1 else ""
        raise CompressionError(
            f"--exact: {target} does not hold {layer.name} exactly: {layer.form}, {layer.loss}{others}; "
            "leave --exact out, or compress by gptq or rtn in at most 7 bits, in groups of 32"
        )
