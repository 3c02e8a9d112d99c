"""Whitened low rank: the factorization that SVD-LLM, SoLA and SoCo stand on.

With C = Σ x xᵀ = S Sᵀ and the SVD  W S = U Σ Vᵀ, keeping r components of  W = U Σ (Vᵀ S⁻¹)  loses exactly
‖(W − W_r) X‖² = Σ_{i>r} σ_i²  on the calibration tokens (papers: SVD-LLM, theorem 1; SoLA §1.2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_JITTERS = tuple(10.0**exponent for exponent in range(-10, -5))
SMALLEST_EIGENVALUE = 1e-10
"""Relative to the largest one; smaller ones are raised to it in the fallback."""


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


def gram_error(difference: Tensor, gram: Tensor) -> float:
    """‖D X‖² = tr(D C Dᵀ) for D (m, n) and C = X Xᵀ."""
    return float(((difference @ gram) * difference).sum())
