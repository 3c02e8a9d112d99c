"""Whitened low rank: the factorization that SVD-LLM, SoLA and SoCo stand on.

With C = Σ x xᵀ = S Sᵀ and the SVD  W S = U Σ Vᵀ, keeping r components of  W = U Σ (Vᵀ S⁻¹)  loses exactly
‖(W − W_r) X‖² = Σ_{i>r} σ_i²  on the calibration tokens (papers: SVD-LLM, theorem 1; SoLA §1.2).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import ModelBudget
from ..models.linears import row_chunks
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, NumericalError
from .base import Budget, Decomposition, Layer, Method, Statistics, too_small

RELATIVE_JITTERS = tuple(10.0**exponent for exponent in range(-10, -5))
SMALLEST_EIGENVALUE = 1e-10
"""Relative to the largest one; smaller ones are raised to it in the fallback."""

POWER_ITERATIONS = 4
"""Of `leading_components`; alternating methods start each call from the last one's vectors, and end as with full decompositions."""


@dataclass(frozen=True)
class Factorization:
    """W = left · diag(sigma) · right, components in order of falling energy.

    Attributes:
        left: U, (m, k), orthonormal columns.
        sigma: singular values in the calibration metric, (k,), falling.
        right: Vᵀ S⁻¹, (k, n).
    """

    left: Tensor
    sigma: Tensor
    right: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """A = Σ_r^½ V_rᵀ S⁻¹, (r, n), and B = U_r Σ_r^½, (m, r): both factors carry the same share of the scale."""
        root = self.sigma[:rank].sqrt()
        return root[:, None] * self.right[:rank], self.left[:, :rank] * root


def factorize(weight: Tensor, gram: Tensor | None = None) -> Factorization:
    """The whitened SVD of `weight` (m, n) with Gram matrix `gram` (n, n); the plain SVD without one. Both float64."""
    if gram is None or not bool(gram.diagonal().any()):
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        return Factorization(left, sigma, right)
    root, is_triangular = matrix_root(gram)
    left, sigma, right = torch.linalg.svd(weight @ root, full_matrices=False)
    if is_triangular:
        unwhitened = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    else:
        unwhitened = torch.linalg.solve(root, right, left=False)
    return Factorization(left, sigma, unwhitened)


def whitened_factors(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) that minimise ‖(W − B A) X‖_F, both of the same scale; in the memory of C and little more than W.

    With the SVD W S = U Σ Vᵀ the best approximation is U_r U_rᵀ W = W S V_r V_rᵀ S⁻¹. U are the eigenvectors of W C Wᵀ (m, m), V those
    of Sᵀ Wᵀ W S (n, n); the smaller of the two is decomposed. Eigenvalues are squares of singular values, so components under 1e-8 of
    the largest are not told apart; together they lose no more than rounding the factors to 16 bits does.
    """
    if not bool(gram.diagonal().any()):
        return factorize(weight).truncate(rank)
    if weight.shape[0] <= weight.shape[1]:
        jitter = RELATIVE_JITTERS[0] * gram.diagonal().mean()  # where no token is, W itself decides
        energy = weight.new_zeros(weight.shape[0], weight.shape[0])
        for rows in row_chunks(weight):
            part = (weight[rows] @ gram).add_(weight[rows], alpha=float(jitter))
            energy[rows, : rows.stop] = (
                part @ weight[: rows.stop].T
            )  # the lower triangle, which is all that eigh reads
        b = torch.linalg.eigh(energy).eigenvectors[:, -rank:].flip(1)
        a = b.T @ weight
    else:
        root, is_triangular = matrix_root(gram)
        vectors = torch.linalg.eigh(root.T @ (weight.T @ weight) @ root).eigenvectors[:, -rank:].flip(1)
        b = weight @ (root @ vectors)
        a = (
            torch.linalg.solve_triangular(root.T, vectors, upper=True)
            if is_triangular
            else torch.linalg.solve(root.T, vectors)
        ).T
    scale = (a.norm(dim=1) / b.norm(dim=0)).clamp(min=torch.finfo(a.dtype).tiny).sqrt()
    return a / scale[:, None], b * scale


def matrix_root(gram: Tensor) -> tuple[Tensor, bool]:
    """S with C ≈ S Sᵀ, and whether it is lower triangular.

    Cholesky with a relative jitter, from 1e-10 of the mean diagonal upward until it succeeds; then the eigen-decomposition
    with small eigenvalues raised to 1e-10 of the largest one. Dead channels and fewer tokens than channels are regular cases.
    """
    mean_diagonal = gram.diagonal().mean()
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    for jitter in RELATIVE_JITTERS:
        root, failed = torch.linalg.cholesky_ex(gram + jitter * mean_diagonal * identity)
        if not int(failed):
            return root, True
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return eigenvectors * eigenvalues.clamp(min=SMALLEST_EIGENVALUE * float(eigenvalues[-1])).sqrt(), False


def leading_components(matrix: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) with U V ≈ the best rank-r approximation of `matrix` (m, n), by power iteration from `start` (r, n).

    U carries half of the scale of each component, so that both fit a 16-bit range. A non-negative matrix has U, V ≥ 0 at rank 1.
    """
    V = _first_guess(matrix, rank) if start is None else start
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(matrix @ V.T).Q if rank > 1 else _normalized(matrix @ V.T)
        V = Q.T @ matrix  # (r, n): Q V is the projection of the matrix onto the span of Q
    scale = V.norm(dim=1).clamp(min=torch.finfo(V.dtype).tiny).sqrt()
    return Q * scale, V / scale[:, None]


