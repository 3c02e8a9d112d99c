"""The linear algebra of the methods: whitened and leading singular vectors, roots of Gram matrices.

SVD-LLM, SoLA and SoCo stand on truncation-aware whitening (SVD-LLM, arXiv 2403.07378). With C = Σ x xᵀ = S Sᵀ and the
SVD W S = U Σ Vᵀ, keeping r components of W = U Σ (Vᵀ S⁻¹) loses exactly ‖(W − W_r) X‖² = Σ_{i>r} σ_i² on the
calibration tokens. So the order in which components are truncated is optimal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.linears import row_chunks
from ..runtime.errors import NumericalError

RELATIVE_JITTERS = tuple(10.0**exponent for exponent in range(-10, -5))
"""Shares of the mean diagonal that are added to a Gram matrix, in turn, until it has a Cholesky factor."""

SMALLEST_EIGENVALUE = 1e-10
"""Share of the largest eigenvalue to which smaller ones are raised where no jitter gives a Cholesky factor."""

POWER_ITERATIONS = 4
"""Number of power iterations in one call of `leading_components`.

Methods that alternate start each call from the vectors of the last one. They end where they would with full
decompositions.
"""


@dataclass(frozen=True)
class Factorization:
    """W = left · diag(sigma) · right, its components in order of falling energy.

    Attributes:
        left: U, (m, k), orthonormal columns.
        sigma: singular values in the calibration metric, (k,), falling.
        right: Vᵀ S⁻¹, (k, n).
    """

    left: Tensor
    sigma: Tensor
    right: Tensor

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A = Σ_r^½ V_rᵀ S⁻¹, (r, n), and B = U_r Σ_r^½, (m, r). Both carry the same share of the scale."""
        root = self.sigma[:rank].sqrt()
        return root[:, None] * self.right[:rank], self.left[:, :rank] * root


def factorize(weight: Tensor, gram: Tensor | None = None) -> Factorization:
    """Return the whitened SVD of `weight` (m, n) for a Gram matrix (n, n), or else the plain SVD. Both are float64."""
    # A Gram matrix of zeros says that no token reached the layer: all inputs count alike.
    if gram is None or not bool(gram.diagonal().any()):
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        return Factorization(left, sigma, right)
    S, is_triangular = matrix_root(gram)
    left, sigma, right = torch.linalg.svd(weight @ S, full_matrices=False)
    # Vᵀ S⁻¹ by solving for it, which is more accurate than an inverse.
    if is_triangular:
        unwhitened = torch.linalg.solve_triangular(S, right, upper=False, left=False)
    else:
        unwhitened = torch.linalg.solve(S, right, left=False)
    return Factorization(left, sigma, unwhitened)


