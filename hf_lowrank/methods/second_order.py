"""Steps that lower ‖(W − Ŵ) X‖² = Σ_i d_i C d_iᵀ, d_i the rows of W − Ŵ and C = X Xᵀ the Gram matrix of the inputs."""

import torch
from torch import Tensor

from .sparsity import largest_per_row

DAMPING = 1e-3
"""Added to the diagonal of C, as a share of its mean."""
JITTER = 1e-9
"""The same for a small system that is solved, relative to its own diagonal."""
RESIDUAL = 1e-5
"""Of least squares by conjugate gradients, relative to the right side; the error it leaves is the square of that."""
ROUGH_RESIDUAL = 1e-2
"""The same where values are only tried out."""
LARGEST_STEPS = 100
"""Of conjugate gradients."""
SAMPLED_ROWS = 128
"""Of a layer, on which losses are estimated before the budget is spread."""

COLUMNS_AT_ONCE = 32
"""Of descent over columns: errors are brought up to date within them one by one, beyond them together."""

# ADMM with a growing penalty, after 3BASiL (papers §4); C has a diagonal of ones.
ADMM_STEPS = 20
FIRST_PENALTY = 0.1
PENALTY_GROWTH = 1.4
STEPS_PER_PENALTY = 3


def damped(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(C + λ I) scaled to a diagonal of ones, (n, n), and the scale d (n,) that does it; the identity for C = 0. Relative to the mean."""
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not float(mean) > 0:
        return eye, gram.new_ones(len(gram))
    d = (gram.diagonal() + DAMPING * mean).sqrt()
    return (gram + DAMPING * mean * eye) / torch.outer(d, d), d


def output_weights(gram: Tensor | None, features: int) -> Tensor:
    """What the squared error of each output counts, (m,): the diagonal of the output Gram matrix, damped; ones without one."""
    if gram is None or not float(mean := gram.diagonal().mean()) > 0:
        return torch.ones(features, dtype=torch.float64, device=None if gram is None else gram.device)
    return gram.diagonal() + 0.1 * mean


def sampled_rows(weight: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """At most `SAMPLED_ROWS` rows of `weight` (m, n), evenly spread, and their weights, scaled to the sum of all (m,)."""
    sample = slice(None, None, -(-weight.shape[0] // SAMPLED_ROWS))
    some = row_weights[sample]
    return weight[sample], some * (row_weights.sum() / some.sum())


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """d C dᵀ of every row d of `difference` (m, n), (m,)."""
    return ((difference @ gram) * difference).sum(dim=1)


def refit_values(
    target: Tensor, gram: Tensor, mask: Tensor, start: Tensor | None = None, rough: bool = False
) -> Tensor:
    """The values S (m, n), zero off the mask, that minimise Σ_i (r_i − s_i) C (r_i − s_i)ᵀ: C_MM s_M = (C r)_M in every row.

    Conjugate gradients on all rows at once: a product with C each step, where every row's own system would have to be factorized. First in
    float32, which is half the work, then, unless a `rough` solution will do, in the target's own precision until the residual is met there.

    Args:
        target: R, (m, n).
        gram: C, positive definite with a diagonal of ones, which is what preconditions it.
        start: values to begin with.
    """
    S = torch.zeros_like(target) if start is None else torch.where(mask, start, 0.0)
    right = torch.where(mask, target @ gram, 0.0)
    near = _conjugate_gradients(
        right.float(), gram.float(), mask, S.float(), ROUGH_RESIDUAL if rough else RESIDUAL
    ).to(target)
    return near if rough else _conjugate_gradients(right, gram, mask, near, RESIDUAL)


def _conjugate_gradients(right: Tensor, gram: Tensor, mask: Tensor, start: Tensor, residual: float) -> Tensor:
    """S, zero off the mask, with C_MM s_M = `right` in every row up to `residual` of all rows together."""
    S = start
    r = right - torch.where(mask, S @ gram, 0.0)
    wanted = residual**2 * right.square().sum()
    tiny = torch.finfo(right.dtype).tiny
    p, energy = r, r.square().sum(dim=1, keepdim=True)
    for _ in range(LARGEST_STEPS):
        if not bool(energy.sum() > wanted):
            break
        q = torch.where(mask, p @ gram, 0.0)
        step = energy / (p * q).sum(dim=1, keepdim=True).clamp(min=tiny)
        S, r = S + step * p, r - step * q
        before, energy = energy, r.square().sum(dim=1, keepdim=True)
        p = r + energy / before.clamp(min=tiny) * p
    return S


def eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), not below zero, and eigenvectors (n, n) of a Gram matrix, in float32 for `admm_support`."""
    energies, Q = torch.linalg.eigh(gram)
    return energies.clamp(min=0).float(), Q.float()


def admm_support(target: Tensor, gram: Tensor, eigen: tuple[Tensor, Tensor], kept: int, start: Tensor) -> Tensor:
    """A mask (m, n) of `kept` entries per row on which `target` (m, n) is well approximated in the metric of `gram`.

    ADMM over S = D, S free and D sparse: S ← (C + ρI)⁻¹(C R − V + ρ D), D ← the largest of S + V/ρ, V ← V + ρ (S − D); ρ grows until
    the support stands. The eigenvectors of C serve every ρ. Steps in float32: the values are solved for afterwards.

    Args:
        eigen: what `eigenvectors` gives for `gram`.
    """
    energies, Q = eigen
    right, D, rho = (target @ gram).float(), start.float(), FIRST_PENALTY
    V, mask = torch.zeros_like(D), start != 0
    for step in range(1, ADMM_STEPS + 1):
        S = ((right - V).add_(D, alpha=rho) @ Q).div_(energies + rho) @ Q.T
        Z = V.div(rho).add_(S)
        mask = largest_per_row(Z.abs(), kept)
        D = Z * mask
        V.add_(S.sub_(D), alpha=rho)
        if step % STEPS_PER_PENALTY == 0:
            rho *= PENALTY_GROWTH
    return mask


def sign_descent(target: Tensor, gram: Tensor, signs: Tensor, magnitudes: Tensor) -> Tensor:
    """One pass over the columns of ±1 (m, n): each sign is flipped where that alone lowers the error of `target` − magnitudes ⊙ signs.

    Flips are subtracted from the errors of their own block of columns at once, from those of the columns behind it together.
    """
    E = ((target - magnitudes * signs) @ gram).float().T.contiguous()  # columns as rows, which lie together
    B, M, C = signs.float().T.contiguous(), magnitudes.float().T.contiguous(), gram.float()
    for start in range(0, len(C), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(C))
        steps = -2 * M[start:end] * B[start:end]
        for j, step in enumerate(steps, start):
            step *= 2 * step * E[j] > step.square() * C[j, j]
            E[j:end] -= torch.outer(C[j:end, j], step)
        B[start:end] = torch.where(steps == 0, B[start:end], -B[start:end])
        E[end:] -= C[end:, start:end] @ steps
    return B.T.to(signs)


def refit_scales(
    target: Tensor, gram: Tensor, signs: Tensor, scale_in: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u (m,) and v (n,) by least squares in turn, twice: target (m, n) ≈ (u vᵀ) ⊙ B, rows weighted.

    For given v: u_i = (p_i C r_iᵀ) / (p_i C p_iᵀ) with p_i = b_i ⊙ v. For given u: (C ⊙ Bᵀ diag(ω u²) B) v = Σ_i ω_i u_i b_i ⊙ (C r_i).
    """
    weights = target.new_ones(len(target)) if row_weights is None else row_weights / row_weights.mean()
    right, v = target @ gram, scale_in
    tiny = torch.finfo(target.dtype).tiny
    for _ in range(2):
        P = signs * v
        u = (P * right).sum(dim=1) / row_errors(P, gram).clamp(min=tiny)
        system = gram * (signs.T @ (signs * (weights * u.square())[:, None]))
        mean = system.diagonal().mean()
        if not float(mean) > 0:
            return u, v
        system = system / mean + JITTER * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        v = torch.linalg.solve(system, (signs * right * (weights * u)[:, None]).sum(dim=0) / mean)
    balance = (v.norm() / u.norm().clamp(min=tiny)).sqrt()  # both carry the same share of the scale
    return (u * balance, v / balance) if float(balance) > 0 else (u, v)
