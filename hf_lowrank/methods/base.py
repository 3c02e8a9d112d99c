"""What every method shares: the statistics it gets, the budget it must keep, the decomposition it returns."""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget, Layer
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from ..runtime.layers import SparseLowRankLinear
from ..runtime.quantization import Quantized


@dataclass(frozen=True)
class Statistics:
    """What calibration tokens say about the input x of a linear layer; linears that see the same input share one.

    Attributes:
        tokens: number T of tokens seen.
        gram: C = Σ_t x_t x_tᵀ, (n, n) float64; None if no method asked for it.
        column_norms: ‖X_j‖₂ = √(Σ_t x_tj²), (n,) float64.
        mean: (Σ_t x_t) / T, (n,) float64.
        mean_abs: (Σ_t |x_t|) / T, (n,) float64.
        squared_gradients: Σ_i F_ij of one linear layer, (n,) float64, F = mean over calibration batches of (∂L/∂W)²; belongs to that
            layer alone. None unless the method `needs_gradients`.
        compressed_input_gram: Ĉ = Σ_t x̂_t x̂_tᵀ, (n, n) float64, of the inputs x̂ that the layer sees in the compressed model. None unless the
            method `needs_compressed_inputs`.
        cross_gram: M = Σ_t x_t x̂_tᵀ, (n, n) float64: dense inputs against shifted ones, token by token. As `compressed_input_gram`.
        output_gram: G = Σ_t g_t g_tᵀ, (m, m) float64, of the gradients of the loss by the layer's outputs; belongs to that layer
            alone. None unless the method `needs_output_gram`, or if no token reached it: then all outputs count alike.
    """

    tokens: int
    column_norms: Tensor
    mean: Tensor
    mean_abs: Tensor
    gram: Tensor | None = None
    squared_gradients: Tensor | None = None
    compressed_input_gram: Tensor | None = None
    cross_gram: Tensor | None = None
    output_gram: Tensor | None = None

    def require(self, name: str, method: str) -> Tensor:
        """The statistic `name`, which `method` cannot do without.

        Raises:
            CompressionError: if it was not measured.
        """
        value = getattr(self, name)
        if value is None:
            raise CompressionError(
                f"{method}: the statistics hold no {name}, which this method needs; collect it during calibration"
            )
        found: Tensor = value
        return found

    def damped(self, share: float) -> "Statistics":
        """As if noise had come to every input, and to every output's gradient, that has `split` of their mean energy.

        Small shares leave weak directions no longer free to be anything; with large ones all inputs count nearly alike.
        """

        def raised(gram: Tensor | None, like: Tensor | None = None) -> Tensor | None:
            if gram is None:
                return None
            noisy = gram.clone()
            noisy.diagonal().add_(share * (gram if like is None else like).diagonal().mean())
            return noisy

        def raised_scale(scale: Tensor) -> Tensor:
            return (scale.square() + share * scale.square().mean()).sqrt()

        gradients = self.squared_gradients
        return replace(
            self,
            column_norms=raised_scale(self.column_norms),
            mean_abs=raised_scale(self.mean_abs),
            gram=raised(self.gram),
            squared_gradients=None if gradients is None else gradients + share * gradients.mean(),
            compressed_input_gram=raised(self.compressed_input_gram, self.gram),
            cross_gram=raised(self.cross_gram, self.gram),  # the same noise in both models
            output_gram=raised(self.output_gram),
        )

    def select(self, order: Tensor) -> "Statistics":
        """The statistics of the inputs `order`, (k,) indices: a permutation or a part."""
        return replace(
            self,
            column_norms=self.column_norms[order],
            mean=self.mean[order],
            mean_abs=self.mean_abs[order],
            gram=None if self.gram is None else self.gram[order][:, order],
            squared_gradients=None if self.squared_gradients is None else self.squared_gradients[order],
            compressed_input_gram=None
            if self.compressed_input_gram is None
            else self.compressed_input_gram[order][:, order],
            cross_gram=None if self.cross_gram is None else self.cross_gram[order][:, order],
        )


