"""The training of SoCo: scores of all singular components, learned end to end against the dense model.

arXiv 2502.15092; `methods/soco.py` has the formulas of the scores, the gates and the losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..budget import ModelBudget
from ..calibration import TokenBatch
from ..execution.process_group import SINGLE_PROCESS, ProcessGroup
from ..execution.work_folder import Record, WorkFolder
from ..methods.soco import Phase, SoCo, effective_score, gate, polarization, score, with_learned_scores
from ..methods.spectral import Measurement, prices
from ..runtime.errors import NumericalError
from .spectral_linear import SpectralLinear, as_dense, spectral_layers

STATE = "soco_state"
"""Name of the record that holds the state of the training."""
STEPS_BETWEEN_STATES = 50
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
FINAL_PHASE = 4
"""Number that the loss curve gives to the steps after the final cut."""


@dataclass
class LossCurve:
    """The course of a training, with one entry per step.

    Attributes:
        loss: L_inc.
        ratio: ρ, the removed fraction of the budget.
        phase: 1 exploration, 2 oscillation, 3 decision, 4 after the final cut.
    """

    loss: list[float]
    ratio: list[float]
    phase: list[int]


def learn_spectrum(
    model: PreTrainedModel,
    method: SoCo,
    measurements: dict[str, Measurement],
    batches: list[TokenBatch],
    budget: ModelBudget,
    available: int,
    seed: int,
    work: WorkFolder | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[dict[str, Measurement], dict[str, int | None], LossCurve]:
    """Learn scores and deviations, cut to the budget, and re-fit what is left.

    Args:
        measurements: factorizations of the layers to compress, by module name.
        available: bits that these layers may take together.
        work: where to record the state, so that a killed run goes on from it.
        on_step: called with the number of steps done and of all.
        group: the processes that share the rows of every step. What is trained is small, and every process holds all
            of it.

    Returns:
        The measurements with learned spectra, the rank of each layer (None: dense), and the loss curve.

    Raises:
        NumericalError: if the loss is not finite, naming the step.
    """
    with spectral_layers(model, measurements, method.deviation) as layers:
        training = SoCoTraining(model, method, layers, measurements, batches, budget, available, seed, group)
        first = training.load(work)
        total = method.steps + method.finish_steps
        for step in range(first, total):
            if step == method.steps:
                training.cut()
            training.step(step)
            on_step(step + 1, total)
            # No state lies right before the final cut: the next one holds its result.
            is_due = (step + 1) % STEPS_BETWEEN_STATES == 0 and step + 1 != method.steps
            if work is not None and is_due:
                training.save(work, step + 1)
        if training.kept is None:
            training.cut()
        assert training.ranks is not None
        return training.learned_measurements(), training.ranks, training.curve


class SoCoTraining:
    """The state of one training.

    Attributes:
        curve: the course of the training, for the report.
        kept: after the final cut, which components of each layer stay, (k,) bool.
        ranks: after the final cut, the rank of each layer; None for one that becomes the dense layer.
        first_removed: ρ at the first step, from which its target rises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: SoCo,
        layers: dict[str, SpectralLinear],
        measurements: dict[str, Measurement],
        batches: list[TokenBatch],
        budget: ModelBudget,
        available: int,
        seed: int,
        group: ProcessGroup,
    ) -> None:
        self.model = model
        self.method = method
        self.layers = layers
        self.measurements = measurements
        self.budget = budget
        self.available = available
        self.seed = seed
        self.group = group
        self.rows = _rows(batches)
        self.price, self.dense_price, self.fixed = prices(measurements, budget)
        scores = [layer.a for layer in layers.values()]
        deviations = [layer.d for layer in layers.values() if layer.d is not None]
        self.optimizer = torch.optim.Adam(
            [
                {"params": scores, "lr": method.learning_rate},
                {"params": deviations, "lr": method.deviation_rate},
            ]
        )
        self.curve = LossCurve([], [], [])
        self.kept: dict[str, Tensor] | None = None
        self.ranks: dict[str, int | None] | None = None
        self.first_removed: float | None = None

    def step(self, step: int) -> None:
        """Take one step: the gradients of L_inc, those of L_dec and L_pol before the final cut, and Adam."""
        phase = self.method.phase(min(step, self.method.steps - 1))
        for name, layer in self.layers.items():
            s = score(layer.a)
            layer.effective = effective_score(s, phase) if self.kept is None else s * self.kept[name]
        self.optimizer.zero_grad()
        loss = self.backward(self.minibatch(step))
        if not bool(loss.isfinite()):
            raise NumericalError(
                f"soco: the loss is {loss.item()} at step {step}; lower learning_rate, or use a wider dtype"
            )
        for layer in self.layers.values():
            for parameter in layer.parameters(recurse=False):
                if parameter.grad is None:  # an expert to which no token of the minibatch comes
                    parameter.grad = torch.zeros_like(parameter)
        removed = self.add_decrease(step, phase) if self.kept is None else self.budget.ratio
        self.optimizer.step()
        self.curve.loss.append(loss.item())
        self.curve.ratio.append(removed)
        self.curve.phase.append(phase.number if self.kept is None else FINAL_PHASE)

    def backward(self, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return L_inc of a step's rows, which the processes share, and leave its gradients at the parameters."""
        total, own_rows = self.counted_tokens(rows), self.group.split(rows)
        own_tokens = self.counted_tokens(own_rows)
        tensors = {}
        if own_tokens:
            loss = self.increase_loss(*self.padded(own_rows)) * (own_tokens / total)
            loss.backward()
            tensors["loss"] = loss.detach()
        trained = {}
        for name, layer in self.layers.items():
            for key, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    trained[f"{name}.{key}"] = parameter
        for name, parameter in trained.items():
            if parameter.grad is not None:
                tensors[name] = parameter.grad
        tensors = self.group.all_reduce(tensors)
        for name in trained.keys() & tensors.keys():
            trained[name].grad = tensors[name]
        # A step whose rows have no token to predict has no loss.
        return tensors.get("loss", torch.zeros(()))

    def counted_tokens(self, rows: list[tuple[Tensor, Tensor]]) -> int:
        """Return the number of tokens over which L_inc is a mean."""
        if self.method.loss == "cross_entropy":
            return sum(int((mask[1:] * mask[:-1]).sum()) for _, mask in rows)
        return sum(int(mask.sum()) for _, mask in rows)

    def increase_loss(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return L_inc: KL(p_dense ‖ p_compressed), mean over tokens, or the cross-entropy on the text."""
        arguments = {"input_ids": input_ids, "use_cache": False}
        if mask is not None:
            arguments["attention_mask"] = mask
        counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        logits = self.model(**arguments).logits.float()
        if self.method.loss == "cross_entropy":
            counted = counted[:, 1:] & counted[:, :-1]
            return F.cross_entropy(logits[:, :-1][counted], input_ids[:, 1:][counted])
        with torch.no_grad(), as_dense(self.layers):
            reference = self.model(**arguments).logits.float().log_softmax(dim=-1)
        log_probabilities = logits.log_softmax(dim=-1)
        divergence = F.kl_div(log_probabilities, reference, log_target=True, reduction="none").sum(dim=-1)
        return divergence[counted].mean()

    def removed_ratio(self, scores: dict[str, Tensor], phase: Phase) -> Tensor:
        """Return ρ, the fraction of the layers' budget that the gates remove, without a clamp, for its gradient."""
        kept_bits = []
        for name, s in scores.items():
            kept_bits.append(self.fixed[name] + self.price[name] * gate(s, phase.temperature).sum())
        bits = torch.stack(kept_bits).sum()
        return 1 - (1 - self.budget.ratio) * bits / self.available

    def add_decrease(self, step: int, phase: Phase) -> float:
        """Add the gradients of L_dec and L_pol to those of L_inc, and return ρ.

        L_dec is active while ρ is below its target. Its gradient is scaled to λ_d times the norm of L_inc's, that of
        L_pol to λ_p times.
        """
        scores = {name: score(layer.a) for name, layer in self.layers.items()}
        removed = self.removed_ratio(scores, phase)
        if self.first_removed is None:
            self.first_removed = removed.item()
        target = self.first_removed + (self.budget.ratio - self.first_removed) * self.method.explored(step)
        parameters = [layer.a for layer in self.layers.values()]
        increase_norm = torch.cat([a.grad.flatten() for a in parameters if a.grad is not None]).norm()
        terms = []
        if removed.item() < target:
            terms.append((target - removed, self.method.decrease))
        if phase.polarization > 0:
            gates = torch.cat([gate(s, phase.temperature) for s in scores.values()])
            terms.append((polarization(gates), phase.polarization))
        for term, weight in terms:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True)
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().clamp(min=1e-12)
            scale = weight * increase_norm / norm
            for a, gradient in zip(parameters, gradients, strict=True):
                assert a.grad is not None
                a.grad += scale * gradient
        return removed.item()

    def cut(self) -> None:
        """Make the final cut: the largest scores within the budget stay.

        A layer that would cost as much as the dense one becomes the dense one.
        """
        scored = {}
        for name, layer in self.layers.items():
            scored[name] = with_learned_scores(self.measurements[name], score(layer.a.detach()), layer.d)
        self.ranks = self.method.allocate(scored, self.budget, self.available)
        self.kept = {}
        for name, layer in self.layers.items():
            rank = self.ranks[name]
            order = score(layer.a.detach()).argsort(descending=True, stable=True)
            kept = torch.zeros_like(layer.a, dtype=torch.bool)
            kept[order if rank is None else order[:rank]] = True
            self.kept[name] = kept

    def learned_measurements(self) -> dict[str, Measurement]:
        """Return the measurements with the learned scores. Components that were cut get a score below all others."""
        assert self.kept is not None, "cut before"
        measurements = {}
        for name, layer in self.layers.items():
            final_scores = torch.where(self.kept[name], score(layer.a.detach()), -1.0).double()
            deviation = None if layer.d is None else layer.d.detach().double()
            measurements[name] = with_learned_scores(self.measurements[name], final_scores, deviation)
        return measurements

    def minibatch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return the rows of one step, drawn without replacement within an epoch.

        They are a function of the seed and the step alone, so that a resumed run draws the same.
        """
        length = max(ids.shape[0] for ids, _ in self.rows)
        count = max(min(self.method.batch_tokens // length, len(self.rows)), 1)
        steps_per_epoch = max(len(self.rows) // count, 1)
        epoch, index = divmod(step, steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        return [self.rows[int(position)] for position in order[index * count : (index + 1) * count]]

    def padded(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
        """Return rows as a batch on the model's device, with the mask of the tokens that count (None: all)."""
        input_ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([mask for _, mask in rows], batch_first=True)
        device = self.model.device
        return input_ids.to(device), None if bool(mask.all()) else mask.to(device)

    def save(self, work: WorkFolder, step: int) -> None:
        """Record the state after `step` steps."""
        tensors = {}
        for name, layer in self.layers.items():
            for key, parameter in layer.trained_parameters().items():
                tensors[f"{name}.{key}"] = parameter.detach()
                for part in ADAM_STATE:
                    tensors[f"{name}.{key}.{part}"] = self.optimizer.state[parameter][part]
            if self.kept is not None:
                tensors[f"{name}.kept"] = self.kept[name]
        facts = {
            "step": step,
            "curve": self.curve.__dict__,
            "ranks": self.ranks,
            "first_removed": self.first_removed,
        }
        work.write(STATE, Record(tensors, facts))

    def load(self, work: WorkFolder | None) -> int:
        """Restore a recorded state, and return the number of steps that it had done (0 without one)."""
        record = None if work is None else work.read(STATE)
        if record is None:
            return 0
        tensors, facts = record
        for name, layer in self.layers.items():
            for key, parameter in layer.trained_parameters().items():
                with torch.no_grad():
                    parameter.copy_(tensors[f"{name}.{key}"])
                state = {}
                for part in ADAM_STATE:
                    device = "cpu" if part == "step" else parameter.device  # Adam counts its steps on the CPU
                    state[part] = tensors[f"{name}.{key}.{part}"].to(device)
                self.optimizer.state[parameter] = state
        self.curve = LossCurve(**facts["curve"])
        self.ranks, self.first_removed = facts["ranks"], facts["first_removed"]
        if self.ranks is not None:
            self.kept = {name: tensors[f"{name}.kept"].to(layer.a.device) for name, layer in self.layers.items()}
        return int(facts["step"])


def _rows(batches: list[TokenBatch]) -> list[tuple[Tensor, Tensor]]:
    """Return the ids and the mask of every sequence, (T,) each."""
    rows = []
    for batch in batches:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        rows += list(zip(batch.input_ids.cpu(), mask.cpu(), strict=True))
    return rows
