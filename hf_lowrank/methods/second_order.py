"""Steps that lower ‖(W − Ŵ) X‖² = Σ_i d_i C d_iᵀ, with d_i the rows of W − Ŵ and C = X Xᵀ.

They work on a Gram matrix that is `damped`: positive definite, with a diagonal of ones.
"""

import torch
from torch import Tensor

from .sparsity import largest_per_row

DAMPING = 1e-3
"""λ that is added to the diagonal of C, as a share of its mean."""

SHRINKAGE = 0.1
"""Share by which the correlations of inputs are shrunk for T → ∞. With few tokens they are shrunk further."""

JITTER = 1e-9
"""The share of its mean diagonal that is added to the diagonal of a small system before it is solved."""

RESIDUAL = 1e-5
"""Residual at which conjugate gradients stop, relative to the right side. The error that it leaves is its square."""

ROUGH_RESIDUAL = 1e-2
"""Residual at which conjugate gradients stop where values are only tried out."""

LARGEST_STEPS = 100
"""Maximum number of steps of conjugate gradients."""

SAMPLED_ROWS = 128
"""Maximum number of rows of a layer on which losses are estimated before the budget is spread."""

COLUMNS_AT_ONCE = 32
"""Columns in a block of coordinate descent. Errors are updated one by one within a block, and together beyond it."""

OUTPUT_WEIGHT_DAMPING = 0.1
"""Share of the mean of the output Gram matrix's diagonal that is added to it, so that every output counts."""

# ADMM with a penalty ρ that grows, after 3BASiL (arXiv 2603.01376). Values are for a C with a diagonal of ones.
ADMM_STEPS = 20
FIRST_PENALTY = 0.1
PENALTY_GROWTH = 1.4
STEPS_PER_PENALTY = 3


def shrunk(gram: Tensor, tokens: int) -> Tensor:
    """Return C (n, n) with every entry off its diagonal made smaller, by `SHRINKAGE` and by the noise of few tokens.

    A fit to C itself spends what it has on correlations that the calibration has by chance, or that other text lacks.
    """
    noise = len(gram) / max(tokens, 1)
    kept = (1 - SHRINKAGE) / (1 + noise)
    result = gram * kept
    result.diagonal().copy_(gram.diagonal())
    return result


