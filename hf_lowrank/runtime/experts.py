"""Banks of experts: the fused experts of a mixture, two tensors of three dimensions, as linear layers of their own, and back."""

import copy
import inspect

import torch
from torch import Tensor, nn

AGREEMENT = 1e-9
"""Between a bank and the fused module that it stands for, relative, in float64."""


class Expert(nn.Module):
    """One expert: a gated feed-forward network of linear layers (2f, d) and (d, f), the first of which holds gate and up."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def forward(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        """What the expert makes of some tokens.

        Args:
            hidden_states: of all tokens, (T, d). tokens: indices of those that come to this expert, (t,).

        Returns:
            (t, d).
        """
        gate, up = self.gate_up(hidden_states[tokens]).chunk(2, dim=-1)
        output: Tensor = self.down(self.activation(gate) * up)
        return output


class ExpertBank(nn.ModuleList):
    """The experts of a mixture one by one; computes what transformers' fused module does, of which it keeps the shell.

    The layers share the memory of the fused tensors until they are replaced.

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
        gate_up, down = (fused.get_parameter(name) for name in names)
        for index in range(len(gate_up)):
            self.append(Expert(_linear(gate_up, index), _linear(down, index), activation))
        empty = {
            name: nn.Parameter(p.detach().to("meta"), p.requires_grad)
            for name, p in zip(names, (gate_up, down), strict=True)
        }
        vars(self)["fused"] = _with_parameters(fused, empty)  # not a child: its tensors are no part of the model
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The outputs of every token's experts, weighted and added.

        Args:
            hidden_states: (T, d). top_k_index, top_k_weights: which experts each token goes to, and their weights, (T, k).

        Returns:
            (T, d).
        """
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            position, tokens = torch.where(top_k_index.T.eq(index))
            output = self[index](hidden_states, tokens) * top_k_weights[tokens, position, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result

    def slices(self) -> dict[str, tuple[str, int]]:
        """Which part of which fused tensor each weight is: name within the bank → name within the fused module, and index."""
        gate_up, down = self.names
        found = {f"{index}.gate_up.weight": (gate_up, index) for index in range(len(self))}
        return found | {f"{index}.down.weight": (down, index) for index in range(len(self))}

    def fuse(self) -> nn.Module:
        """The fused module with the weights of the bank, all layers of which are dense."""
        layers = [[getattr(expert, part).weight for expert in self] for part in ("gate_up", "down")]
        stacked = (
            nn.Parameter(torch.stack([w.detach() for w in each]), any(w.requires_grad for w in each))
            for each in layers
        )
        return _with_parameters(self.fused, dict(zip(self.names, stacked, strict=True))).train(self.training)


def is_fused_experts(module: nn.Module | None) -> bool:
    """Whether a bank can stand for a module: by its structure, and tried out with small random weights in its place.

    The module has two parameters, (E, 2f, d) and (E, d, f), an activation without any, and nothing else; its forward is called
    with hidden states, indices and weights of experts.
    """
    if module is None or isinstance(module, ExpertBank) or (names := _projections(module)) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    experts, tokens, d, f = min(module.get_parameter(names[0]).shape[0], 4), 6, 4, 3  # a few experts stand for all

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu") - 0.5

    small = _with_parameters(
        module, dict(zip(names, map(nn.Parameter, (random(experts, 2 * f, d), random(experts, d, f))), strict=True))
    )
    scales = torch.logspace(-2, 3, tokens, dtype=torch.float64, device="cpu")[
        :, None
    ]  # clamps show only where numbers are large
    inputs = random(tokens, d) * scales, random(tokens, experts).argsort(dim=1)[:, :2], random(tokens, min(experts, 2))
    try:
        with torch.no_grad():
            found: Tensor = inspect.unwrap(type(module).forward)(small, *inputs)
            lost = ExpertBank(small)(*inputs) - found
    except Exception:  # whatever another kind of module makes of such arguments
        return False
    return bool((lost.norm(dim=1) <= AGREEMENT * found.norm(dim=1)).all())


def _projections(module: nn.Module) -> tuple[str, str] | None:
    """Names of the two parameters of fused experts, that of gate and up first; None for other modules."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    children = list(module.children())
    if (
        len(shapes) != 2
        or len(children) != 1
        or any(len(shape) != 3 for shape in shapes.values())
        or any(module.buffers())
    ):
        return None
    for gate_up, down in (tuple(shapes), tuple(shapes)[::-1]):
        experts, f, d = shapes[gate_up][0], shapes[gate_up][1] // 2, shapes[gate_up][2]
        if shapes[gate_up] == (experts, 2 * f, d) and shapes[down] == (experts, d, f):
            return gate_up, down
    return None


def _with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """A copy of a module with other parameters, which shares all else."""
    shared = {id(value): value for value in vars(module).values() if not isinstance(value, dict | set)}
    shared |= {id(child): child for child in module.children()}
    return copy.deepcopy(
        module, shared | {id(module.get_parameter(name)): parameter for name, parameter in parameters.items()}
    )


def _linear(weights: nn.Parameter, index: int) -> nn.Linear:
    """A linear layer with one of the weights (E, m, n), in their memory."""
    linear = nn.Linear(weights.shape[2], weights.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weights.detach()[index], weights.requires_grad)
    return linear
