"""The training that SoCo needs: scores of all singular components, learned end to end against the dense model (papers: SoCo §2.3)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ..runtime.quantizer import swap_module

STATE = "soco_state"
STATE_EVERY = 50
"""Steps between two recorded states."""

logger = logging.getLogger(__name__)


class SpectralLinear(nn.Module):
    """A linear layer as y = U ((σ ⊙ s̃) ⊙ (Vᵀ S⁻¹ x)) + d, or the dense layer it came from, whichever is asked for.

    Args:
        dense: the layer to learn; frozen.
        measurement: its factorization.
        deviation: whether to learn d.
    """

    def __init__(self, dense: nn.Module, measurement: Measurement, deviation: bool) -> None:
        super().__init__()
        self.dense = dense
        weight = dense.weight
        assert isinstance(weight, Tensor)
        spectrum = measurement.factorization
        compute = torch.promote_types(weight.dtype, torch.float32)
        # contiguous, as from a record: a resumed run rounds as one that was never killed
        self.left, self.right = spectrum.left.to(compute).contiguous(), spectrum.right.to(compute).contiguous()
        self.sigma = spectrum.sigma.to(compute)
        self.a = nn.Parameter(torch.zeros_like(self.sigma))
        self.d = nn.Parameter(self.left.new_zeros(self.left.shape[0])) if deviation else None
        self.effective: Tensor | None = None
        """s̃ of the current step; None asks for the dense layer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.effective is None:
            return self.dense(x)
        y = F.linear(F.linear(x.to(self.left.dtype), self.right) * (self.sigma * self.effective), self.left)
        if self.d is not None:
            y = y + self.d
        bias = self.dense.bias
        return (y + bias if isinstance(bias, Tensor) else y).to(x.dtype)


