"""Stores the experts of a mixture as linear layers of their own, and puts them back together.

Transformers fuses the experts of a mixture into two tensors of three dimensions, which no linear layer can hold.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .tracing import must_decompose

AGREEMENT = 1e-9
"""Maximum relative difference, in float64, between the outputs of a bank and of the module that it stands for."""


class Expert(nn.Module):
    """One expert: a gated feed-forward network of linear layers (2f, d) and (d, f), the first for gate and up."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def forward(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """Return the expert's output for some of the tokens.

        Args:
            hidden_states: those of all tokens, (T, d).
            tokens: indices of the tokens that come to this expert, (t,).

        Returns:
            (t, d).
        """
        gate, up = self.gate_up(hidden_states[tokens]).chunk(2, dim=-1)
        output: Tensor = self.down(self.activation(gate) * up)
        return output


class ExpertBank(nn.ModuleList):
    """The experts of a mixture, one by one. It computes what transformers' fused module computes.

    The layers share the memory of the fused tensors until they are replaced. The bank keeps the fused module without
    its tensors, so that `fuse` can put it back.

    Args:
        fused: a module for which `is_fused_experts` holds.
    """

    fused: nn.Module

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        names = _projections(fused)
        assert names is not None, "fused experts"
        self.names = names
        (activation,) = fused.children()
        gate_up, down = fused.get_parameter(names[0]), fused.get_parameter(names[1])
        for index in range(len(gate_up)):
            self.append(Expert(_linear(gate_up, index), _linear(down, index), activation))
        empty = {}
        for name, parameter in zip(names, (gate_up, down), strict=True):
            empty[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        # It must not be a child of the bank, as its tensors are no part of the model.
        vars(self)["fused"] = _with_parameters(fused, empty)
        self.train(fused.training)

    def __getattr__(self, name: str) -> Any:
        # Some models initialize the fused tensors from outside on loading. Those without memory stand in for them.
        if name in vars(self).get("names", ()):
            return getattr(self.fused, name)
        return super().__getattr__(name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of every token's experts.

        Args:
            hidden_states: (T, d).
            top_k_index: the experts that each token goes to, (T, k).
            top_k_weights: the weights of these experts, (T, k).

        Returns:
            (T, d).
        """
        # One expert after the other, for all tokens that come to it; most experts of a mixture have few or none.
        result = torch.zeros_like(hidden_states)
        # A graph that is opened elsewhere has all experts, as other tokens may go to others.
        experts = range(len(self)) if must_decompose() else top_k_index.unique().tolist()
        for index in experts:
            position, tokens = torch.where(top_k_index.T.eq(index))
            output = self[index](hidden_states, tokens) * top_k_weights[tokens, position, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result

    def slices(self) -> dict[str, tuple[str, int]]:
        """Return where each weight lies in the fused tensors: its name in the bank → name of the tensor, and index."""
        gate_up, down = self.names
        places = {f"{index}.gate_up.weight": (gate_up, index) for index in range(len(self))}
        return places | {f"{index}.down.weight": (down, index) for index in range(len(self))}

    def fuse(self) -> nn.Module:
        """Return the fused module with the weights of the bank, all layers of which must be dense."""
        parameters = {}
        for name, part in zip(self.names, ("gate_up", "down"), strict=True):
            weights = [getattr(expert, part).weight for expert in self]
            stacked = torch.stack([weight.detach() for weight in weights])
            parameters[name] = nn.Parameter(stacked, any(weight.requires_grad for weight in weights))
        return _with_parameters(self.fused, parameters).train(self.training)


def is_fused_experts(module: nn.Module | None) -> bool:
    """Return whether an `ExpertBank` can stand for a module.

    The module must have two parameters, (E, 2f, d) and (E, d, f), an activation without parameters, and nothing else.
    As its forward may still compute something else, it is called with a few experts of small random weights, and
    compared with a bank of the same weights.
    """
    if module is None or isinstance(module, ExpertBank) or (names := _projections(module)) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    experts, tokens, d, f = min(module.get_parameter(names[0]).shape[0], 4), 6, 4, 3  # a few experts stand for all

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu") - 0.5

    gate_up, down = nn.Parameter(random(experts, 2 * f, d)), nn.Parameter(random(experts, d, f))
    small = _with_parameters(module, {names[0]: gate_up, names[1]: down})
    # Some modules clamp their activations, which shows only where numbers are large.
    scales = torch.logspace(-2, 3, tokens, dtype=torch.float64, device="cpu")[:, None]
    inputs = random(tokens, d) * scales, random(tokens, experts).argsort(dim=1)[:, :2], random(tokens, min(experts, 2))
    try:
        with torch.no_grad():
            expected: Tensor = inspect.unwrap(type(module).forward)(small, *inputs)
            difference = ExpertBank(small)(*inputs) - expected
    except Exception:  # a module of another kind may raise anything for such arguments
        return False
    return bool((difference.norm(dim=1) <= AGREEMENT * expected.norm(dim=1)).all())


def _projections(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of the two parameters of fused experts, gate and up first, or None for other modules."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if len(shapes) != 2 or len(list(module.children())) != 1:
        return None
    if any(len(shape) != 3 for shape in shapes.values()) or any(module.buffers()):
        return None
    # The two are told apart by their shapes: families name and order them differently.
    for gate_up, down in (tuple(shapes), tuple(shapes)[::-1]):
        experts, f, d = shapes[gate_up][0], shapes[gate_up][1] // 2, shapes[gate_up][2]
        if shapes[gate_up] == (experts, 2 * f, d) and shapes[down] == (experts, d, f):
            return gate_up, down
    return None


def _with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """Return a copy of a module with other parameters. It shares everything else with the module."""
    # `deepcopy` takes what its memo has for an object instead of copying it: the object itself is shared so.
    memo: dict[int, object] = {
        id(value): value for value in vars(module).values() if not isinstance(value, dict | set)
    }
    for child in module.children():
        memo[id(child)] = child
    for name, parameter in parameters.items():
        memo[id(module.get_parameter(name))] = parameter
    return copy.deepcopy(module, memo)


def _linear(weights: nn.Parameter, index: int) -> nn.Linear:
    """Return a linear layer with one of the weights (E, m, n), in their memory."""
    # On the meta device, so that no memory is taken before the weight is put in.
    linear = nn.Linear(weights.shape[2], weights.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weights.detach()[index], weights.requires_grad)
    return linear