def damped(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return (C + λ I) scaled to a diagonal of ones, (n, n), and the scale d (n,) that does it.

    For C = 0 they are the identity and ones.
    """
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not float(mean) > 0:
        return eye, gram.new_ones(len(gram))
    # λ makes C definite where there are fewer tokens than channels, and gives dead channels a scale.
    d = (gram.diagonal() + DAMPING * mean).sqrt()
    return (gram + DAMPING * mean * eye) / torch.outer(d, d), d


def output_weights(gram: Tensor | None, features: int) -> Tensor:
    """Return the weights (m,) of the squared errors of the outputs: the damped diagonal of G, or ones without a G."""
    if gram is None:
        return torch.ones(features, dtype=torch.float64)
    mean = gram.diagonal().mean()
    if not float(mean) > 0:
        return torch.ones(features, dtype=torch.float64, device=gram.device)
    return gram.diagonal() + OUTPUT_WEIGHT_DAMPING * mean


def sampled_rows(weight: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most `SAMPLED_ROWS` rows of `weight` (m, n), evenly spread, and their weights.

    The weights are scaled so that their sum equals the sum of all `row_weights` (m,).
    """
    stride = -(-weight.shape[0] // SAMPLED_ROWS)
    sample_weights = row_weights[::stride]
    return weight[::stride], sample_weights * (row_weights.sum() / sample_weights.sum())


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Return d C dᵀ of every row d of `difference` (m, n), (m,)."""
    return ((difference @ gram) * difference).sum(dim=1)


def refit_values(
    target: Tensor, gram: Tensor, mask: Tensor, start: Tensor | None = None, rough: bool = False
) -> Tensor:
    """Return the S (m, n), zero off the mask, that minimizes Σ_i (r_i − s_i) C (r_i − s_i)ᵀ.

    In every row C_MM s_M = (C r)_M. Conjugate gradients work on all rows at once. A step is one product with C, where
    otherwise every row's own system would have to be factorized.

    Args:
        target: R, (m, n).
        gram: C, positive definite with a diagonal of ones, which preconditions it.
        start: values to begin with.
        rough: whether a rough solution will do.
    """
    if start is None:
        S = torch.zeros_like(target)
    else:
        S = torch.where(mask, start, 0.0)
    right = torch.where(mask, target @ gram, 0.0)
    residual = RESIDUAL
    if rough:
        residual = ROUGH_RESIDUAL
    # The first solution is in float32, which is half the work. The second is in the target's own precision, and goes
    # on until the residual is met there.
    near = _conjugate_gradients(right.float(), gram.float(), mask, S.float(), residual).to(target)
    if rough:
        return near
    return _conjugate_gradients(right, gram, mask, near, residual)


def _conjugate_gradients(right: Tensor, gram: Tensor, mask: Tensor, start: Tensor, residual: float) -> Tensor:
    """Return the S, zero off the mask, with C_MM s_M = `right` in every row, up to `residual` of all rows together."""
    S = start
    kept = mask.to(right)  # a product with it takes a fraction of the time of `torch.where`
    r = right - (S @ gram).mul_(kept)
    tolerance = residual**2 * right.square().sum()
    tiny = torch.finfo(right.dtype).tiny  # for rows that are solved, whose p and energy are zero
    p, energy = r, r.square().sum(dim=1, keepdim=True)
    # Every row has step lengths of its own, all rows share the products with C and the stopping rule.
    for _ in range(LARGEST_STEPS):
        if not bool(energy.sum() > tolerance):
            break
        q = (p @ gram).mul_(kept)
        step = energy / (p * q).sum(dim=1, keepdim=True).clamp(min=tiny)
        S, r = S + step * p, r - step * q
        last_energy, energy = energy, r.square().sum(dim=1, keepdim=True)
        p = r + energy / last_energy.clamp(min=tiny) * p
    return S


def eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (n,), not below zero, and eigenvectors (n, n) of a Gram matrix, in float32."""
    energies, Q = torch.linalg.eigh(gram)
    return energies.clamp(min=0).float(), Q.float()


def admm_support(target: Tensor, gram: Tensor, eigen: tuple[Tensor, Tensor], kept: int, start: Tensor) -> Tensor:
    """Return a mask (m, n) of `kept` entries per row on which `target` (m, n) is well approximated under `gram`.

    ADMM over S = D, S free and D sparse, is the sparse step of 3BASiL (arXiv 2603.01376) without its low-rank block:

        S ← (C + ρI)⁻¹(C R − V + ρ D),   D ← the largest of S + V/ρ,   V ← V + ρ (S − D).

    ρ grows, which settles the support. The eigenvectors of C serve every ρ. Steps are in float32, as the values are
    solved for afterwards.

    Args:
        eigen: the result of `eigenvectors` for `gram`.
        start: D to begin with, (m, n).
    """
    energies, Q = eigen
    right, D, rho = (target @ gram).float(), start.float(), FIRST_PENALTY
    V, mask = torch.zeros_like(D), start != 0
    for step in range(1, ADMM_STEPS + 1):
        # Work is done in place where it can be, as each of these matrices is as large as the layer.
        S = ((right - V).add_(D, alpha=rho) @ Q).div_(energies + rho) @ Q.T
        Z = V.div(rho).add_(S)
        mask = largest_per_row(Z.abs(), kept)
        D = Z * mask
        V.add_(S.sub_(D), alpha=rho)
        if step % STEPS_PER_PENALTY == 0:
            rho *= PENALTY_GROWTH
    return mask


def sign_descent(target: Tensor, gram: Tensor, signs: Tensor, magnitudes: Tensor) -> Tensor:
    """Return signs ±1 (m, n) after one pass over the columns that flips each sign where that alone lowers the error.

    The error is `target` − magnitudes ⊙ signs. Flips are subtracted at once from the errors of their own block of
    columns, and together from the errors of the columns after it.
    """
    # The matrices are transposed: a column of the problem is a row here, which lies together in memory.
    E = ((target - magnitudes * signs) @ gram).float().T.contiguous()
    B, M, C = signs.float().T.contiguous(), magnitudes.float().T.contiguous(), gram.float()
    for start in range(0, len(C), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(C))
        steps = -2 * M[start:end] * B[start:end]  # how a flip changes the entry of M ⊙ B
        for j, step in enumerate(steps, start):
            # A step δ of one entry changes the squared error by δ² C_jj − 2 δ E_j. Those that would raise it become 0.
            step *= 2 * step * E[j] > step.square() * C[j, j]
            E[j:end] -= torch.outer(C[j:end, j], step)
        B[start:end] = torch.where(steps == 0, B[start:end], -B[start:end])
        # One product for all columns after the block is much faster than an update for each flip.
        E[end:] -= C[end:, start:end] @ steps
    return B.T.to(signs)


def refit_scales(
    target: Tensor, gram: Tensor, signs: Tensor, scale_in: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return u (m,) and v (n,) with target (m, n) ≈ (u vᵀ) ⊙ B by least squares in turn, twice, with weighted rows.

    With p_i = b_i ⊙ v the two steps are

        for given v:   u_i = (p_i C r_iᵀ) / (p_i C p_iᵀ),
        for given u:   (C ⊙ Bᵀ diag(ω u²) B) v = Σ_i ω_i u_i b_i ⊙ (C r_i).

    Args:
        signs: B, ±1, (m, n).
        scale_in: v to begin with.
        row_weights: ω, (m,); all rows count alike without them.
    """
    weights = target.new_ones(len(target))
    if row_weights is not None:
        weights = row_weights / row_weights.mean()
    right, v = target @ gram, scale_in
    tiny = torch.finfo(target.dtype).tiny
    for _ in range(2):
        P = signs * v
        u = (P * right).sum(dim=1) / row_errors(P, gram).clamp(min=tiny)
        system = gram * (signs.T @ (signs * (weights * u.square())[:, None]))
        mean = system.diagonal().mean()
        if not float(mean) > 0:  # u is zero, and any v will do
            return u, v
        system = system / mean + JITTER * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        v = torch.linalg.solve(system, (signs * right * (weights * u)[:, None]).sum(dim=0) / mean)
    balance = (v.norm() / u.norm().clamp(min=tiny)).sqrt()  # so that both carry the same share of the scale
    if not float(balance) > 0:
        return u, v
    return u * balance, v / balance