def whitened_factors(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (m, r), of the same scale, that minimize ‖(W − B A) X‖_F.

    It takes the memory of C and of little more than W. With the SVD W S = U Σ Vᵀ the best approximation is

        U_r U_rᵀ W = W S V_r V_rᵀ S⁻¹.

    U are the eigenvectors of W C Wᵀ (m, m), V those of Sᵀ Wᵀ W S (n, n). The smaller of the two is decomposed.
    Eigenvalues are squares of singular values, so components under 1e-8 of the largest are not told apart. Together
    they lose no more than rounding the factors to 16 bits does.
    """
    # No token reached the layer: all inputs count alike.
    if not bool(gram.diagonal().any()):
        return factorize(weight).truncate(rank)
    m, n = weight.shape
    if m <= n:
        energy = _output_energy(weight, gram)
        # `eigh` sorts eigenvalues upward, so the leading vectors are the last ones, in reverse.
        b = torch.linalg.eigh(energy).eigenvectors[:, -rank:].flip(1)
        a = b.T @ weight
    else:
        S, is_triangular = matrix_root(gram)
        V = torch.linalg.eigh(S.T @ (weight.T @ weight) @ S).eigenvectors[:, -rank:].flip(1)
        b = weight @ (S @ V)
        if is_triangular:
            a = torch.linalg.solve_triangular(S.T, V, upper=True).T
        else:
            a = torch.linalg.solve(S.T, V).T
    # Each factor carries half of a component's scale, so that both fit the range of 16 bits.
    scale = (a.norm(dim=1) / b.norm(dim=0)).clamp(min=torch.finfo(a.dtype).tiny).sqrt()
    return a / scale[:, None], b * scale


def whitened_energies(weight: Tensor, gram: Tensor) -> Tensor:
    """Return σ², (min(m, n),), rising, of the spectrum of W S with C = S Sᵀ, of W itself for C = 0.

    They are eigenvalues of the smaller of the two matrices of which `whitened_factors` takes eigenvectors.
    """
    if not bool(gram.diagonal().any()):
        energy = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    elif weight.shape[0] <= weight.shape[1]:
        energy = _output_energy(weight, gram)
    else:
        S, _ = matrix_root(gram)
        energy = S.T @ (weight.T @ weight) @ S
    return torch.linalg.eigvalsh(energy).clamp(min=0)


def _output_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """Return W (C + λ I) Wᵀ (m, m), with only the lower triangle filled, as `eigh` reads no more than that."""
    jitter = RELATIVE_JITTERS[0] * gram.diagonal().mean()  # decides by W itself where no token reaches
    energy = weight.new_zeros(weight.shape[0], weight.shape[0])
    for rows in row_chunks(weight):
        part = (weight[rows] @ gram).add_(weight[rows], alpha=float(jitter))
        energy[rows, : rows.stop] = part @ weight[: rows.stop].T
    return energy


def matrix_root(gram: Tensor) -> tuple[Tensor, bool]:
    """Return S with C ≈ S Sᵀ, and whether it is lower triangular.

    Cholesky is tried with a relative jitter, from 1e-10 of the mean diagonal upward until it succeeds. If none is
    enough, S comes from the eigen-decomposition, with small eigenvalues raised to 1e-10 of the largest one. Dead
    channels and fewer tokens than channels are regular cases.
    """
    # The jitter is relative, so that the result does not depend on the scale of the inputs.
    mean_diagonal = gram.diagonal().mean()
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    for jitter in RELATIVE_JITTERS:
        root, failed = torch.linalg.cholesky_ex(gram + jitter * mean_diagonal * identity)
        if not int(failed):
            return root, True
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return eigenvectors * eigenvalues.clamp(min=SMALLEST_EIGENVALUE * float(eigenvalues[-1])).sqrt(), False


def inverse_cholesky(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with (C + λ I)⁻¹ = Uᵀ U, λ = `damping` · mean C_jj.

    The mean is over the channels that are not dead. A dead channel gets this mean on its diagonal.

    Raises:
        NumericalError: if C + λ I is singular in float64.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    mean = 1.0
    if bool(alive.any()):
        mean = float(diagonal[alive].mean())
    # Divided by the mean, so that λ becomes `damping` itself and the scale of the inputs plays no part.
    hessian = gram / mean + torch.diag(torch.where(alive, 0.0, 1.0) + damping)
    root, singular = torch.linalg.cholesky_ex(hessian)
    U, inverse_singular = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
    if int(singular) or int(inverse_singular):
        raise NumericalError(
            f"X Xᵀ + λ I is singular at damping={damping}; choose a larger one, or calibrate on more tokens"
        )
    unscaled: Tensor = U / mean**0.5
    return unscaled


def leading_components(matrix: Tensor, rank: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return U (m, r) and V (r, n) with U V ≈ the best rank-r approximation of `matrix` (m, n), by power iteration.

    U carries half of the scale of each component, so that both fit a 16-bit range. A non-negative matrix has U, V ≥ 0
    at rank 1.

    Args:
        start: V (r, n) to begin with, from an earlier call on a matrix that differs little.
    """
    V = start
    if V is None:
        V = _random_start(matrix, rank)
    for _ in range(POWER_ITERATIONS):
        if rank > 1:
            Q = torch.linalg.qr(matrix @ V.T).Q
        else:
            # For one column QR is a division by its norm, up to the sign. Without QR a non-negative U stays so.
            Q = _normalized_columns(matrix @ V.T)
        V = Q.T @ matrix  # (r, n): Q V is the projection of the matrix onto the span of Q
    scale = V.norm(dim=1).clamp(min=torch.finfo(V.dtype).tiny).sqrt()
    return Q * scale, V / scale[:, None]


def _random_start(matrix: Tensor, rank: int) -> Tensor:
    """Return the same random V (r, n) at every call, in the first row the sums of the columns of `matrix` (m, n)."""
    generator = torch.Generator().manual_seed(0)
    V = torch.rand(rank, matrix.shape[1], dtype=matrix.dtype, generator=generator).to(matrix.device)
    # The sums of the columns are close to the first right singular vector of a non-negative matrix.
    V[0] = matrix.sum(dim=0) + torch.finfo(matrix.dtype).tiny
    return V


def _normalized_columns(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=0).clamp(min=torch.finfo(matrix.dtype).tiny)