@dataclass
class LossCurve:
    """What a run reports: one entry per step."""

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
        group: the processes that share every step's rows; what is trained is small, and every one holds all of it.

    Returns:
        The measurements with learned spectra, the rank of each layer (None: dense), and the loss curve.

    Raises:
        NumericalError: if the loss is not finite, naming the step.
    """
    with _spectral_layers(model, measurements, method.deviation) as layers:
        run = _Run(model, method, layers, measurements, batches, budget, available, seed, group)
        first = run.load(work)
        total = method.steps + method.finish_steps
        for step in range(first, total):
            if step == method.steps:
                run.cut()
            run.step(step)
            on_step(step + 1, total)
            if work is not None and (step + 1) % STATE_EVERY == 0 and step + 1 != method.steps:
                run.save(work, step + 1)
        if run.kept is None:
            run.cut()
        assert run.kept is not None and run.ranks is not None
        result = {}
        for name, layer in layers.items():
            final = torch.where(run.kept[name], score(layer.a.detach()), -1.0).double()
            bias = layer.d.detach().double() if layer.d is not None else None
            result[name] = with_learned_scores(measurements[name], final, bias)
        return result, run.ranks, run.curve


class _Run:
    """The state of one training run."""

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
        self.group = group
        self.model, self.method, self.layers, self.measurements = model, method, layers, measurements
        self.budget, self.available, self.seed = budget, available, seed
        self.rows = [(ids, mask) for batch in batches for ids, mask in _rows(batch)]
        self.price, self.dense_price, self.fixed = prices(measurements, budget)
        deviations = [layer.d for layer in layers.values() if layer.d is not None]
        self.optimizer = torch.optim.Adam(
            [
                {"params": [layer.a for layer in layers.values()], "lr": method.learning_rate},
                {"params": deviations, "lr": method.deviation_rate},
            ]
        )
        self.curve = LossCurve([], [], [])
        self.kept: dict[str, Tensor] | None = None
        self.ranks: dict[str, int | None] | None = None
        self.first_removed: float | None = None

    def step(self, step: int) -> None:
        phase = self.method.phase(min(step, self.method.steps - 1))
        scores = {name: score(layer.a) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.effective = (
                effective_score(scores[name], phase) if self.kept is None else scores[name] * self.kept[name]
            )
        self.optimizer.zero_grad()
        loss = self.descend(self.minibatch(step))
        if not bool(loss.isfinite()):
            raise NumericalError(
                f"soco: the loss is {loss.item()} at step {step}; lower learning_rate, or use a wider dtype"
            )
        for layer in self.layers.values():
            for parameter in layer.parameters(recurse=False):
                if parameter.grad is None:  # an expert to which no token of the minibatch comes
                    parameter.grad = torch.zeros_like(parameter)
        removed = self.budget.ratio if self.kept is not None else self.add_decrease(step, phase)
        self.optimizer.step()
        self.curve.loss.append(loss.item())
        self.curve.ratio.append(removed)
        self.curve.phase.append(phase.number if self.kept is None else 4)

    def descend(self, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        """L_inc of a step's rows, of which every process takes some, and its gradients."""
        total, own = self.counted(rows), self.group.split(rows)
        found = {}
        if self.counted(own):
            loss = self.increase_loss(*self.padded(own)) * (self.counted(own) / total)
            loss.backward()
            found["loss"] = loss.detach()
        trained = {
            f"{name}.{key}": parameter
            for name, layer in self.layers.items()
            for key, parameter in layer.named_parameters()
        }
        trained = {name: parameter for name, parameter in trained.items() if parameter.requires_grad}
        found = self.group.all_reduce(
            found | {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
        )
        for name in trained.keys() & found.keys():
            trained[name].grad = found[name]
        return found["loss"]

    def counted(self, rows: list[tuple[Tensor, Tensor]]) -> int:
        """The tokens over which L_inc is a mean."""
        if self.method.loss == "cross_entropy":
            return sum(int((mask[1:] * mask[:-1]).sum()) for _, mask in rows)
        return sum(int(mask.sum()) for _, mask in rows)

    def increase_loss(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """L_inc: KL(p_dense ‖ p_compressed), mean over tokens, or the cross-entropy on the text."""
        arguments = {"input_ids": input_ids, "use_cache": False}
        if mask is not None:
            arguments["attention_mask"] = mask
        counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        logits = self.model(**arguments).logits.float()
        if self.method.loss == "cross_entropy":
            counted = counted[:, 1:] & counted[:, :-1]
            return F.cross_entropy(logits[:, :-1][counted], input_ids[:, 1:][counted])
        with torch.no_grad(), self.dense():
            reference = self.model(**arguments).logits.float().log_softmax(dim=-1)
        divergence = F.kl_div(logits.log_softmax(dim=-1), reference, log_target=True, reduction="none").sum(dim=-1)
        return divergence[counted].mean()

    def removed(self, scores: dict[str, Tensor], phase: Phase) -> Tensor:
        """ρ, the removed fraction of the layers' budget that the gates stand for; unclamped, so that it has a gradient everywhere."""
        kept = [self.fixed[name] + self.price[name] * gate(s, phase.temperature).sum() for name, s in scores.items()]
        bits = torch.stack(kept).sum()
        return 1 - (1 - self.budget.ratio) * bits / self.available

    def add_decrease(self, step: int, phase: Phase) -> float:
        """Add the gradients of L_dec, active while ρ is under its target and scaled to λ_d times the norm of L_inc's, and of λ_p L_pol.

        Returns ρ.
        """
        scores = {name: score(layer.a) for name, layer in self.layers.items()}
        removed = self.removed(scores, phase)
        if self.first_removed is None:
            self.first_removed = removed.item()
        target = self.first_removed + (self.budget.ratio - self.first_removed) * self.method.explored(step)
        parameters = [layer.a for layer in self.layers.values()]
        length = torch.cat([a.grad.flatten() for a in parameters if a.grad is not None]).norm()
        terms = []
        if removed.item() < target:
            terms.append((target - removed, self.method.decrease))
        if phase.polarization > 0:
            gates = torch.cat([gate(s, phase.temperature) for s in scores.values()])
            terms.append((polarization(gates), phase.polarization))
        for term, weight in terms:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True)
            scale = weight * length / torch.cat([g.flatten() for g in gradients]).norm().clamp(min=1e-12)
            for a, gradient in zip(parameters, gradients, strict=True):
                assert a.grad is not None
                a.grad += scale * gradient
        return removed.item()

    def cut(self) -> None:
        """The final cut: the largest scores within the budget stay; a layer that costs as much as the dense one becomes it."""
        scored = {
            name: with_learned_scores(self.measurements[name], score(layer.a.detach()), layer.d)
            for name, layer in self.layers.items()
        }
        self.ranks = self.method.allocate(scored, self.budget, self.available)
        self.kept = {}
        for name, layer in self.layers.items():
            rank, order = self.ranks[name], score(layer.a.detach()).argsort(descending=True, stable=True)
            kept = torch.zeros_like(layer.a, dtype=torch.bool)
            kept[order if rank is None else order[:rank]] = True
            self.kept[name] = kept

    def minibatch(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """The rows of one step, drawn without replacement within an epoch; a function of the seed and the step alone."""
        length = max(ids.shape[0] for ids, _ in self.rows)
        count = max(min(self.method.batch_tokens // length, len(self.rows)), 1)
        per_epoch = max(len(self.rows) // count, 1)
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return [self.rows[int(i)] for i in order[index * count : (index + 1) * count]]

    def padded(self, rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
        """Rows as a batch on the model's device, with the mask of the tokens that are no padding."""
        input_ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([mask for _, mask in rows], batch_first=True)
        device = self.model.device
        return input_ids.to(device), None if bool(mask.all()) else mask.to(device)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """While active, the model is the dense one."""
        effective = {name: layer.effective for name, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.effective = None
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.effective = effective[name]

    def save(self, work: WorkFolder, step: int) -> None:
        """Record the state after `step` steps."""
        tensors = {}
        for name, layer in self.layers.items():
            for key, parameter in (("a", layer.a), ("d", layer.d)):
                if parameter is not None:
                    tensors[f"{name}.{key}"] = parameter.detach()
                    state = self.optimizer.state[parameter]
                    tensors |= {f"{name}.{key}.{part}": state[part] for part in ("exp_avg", "exp_avg_sq", "step")}
            if self.kept is not None:
                tensors[f"{name}.kept"] = self.kept[name]
        facts = {"step": step, "curve": self.curve.__dict__, "ranks": self.ranks, "first_removed": self.first_removed}
        work.write(STATE, Record(tensors, facts))

    def load(self, work: WorkFolder | None) -> int:
        """Go on from a recorded state; the number of steps it had done, 0 without one."""
        record = None if work is None else work.read(STATE)
        if record is None:
            return 0
        tensors, facts = record
        for name, layer in self.layers.items():
            for key, parameter in (("a", layer.a), ("d", layer.d)):
                if parameter is not None:
                    with torch.no_grad():
                        parameter.copy_(tensors[f"{name}.{key}"])
                    self.optimizer.state[parameter] = {
                        part: tensors[f"{name}.{key}.{part}"].to(parameter.device if part != "step" else "cpu")
                        for part in ("exp_avg", "exp_avg_sq", "step")
                    }
        self.curve = LossCurve(**facts["curve"])
        self.ranks, self.first_removed = facts["ranks"], facts["first_removed"]
        if self.ranks is not None:
            self.kept = {name: tensors[f"{name}.kept"].to(layer.a.device) for name, layer in self.layers.items()}
        return int(facts["step"])


@contextmanager
def _spectral_layers(
    model: PreTrainedModel, measurements: dict[str, Measurement], deviation: bool
) -> Iterator[dict[str, SpectralLinear]]:
    """The model with its layers replaced for training, all else frozen; as it was, at the end."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    dense = {name: model.get_submodule(name) for name in measurements}
    for parameter in trainable:
        parameter.requires_grad_(False)
    layers = {name: SpectralLinear(module, measurements[name], deviation) for name, module in dense.items()}
    for name, layer in layers.items():
        swap_module(model, name, layer)
    checkpointing = model.supports_gradient_checkpointing and model.device.type == "cuda"
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    try:
        with torch.enable_grad():
            yield layers
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for name, module in dense.items():
            swap_module(model, name, module)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _rows(batch: TokenBatch) -> Iterator[tuple[Tensor, Tensor]]:
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    yield from zip(batch.input_ids.cpu(), mask.cpu(), strict=True)
