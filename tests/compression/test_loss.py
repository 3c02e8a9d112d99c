"""Gradients that go back block by block are those of the whole model, for every family that predicts a next token."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import TokenBatch, backward, batches, calibration_batches
from hf_lowrank.calibration.block_inputs import PROBE_TOKENS
from hf_lowrank.compression import loss
from hf_lowrank.compression.checks import check_predicts_next_token
from hf_lowrank.compression.pipeline import capture_inputs
from hf_lowrank.compression.session import Session, open_session
from hf_lowrank.compression.walk import visits
from hf_lowrank.methods import make_method

from ..support import tiny_models
from ..support.model_families import FAMILIES, texts

KINDS = {"lowrank": loss.curvature, "fwsvd": loss.squared_gradients}
"""What is measured, by a method that needs it."""


def predicts_next_token(name: str) -> bool:
    try:
        check_predicts_next_token(FAMILIES[name].make(), make_method("lowrank"))
    except CompressionError:
        return False
    return FAMILIES[name].batches is texts


def session_of(model: PreTrainedModel, method: str, data: Any) -> Session:
    config = CompressionConfig(method=method, ratio=0.3, samples=6, sequence_length=12)
    session = open_session(model.eval(), config, make_method(method), show=lambda *_: None)
    session.tokens = calibration_batches(model, config, None, data)
    return session


def measured(model: PreTrainedModel, method: str, data: Any) -> tuple[loss.LossGradients, dict[str, Tensor]]:
    """Return the sums at all layers of a model, as the walk from the last block to the first takes them."""
    session = session_of(model, method, data)
    with torch.no_grad():
        gradients = KINDS[method](session, capture_inputs(session))
        sums: dict[str, Tensor] = {}
        for visit in visits(session, backward=True):
            sums |= gradients.at_layers(visit)
    return gradients, sums


def expected(model: PreTrainedModel, method: str, tokens: Iterable[TokenBatch], names: list[str]) -> dict[str, Tensor]:
    """Return the same sums from the gradients of the whole model, by their definitions, float64."""
    modules = {name: model.get_submodule(name) for name in names}
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    # An input is large or small among those of its pass.
    tokens = batches.split_into_passes(tokens) if method == "lowrank" else list(tokens)
    for batch in tokens:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        handles = [module.register_forward_hook(keep(inputs, outputs, name)) for name, module in modules.items()]
        mask = batch.attention_mask if batch.attention_mask is not None else torch.ones_like(batch.input_ids)
        logits = model(**batch.inputs).logits
        for handle in handles:
            handle.remove()
        if method == "lowrank":
            cumulated = logits.detach().softmax(dim=-1).cumsum(dim=-1).flatten(0, 1)
            numbers = torch.rand(len(cumulated), 1, generator=generator) * cumulated[:, -1:]
            targets = torch.searchsorted(cumulated, numbers, right=True).view_as(mask)
            targets = targets.masked_fill(mask == 0, -100)
            total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            found = torch.autograd.grad(total, [*outputs.values()])
            for name, gradient in zip(outputs, found, strict=True):
                counted = mask.bool() if gradient.shape[:2] == mask.shape else torch.ones(gradient.shape[:-1]).bool()
                g, x = gradient[counted].double(), inputs[name][counted].double()
                energies = (x.square() / x.square().mean(dim=0)).nanmean(dim=1, keepdim=True)
                sums[name] = sums.get(name, 0) + g.T @ (energies * g)
        else:
            targets = batch.input_ids[:, 1:].masked_fill(mask[:, 1:] * mask[:, :-1] == 0, -100)
            mean = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
            weights: list[Any] = [module.weight for module in modules.values()]
            found = torch.autograd.grad(mean, weights, materialize_grads=True)
            for (name, module), gradient in zip(modules.items(), found, strict=True):
                by_weight = gradient.T if isinstance(module, Conv1D) else gradient
                sums[name] = sums.get(name, 0) + by_weight.double().square().sum(dim=0) / len(tokens)
    return sums


def keep(kept_inputs: dict[str, Tensor], outputs: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept_inputs[name], outputs[name] = inputs[0].detach(), output

    return hook


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("name", [name for name in FAMILIES if predicts_next_token(name)])
def test_gradients_block_by_block_are_those_of_the_whole_model(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    monkeypatch.setattr(backward, "FEWEST_TOKENS_AT_ONCE", 5)  # the head sees parts of sequences
    monkeypatch.setattr(backward, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(batches, "TOKENS_PER_PASS", 24)  # a calibration batch goes in parts
    model = FAMILIES[name].make()
    gradients, sums = measured(model, method, texts())
    assert gradients._is_chain
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    whole = expected(model, method, gradients.session.tokens, [*sums])
    for layer in gradients.session.plan.compressed:
        total = whole[layer.name]
        assert (sums[layer.name].double() - total).norm() <= 1e-4 * total.norm() + 1e-12, layer.name


class Skipping(LlamaForCausalLM):
    """A model whose head reads what the first block gives, beside what the last one gives."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].register_forward_hook(self.note)
        self.model.norm.register_forward_pre_hook(self.add)

    def note(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self.noted = output

    def add(self, norm: nn.Module, inputs: Any) -> Any:
        return (inputs[0] + self.noted,)


class Mixing(LlamaForCausalLM):
    """A model whose head mixes tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].cumsum(dim=1),))


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("cls", [Skipping, Mixing])
def test_a_model_that_is_no_chain_takes_its_gradients_at_once(cls: type[LlamaForCausalLM], method: str) -> None:
    model = cls(tiny_models.llama().config).eval()
    gradients, sums = measured(model, method, texts())
    assert not gradients._is_chain
    whole = expected(model, method, gradients.session.tokens, [*sums])
    assert len(sums) == 28
    for name, total in sums.items():
        assert (total.double() - whole[name]).norm() <= 1e-4 * whole[name].norm(), name


def test_the_logits_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "FEWEST_TOKENS_AT_ONCE", 3)
    monkeypatch.setattr(backward, "LOGITS_AT_ONCE", 1)
    model = tiny_models.llama()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape[:-1].numel()))
    compress(model, CompressionConfig("lowrank", 0.4, samples=6, sequence_length=12), calibration=texts())
    assert max(rows) <= PROBE_TOKENS
    assert sum(rows) >= 72
