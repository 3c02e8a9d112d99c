"""The base class of all methods, the statistics that a method is given, and the decomposition that it returns."""

import dataclasses
from dataclasses import dataclass, replace
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
    """Statistics of the input x of a linear layer over the calibration tokens.

    Linear layers with the same input share them, apart from those that belong to one layer alone.

    Attributes:
        tokens: number T of tokens seen.
        gram: C = Σ_t x_t x_tᵀ, (n, n) float64; None if no method asked for it.
        column_norms: ‖X_j‖₂ = √(Σ_t x_tj²), (n,) float64.
        mean: (Σ_t x_t) / T, (n,) float64.
        mean_abs: (Σ_t |x_t|) / T, (n,) float64.
        squared_gradients: Σ_i F_ij of one linear layer, (n,) float64, with F the mean of (∂L/∂W)² over the calibration
            batches. It belongs to that layer alone. None unless the method `needs_gradients`.
        compressed_input_gram: Ĉ = Σ_t x̂_t x̂_tᵀ, (n, n) float64, of the inputs x̂ that the layer sees in the compressed
            model. None unless the method `needs_compressed_inputs`.
        cross_gram: M = Σ_t x_t x̂_tᵀ, (n, n) float64, of the inputs in the dense and in the compressed model, token by
            token. None where `compressed_input_gram` is.
        output_gram: G = Σ_t g_t g_tᵀ, (m, m) float64, of the gradients g of the loss by the layer's outputs. It
            belongs to that layer alone. None unless the method `needs_output_gram`, or if no token reached the layer;
            all outputs then count alike.
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
        """Return the statistic `name`, which `method` cannot do without.

        Raises:
            CompressionError: if it was not measured.
        """
        statistic: Tensor | None = getattr(self, name)
        if statistic is None:
            raise CompressionError(
                f"{method}: the statistics hold no {name}, which this method needs; collect it during calibration"
            )
        return statistic

    def damped(self, share: float) -> "Statistics":
        """Return the statistics as if noise had been added to every input and to the gradient of every output.

        With a small share the directions that no token reaches are no longer free to take any value. With a large one
        all inputs count nearly alike.

        Args:
            share: energy of the noise, relative to the mean energy of the inputs (or of the gradients).
        """

        def with_noise(gram: Tensor | None, like: Tensor | None = None) -> Tensor | None:
            """Add the noise to the diagonal of a Gram matrix, relative to the mean diagonal of `like` or of itself."""
            if gram is None:
                return None
            reference = gram if like is None else like
            noisy = gram.clone()
            noisy.diagonal().add_(share * reference.diagonal().mean())
            return noisy

        def with_noise_in_scale(scale: Tensor) -> Tensor:
            return (scale.square() + share * scale.square().mean()).sqrt()

        gradients = self.squared_gradients
        if gradients is not None:
            gradients = gradients + share * gradients.mean()
        return replace(
            self,
            column_norms=with_noise_in_scale(self.column_norms),
            mean_abs=with_noise_in_scale(self.mean_abs),
            gram=with_noise(self.gram),
            squared_gradients=gradients,
            # The noise is the same in the dense and in the compressed model, so that it is part of all three matrices.
            compressed_input_gram=with_noise(self.compressed_input_gram, like=self.gram),
            cross_gram=with_noise(self.cross_gram, like=self.gram),
            output_gram=with_noise(self.output_gram),
        )

    def select(self, order: Tensor) -> "Statistics":
        """Return the statistics of the inputs `order`, (k,) indices: a permutation or a part of all inputs."""

        def submatrix(gram: Tensor | None) -> Tensor | None:
            if gram is None:
                return None
            return gram[order][:, order]

        gradients = self.squared_gradients
        if gradients is not None:
            gradients = gradients[order]
        return replace(
            self,
            column_norms=self.column_norms[order],
            mean=self.mean[order],
            mean_abs=self.mean_abs[order],
            gram=submatrix(self.gram),
            squared_gradients=gradients,
            compressed_input_gram=submatrix(self.compressed_input_gram),
            cross_gram=submatrix(self.cross_gram),
        )


@dataclass(frozen=True)
class Decomposition:
    """The parts of one weight (m, n), in the precision of the method.

    `SparseLowRankLinear.from_parts` documents their shapes.

    Attributes:
        sparse: layout of the sparse part.
        weight: its values: (p, n), (m, p) or (m, n), or for a bitmask the dense (m, n) matrix that `mask` selects
            from, or quantized.
        mask: which entries a bitmask keeps, (m, n), boolean.
        lowrank_a, lowrank_b: the factors A and B, or both of them quantized.
        pivots: which rows of the low-rank part are stored as they are, if B comes without its identity block (see
            `pivot`).
        signs, scale_in, scale_out: the sign matrix of the binary part, (m, n), and the factors V (r, n) and U (m, r)
            of its magnitudes.
        bias: a term (m,) that the method adds to the output, beside the layer's own bias.
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
        """Return the compressed layer, rounded once to `dtype`.

        Args:
            bias: bias (m,) of the dense layer.
            dtype: data type of the float tensors, by default the data type of the parts.
        """
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # A layer has one bias: the sum of its own and of what the method adds, in the method's precision.
        if bias is not None:
            if self.bias is not None:
                bias = bias.to(self.bias.dtype) + self.bias
            parts["bias"] = bias
        return SparseLowRankLinear.from_parts(in_features, out_features, **parts, dtype=dtype)