def inverse_cholesky(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U with (C + λ I)⁻¹ = Uᵀ U, λ = `damping` · mean C_jj; dead channels get the mean of the living ones.

    Raises:
        NumericalError: if C + λ I is singular in float64.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    hessian = gram / mean + torch.diag(torch.where(alive, 0.0, 1.0) + damping)
    root, singular = torch.linalg.cholesky_ex(hessian)
    U, inverse_singular = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
    if int(singular) or int(inverse_singular):
        raise NumericalError(
            f"X Xᵀ + λ I is singular at damping={damping}; choose a larger one, or calibrate on more tokens"
        )
    upper: Tensor = U / mean**0.5
    return upper


@dataclass(frozen=True)
class Measurement:
    """A layer whose spectrum is known and whose rank is not yet decided.

    Attributes:
        layer: which layer.
        factorization: of the part that becomes low rank.
        sparse, kept, weight: layout, size and values of the part that is kept as it is (none, rows or columns).
        scores: learned importance of the components, (k,), falling; None if they stand in order of energy.
        bias: learned deviation that is added to the output, (m,).
    """

    layer: Layer
    factorization: Factorization
    sparse: str = "none"
    kept: int = 0
    weight: Tensor | None = None
    scores: Tensor | None = None
    bias: Tensor | None = None

    def require_scores(self) -> Tensor:
        """The learned scores; an error before they are learned."""
        if self.scores is None:
            raise CompressionError(f"{self.layer.name}: its spectrum has no learned scores yet; call `learned` first")
        return self.scores

    @property
    def spec(self) -> LayerSpec:
        """What is stored at rank 0."""
        return LayerSpec(sparse=self.sparse, kept=self.kept, bias=self.bias is not None)

    def truncate(self, rank: int) -> Decomposition:
        """The decomposition that keeps the first `rank` components."""
        if rank == 0:
            return Decomposition(sparse=self.sparse, weight=self.weight, bias=self.bias)
        a, b = self.factorization.truncate(rank)
        return Decomposition(sparse=self.sparse, weight=self.weight, lowrank_a=a, lowrank_b=b, bias=self.bias)


class SpectralMethod(Method):
    """A method that measures the spectra of all layers first and decides on their ranks after."""

    strategy: ClassVar[str] = "spectral"

    def measure(self, layer: Layer, weight: Tensor, statistics: Statistics) -> Measurement:
        """Factorize one weight (m, n), float64; by default whitened, all of it."""
        return Measurement(
            layer, factorize(weight, statistics.require("gram", self.name) if self.needs_gram else None)
        )

    def allocate(
        self, measurements: dict[str, Measurement], budget: ModelBudget, available: int
    ) -> dict[str, int | None]:
        """The rank of each layer, None where it stays dense, together within `available` bits."""
        raise NotImplementedError

    def decompose(self, weight: Tensor, statistics: Statistics, budget: Budget) -> Decomposition:
        """One layer by itself, at the largest rank that its budget allows."""
        m, n = weight.shape
        if self.needs_gram:
            statistics.require("gram", self.name)
        measurement = self.measure(Layer("layer", 0, 1, "other", m, n), weight, statistics)
        rank = budget.rank(measurement.spec)
        if rank < 1:
            raise too_small(self.name, budget)
        return measurement.truncate(rank)


def _first_guess(matrix: Tensor, rank: int) -> Tensor:
    guess = torch.rand(rank, matrix.shape[1], dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).to(
        matrix.device
    )
    guess[0] = (
        matrix.sum(dim=0) + torch.finfo(matrix.dtype).tiny
    )  # close to the first right singular vector of a non-negative matrix
    return guess


def _normalized(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)


def prices(
    measurements: dict[str, Measurement], budget: ModelBudget
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Bits of one rank, of the dense layer, and of the parts beside the low rank, by layer."""
    fixed = {name: budget.stored_bits(m.layer, m.spec) for name, m in measurements.items()}
    price = {
        name: budget.stored_bits(m.layer, replace(m.spec, rank=1)) - fixed[name] for name, m in measurements.items()
    }
    dense_price = {name: budget.dense_bits(m.layer) - budget.bias_bits[name] for name, m in measurements.items()}
    return price, dense_price, fixed
