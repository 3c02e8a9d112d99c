"""SoCo: learn which components of every spectrum to keep, end to end, in three phases (arXiv 2502.15092).

A weight W = U Σ Vᵀ becomes U (Σ S) Vᵀ, with S a diagonal of learned importance scores s, one for each singular
component. Scores above 1 amplify the components that are kept and so make up for those that are removed. This file
holds the formulas. The training loop, in `compression/soco_training.py`, follows the gradients of three terms:

- L_inc, the KL divergence to the dense model or the cross entropy on the text;
- L_dec = max(0, R − ρ), with ρ the removed ratio that the gates stand for and R its target, scaled to λ_d times the
  norm of L_inc's;
- L_pol, which drives the scores to either side of the threshold, scaled to λ_p times that norm.

The paper gives the scores and the phases. It gives no constants, no schedule and no range of the scores: those here
are ours.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Layer, ModelBudget
from ..runtime.configuration import LayerSpec
from ..runtime.errors import CompressionError, quoted
from .allocation import greedy_ranks
from .base import Statistics
from .factorization import Factorization, factorize
from .registry import register_method
from .spectral import Measurement, SpectralMethod, prices

THRESHOLD = 0.5
"""τ: components with a score below it are on their way out."""

EXPLORATION = 0.3
"""Share of the steps in phase 1."""

OSCILLATION = 0.4
"""Share of the steps in phase 2. The rest is phase 3."""

TEMPERATURE = 0.1
"""T of the gates in phases 1 and 2, and at the start of phase 3."""

LAST_TEMPERATURE = 0.02
"""T of the gates at the end of phase 3."""


@dataclass(frozen=True)
class Phase:
    """The terms that are active at one step of the training.

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
    """Learned spectrum: scores for all singular components, trained against the dense model under one budget."""

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
    trains: ClassVar[bool] = True
    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, allowed in (("base", ("whitened", "plain")), ("loss", ("kl", "cross_entropy"))):
            if getattr(self, name) not in allowed:
                raise CompressionError(
                    f"soco: {name} is {quoted(getattr(self, name))}, expected {' or '.join(map(repr, allowed))}"
                )
        for name in ("steps", "batch_tokens"):
            if getattr(self, name) < 1:
                raise CompressionError(f"soco: {name} is {getattr(self, name)}, expected at least 1")

    @property
    def reads_next_tokens(self) -> bool:
        """Whether `loss` is the cross-entropy on the text."""
        return self.loss == "cross_entropy"

    def measure(self, layer: Layer, weight: Tensor, statistics: Statistics) -> Measurement:
        """Factorize the whole weight, whitened or plain as `base` says."""
        # Whitening starts the scores from the order of components that is optimal layer by layer.
        gram = None
        if self.base == "whitened":
            gram = statistics.gram
        return Measurement(layer, factorize(weight, gram))

    def min_spec(self, layer: Layer) -> LayerSpec:
        return LayerSpec(bias=self.deviation)

    def allocate(
        self, measurements: dict[str, Measurement], budget: ModelBudget, available: int
    ) -> dict[str, int | None]:
        """Keep the components with the largest scores, whatever their energy, until the budget is met."""
        price, dense_price, fixed = prices(measurements, budget)
        # The greedy order is by energy per bit. Scores times price, divided by price, are the scores.
        by_score = {name: (m.require_scores() * price[name]).tolist() for name, m in measurements.items()}
        return greedy_ranks(by_score, price, dense_price, fixed, available)

    def explored(self, step: int) -> float:
        """Return how far phase 1 has come, 0 to 1.

        The target of ρ rises with it, so that the pace does not depend on λ_d.
        """
        return min(step / (EXPLORATION * self.steps), 1.0)

    def phase(self, step: int) -> Phase:
        """Return the terms active at a step. In phase 3 T falls from 0.1 to 0.02 and λ_p rises from 0 to 1."""
        done = step / self.steps
        if done < EXPLORATION:
            return Phase(1, temperature=TEMPERATURE, polarization=0.0, hard=False)
        if done < EXPLORATION + OSCILLATION:
            return Phase(2, temperature=TEMPERATURE, polarization=0.0, hard=False)
        decided = (done - EXPLORATION - OSCILLATION) / (1 - EXPLORATION - OSCILLATION)
        temperature = TEMPERATURE * (LAST_TEMPERATURE / TEMPERATURE) ** decided
        return Phase(3, temperature=temperature, polarization=decided, hard=True)


def with_learned_scores(measurement: Measurement, scores: Tensor, deviation: Tensor | None) -> Measurement:
    """Return the measurement with scores (k,) folded into its spectrum: Σ S in place of Σ, by falling score."""
    # `Measurement.truncate` keeps the first components, so those of the largest scores come first.
    order = scores.argsort(descending=True, stable=True)
    dense = measurement.factorization
    spectrum = Factorization(dense.left[:, order], (dense.sigma * scores)[order], dense.right[order])
    return replace(measurement, factorization=spectrum, scores=scores[order], bias=deviation)


def score(a: Tensor) -> Tensor:
    """Return s = 2 σ(a): 1 at a = 0, which is the dense model, and up to 2, so that components may be amplified."""
    return 2 * torch.sigmoid(a)


def gate(s: Tensor, temperature: float) -> Tensor:
    """Return g = σ((s − τ) / T), how much a component counts as kept."""
    return torch.sigmoid((s - THRESHOLD) / temperature)


def effective_score(s: Tensor, phase: Phase) -> Tensor:
    """Return s̃, by which the forward multiplies σ.

    It is s g in phases 1 and 2, and s [s > τ] with the gradient of s g in phase 3. Scores are gated from the first
    step on. Without that the loss jumps when the mask hardens.
    """
    soft = s * gate(s, phase.temperature)
    if not phase.hard:
        return soft
    return soft + (s * (s > THRESHOLD) - soft).detach()  # straight-through estimator


def polarization(g: Tensor) -> Tensor:
    """Return L_pol = mean 4 g (1 − g), which is zero when every component is decided."""
    return (4 * g * (1 - g)).mean()
