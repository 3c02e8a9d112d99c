"""SoCo: learn which components of every spectrum to keep, end to end, in three phases (arXiv 2502.15092).

The paper gives the idea and the phases, no constants; those here are ours (papers §2.3, §9).
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer, ModelBudget
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError
from .allocation import greedy_ranks
from .base import Statistics
from .registry import register_method
from .spectral import Factorization, Measurement, SpectralMethod, factorize, prices

THRESHOLD = 0.5
"""τ: components whose score is under it are on their way out."""
EXPLORATION, OSCILLATION = 0.3, 0.4
"""BudgetShares of the steps of phases 1 and 2; the rest is phase 3."""


@dataclass(frozen=True)
class Phase:
    """What is active at one step.

    Attributes:
        number: 1 exploration, 2 oscillation, 3 decision.
        temperature: T of the gates.
        polarization: λ_p of L_pol.
        hard: whether the forward uses the hard mask s > τ, with straight-through gradients.
    """

    number: int
    temperature: float
    polarization: float
    hard: bool


@register_method("soco")
@dataclass
class SoCo(SpectralMethod):
    """Learned spectrum: scores for all singular components, trained against the dense model under one global budget."""

    steps: int = field(default=400, metadata={"help": "training steps of the three phases together"})
    batch_tokens: int = field(default=1024, metadata={"help": "tokens per training step"})
    learning_rate: float = field(default=0.02, metadata={"help": "Adam's learning rate for the scores"})
    deviation_rate: float = field(default=0.001, metadata={"help": "Adam's learning rate for the deviation term"})
    base: str = field(
        default="whitened", metadata={"help": "'whitened' or 'plain' singular value decomposition to start from"}
    )
    deviation: bool = field(default=True, metadata={"help": "learn the deviation term d, stored as a bias"})
    loss: str = field(
        default="kl", metadata={"help": "L_inc: 'kl' to the dense model, or 'cross_entropy' on the calibration text"}
    )
    decrease: float = field(default=1.0, metadata={"help": "λ_d: norm of L_dec's gradient relative to L_inc's"})
    finish_steps: int = field(
        default=40, metadata={"help": "steps that re-fit scores and deviation after the final cut"}
    )

    source: ClassVar[str] = "SoCo, arXiv 2502.15092"
    needs_gram: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, choices in (("base", ("whitened", "plain")), ("loss", ("kl", "cross_entropy"))):
            if getattr(self, name) not in choices:
                raise CompressionError(
                    f"soco: {name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, choices))}"
                )
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise CompressionError(f"soco: {name} is {getattr(self, name)}, expected at least 1")

    def measure(self, layer: Layer, weight: Tensor, statistics: Statistics) -> Measurement:
        return Measurement(layer, factorize(weight, statistics.gram if self.base == "whitened" else None))

    def min_spec(self, layer: Layer) -> LayerSpec:
        return LayerSpec(bias=self.deviation)

    def allocate(
        self, measurements: dict[str, Measurement], budget: ModelBudget, available: int
    ) -> dict[str, int | None]:
        """Keep the components of the largest scores, whatever their energy, until the budget is met."""
        price, dense_price, fixed = prices(measurements, budget)
        by_score = {name: (m.require_scores() * price[name]).tolist() for name, m in measurements.items()}
        return greedy_ranks(by_score, price, dense_price, fixed, available)

    def explored(self, step: int) -> float:
        """How far phase 1 has come, 0 to 1; the target of ρ rises with it, so that the pace does not depend on λ_d."""
        return min(step / (EXPLORATION * self.steps), 1.0)

    def phase(self, step: int) -> Phase:
        """The schedule (papers §2.3): T falls from 0.1 to 0.02 over phase 3, where λ_p rises from 0 to 1."""
        done = step / self.steps
        if done < EXPLORATION + OSCILLATION:
            return Phase(1 if done < EXPLORATION else 2, temperature=0.1, polarization=0.0, hard=False)
        decided = (done - EXPLORATION - OSCILLATION) / (1 - EXPLORATION - OSCILLATION)
        return Phase(3, temperature=0.1 * (0.02 / 0.1) ** decided, polarization=decided, hard=True)


def learned(measurement: Measurement, scores: Tensor, deviation: Tensor | None) -> Measurement:
    """The measurement with scores (k,) folded into its spectrum, components in order of falling score."""
    order = scores.argsort(descending=True, stable=True)
    old = measurement.factorization
    spectrum = Factorization(old.left[:, order], (old.sigma * scores)[order], old.right[order])
    return replace(measurement, factorization=spectrum, scores=scores[order], bias=deviation)


def score(a: Tensor) -> Tensor:
    """s = 2 σ(a): 1 at a = 0, the dense model; up to 2, so that kept components may be amplified."""
    return 2 * torch.sigmoid(a)


def gate(s: Tensor, temperature: float) -> Tensor:
    """g = σ((s − τ) / T): how much a component counts as kept."""
    return torch.sigmoid((s - THRESHOLD) / temperature)


def effective_score(s: Tensor, phase: Phase) -> Tensor:
    """s̃, by which the forward multiplies σ: s g in phases 1 and 2, s [s > τ] with the gradient of s g in phase 3."""
    soft = s * gate(s, phase.temperature)
    if not phase.hard:
        return soft
    return soft + (s * (s > THRESHOLD) - soft).detach()


def polarization(g: Tensor) -> Tensor:
    """L_pol = mean 4 g (1 − g): zero when every component is decided."""
    return (4 * g * (1 - g)).mean()