class Method:
    """A method is its mathematics: weight + statistics + budget → decomposition. It knows no model and no files.

    Subclasses are dataclasses. Their fields, with help texts in the metadata, are the options of the method.

    Attributes:
        name: set by `register_method`.
        source: where the method was published.
        strategy: how `compress()` walks a model with this method (`compression/strategies/`). "layerwise" gives every
            layer its budget first and decomposes block by block, "spectral" measures the spectra of all layers before
            it decides on their ranks, "mixed" lets every layer become one of several things, chosen from one budget.
        trains: whether the method learns by training through the whole model.
        needs_gram: whether `Statistics.gram` is needed.
        needs_gradients: whether `Statistics.squared_gradients` is needed.
        needs_output_gram: whether `Statistics.output_gram` is needed.
        sequential: whether a block is calibrated on the outputs of the compressed blocks before it, or else of the
            dense ones.
        factorizes: whether the work grows with the third power of a layer's side (as for an SVD), or else with the
            second.
        quantizes: whether the sparse part may come out as codes. Layers whose weight the model's own code reads, for
            its dtype, stay dense then.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    strategy: ClassVar[str] = "layerwise"
    trains: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_output_gram: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    factorizes: ClassVar[bool] = True
    quantizes: ClassVar[bool] = False

    @property
    def needs_compressed_inputs(self) -> bool:
        """Whether `Statistics.compressed_input_gram` and `cross_gram` are needed, beside those of the dense model."""
        return False

    @property
    def learns_from_loss(self) -> bool:
        """Whether the method uses the loss of the next token, by its gradients or by training.

        It then compresses only models that predict one.
        """
        return self.needs_gradients or self.needs_output_gram or self.trains

    @property
    def reads_next_tokens(self) -> bool:
        """Whether the loss that the method learns from is that of the tokens that follow each other in the text."""
        return self.needs_gradients

    @property
    def size_is_set(self) -> bool:
        """Whether the options say the size of every layer, so that the ratio follows from them."""
        return False

    def leaves_dense(self, layer: Layer, ratio: float) -> str | None:
        """Return the reason why the method leaves a layer dense at this ratio, or None if it compresses the layer."""
        return None

    def neuron_order(self, statistics: Statistics, weight: Tensor) -> Tensor | None:
        """Return the order in which the method wants the neurons of a feed-forward network, None if any will do.

        Args:
            statistics: of the neurons, which are the inputs of the output matrix.
            weight: the output matrix W_d, (d, f).

        Returns:
            (f,) indices.
        """
        return None

    def min_spec(self, layer: Layer) -> LayerSpec:
        """Return the spec of the smallest layer that the method makes of `layer`. It bounds the reachable ratios."""
        return LayerSpec(rank=1)

    def next_spec(self, layer: Layer, spec: LayerSpec) -> LayerSpec:
        """Return the spec one step larger than `spec`: by one rank, one kept value per row or one bit per weight.

        Budgets are spread over layers in these steps.
        """
        return replace(spec, rank=spec.rank + 1)

    def max_steps(self, layer: Layer) -> int:
        """Return how many times `next_spec` can be taken from `min_spec`.

        By default that is up to the last rank at which the factors are smaller than the dense layer.
        """
        m, n = layer.out_features, layer.in_features
        return (m * n - 1) // (m + n) - 1

    def working_memory(self, layer: Layer) -> int:
        """Return about how many bytes are in use at most while a layer is decomposed and reported on.

        These are float64 matrices, the layer's weight among them.
        """
        m, n = layer.out_features, layer.in_features
        values = 4 * m * n
        if self.needs_gram:
            values += 3 * n * n
        if self.needs_output_gram:
            values += 3 * m * m
        return 8 * values

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """Decompose `weight` (m, n), float64, within the budget.

        Raises:
            CompressionError: if the budget is too small for any decomposition of this method.
        """
        raise NotImplementedError


def single_layer(weight: Tensor) -> Layer:
    """Return the layer of a weight (m, n) that is decomposed by itself, outside a model."""
    out_features, in_features = weight.shape
    return Layer("layer", 0, 1, "other", out_features, in_features)


def too_small(method: str, budget: Budget) -> CompressionError:
    """Return the error for a budget in which a method cannot store anything useful."""
    dense = budget.out_features * budget.in_features * budget.value_bits
    return CompressionError(
        f"{method}: {budget.bits} bits for a {budget.out_features} × {budget.in_features} layer "
        f"({budget.bits / max(dense, 1):.1%} of dense) hold nothing; choose a smaller ratio"
    )