@dataclass(frozen=True)
class Decomposition:
    """The parts of one weight (m, n), in the precision of the method; see `SparseLowRankLinear.from_parts` for the shapes.

    Attributes:
        sparse: layout of the sparse part.
        weight: its values: (p, n), (m, p), (m, n), or for a bitmask the dense (m, n) matrix that `mask` selects from; or quantised.
        lowrank_a, lowrank_b: the factors A and B; or both quantised.
        pivots: which rows of the low-rank part are stored as they are, if B comes without its identity block (see `pivot`).
        bias: what the method adds to the output (m,), beside the layer's own bias.
    """

    sparse: str = "none"
    weight: Tensor | Quantized | None = None
    mask: Tensor | None = None
    lowrank_a: Tensor | Quantized | None = None
    lowrank_b: Tensor | Quantized | None = None
    pivots: Tensor | None = None
    signs: Tensor | None = None
    scale_in: Tensor | None = None
    scale_out: Tensor | None = None
    bias: Tensor | None = None

    def to_layer(
        self, out_features: int, in_features: int, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> SparseLowRankLinear:
        """The compressed layer, rounded once to `dtype`; `bias` (m,) is that of the dense layer."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if bias is not None:
            parts["bias"] = bias if self.bias is None else bias.to(self.bias.dtype) + self.bias
        return SparseLowRankLinear.from_parts(in_features, out_features, **parts, dtype=dtype)


class Method:
    """A method is its mathematics: weight + statistics + budget → decomposition. No model, no I/O, no global state.

    Subclasses are dataclasses whose fields, with help texts in their metadata, are the method's options.

    Attributes:
        name: set by `register_method`.
        needs_gram: whether `Statistics.gram` is needed.
        needs_gradients: whether `Statistics.squared_gradients` is needed.
        needs_output_gram: whether `Statistics.output_gram` is needed.
        strategy: how `compress()` walks a model with this method (`compression/strategies/`). "layerwise" gives every layer its budget
            first and decomposes block by block, "spectral" measures the spectra of all layers before it decides on their ranks, "mixed"
            lets every layer become one of several things, chosen from one budget.
        trains: whether the method learns by training through the whole model.
        sequential: whether a block sees the compressed blocks before it (else the dense ones).
        factorizes: whether its work grows with the third power of a layer's side, or, entry by entry, with the second.
        source: where it was published.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_output_gram: ClassVar[bool] = False
    strategy: ClassVar[str] = "layerwise"
    trains: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    factorizes: ClassVar[bool] = True

    @property
    def needs_compressed_inputs(self) -> bool:
        """Whether `Statistics.compressed_input_gram` and `cross_gram` are needed, beside the statistics of the dense model."""
        return False

    @property
    def learns_from_loss(self) -> bool:
        """Whether the method uses the loss of the next token, by its gradients or by training; the model must then predict one."""
        return self.needs_gradients or self.needs_output_gram or self.trains

    def leaves_dense(self, layer: Layer, ratio: float) -> str | None:
        """Why the method leaves a layer dense at this ratio; None if it compresses it."""
        return None

    def neuron_order(self, statistics: Statistics, weight: Tensor) -> Tensor | None:
        """The order, (f,) indices, in which the method wants the neurons of a feed-forward network; None if it does not care.

        Args:
            statistics: of the neurons, the inputs of the output matrix.
            weight: the output matrix W_d, (d, f).
        """
        return None

    def min_spec(self, layer: Layer) -> LayerSpec:
        """The smallest thing that the method makes of a layer, which bounds the ratios it can reach."""
        return LayerSpec(rank=1)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        """The next larger thing: one more rank, or one more value per row. Budgets are spread in these steps."""
        return replace(spec, rank=spec.rank + 1)

    def max_steps(self, layer: Layer) -> int:
        """How many such steps a layer can take: up to the last rank at which it is smaller than the dense layer."""
        m, n = layer.out_features, layer.in_features
        return (m * n - 1) // (m + n) - 1

    def working_memory(self, layer: Layer) -> int:
        """About how many bytes are in use at most while a layer is decomposed and reported on: float64 matrices, its weight among them."""
        m, n = layer.out_features, layer.in_features
        return 8 * (4 * m * n + (3 * n * n if self.needs_gram else 0))

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Decompose `weight` (m, n), float64, within the budget.

        Raises:
            CompressionError: if the budget is too small for any decomposition of this method.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Choice:
    """One thing that a layer could become.

    Attributes:
        spec: what it would store.
        loss: what that is expected to cost, comparable between layers.
    """

    spec: LayerSpec
    loss: float


@dataclass
class MixedMethod(Method):
    """A method that looks at every layer of the dense model, chooses what each becomes from one budget, and then makes them in turn.

    Layers are made in the order of the data's way, each fitted to the dense outputs on the inputs that the compressed layers before
    it give (`calibration/correction.py`).

    Raises:
        CompressionError: if the share of drawn sequences is not one.
    """

    unigram_share: float = field(
        default=0.25,
        metadata={
            "help": "share of the calibration sequences whose tokens are drawn at random from all of them, for text unlike it"
        },
    )

    strategy: ClassVar[str] = "mixed"
    needs_gram: ClassVar[bool] = True
    needs_output_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.unigram_share <= 1:
            raise CompressionError(
                f"{self.name}: option unigram_share is {self.unigram_share}, expected a number from 0 to 1"
            )

    def choices(self, layer: Layer, weight: Tensor, statistics: Statistics, value_bits: int) -> list[Choice]:
        """What the layer could become, in any order; the dense layer is always possible and not listed."""
        raise NotImplementedError

    def build(self, weight: Tensor, statistics: Statistics, spec: LayerSpec) -> Decomposition:
        """Decompose `weight` (m, n), float64, into what `spec` says."""
        raise NotImplementedError

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """One layer by itself: the best choice within its budget."""
        statistics.require("gram", self.name)
        m, n = weight.shape
        choices = self.choices(Layer("layer", 0, 1, "other", m, n), weight, statistics, budget.value_bits)
        fitting = [choice for choice in choices if budget.stored(choice.spec) <= budget.bits]
        if not fitting:
            raise too_small(self.name, budget)
        return self.build(
            weight, statistics, min(fitting, key=lambda choice: (choice.loss, budget.stored(choice.spec))).spec
        )


def too_small(method: str, budget: Budget) -> CompressionError:
    """The error of a budget in which a method cannot store anything useful."""
    dense = budget.out_features * budget.in_features * budget.value_bits
    return CompressionError(
        f"{method}: {budget.bits} bits for a {budget.out_features} × {budget.in_features} layer "
        f"({budget.bits / max(dense, 1):.1%} of dense) hold nothing; choose a smaller ratio"
    )
