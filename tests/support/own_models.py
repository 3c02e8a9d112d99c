"""Models of one's own: the same few blocks, called by the model in every way that one may think of."""

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .model_families import VOCABULARY

WIDTH = 16
Pair = namedtuple("Pair", ["weights", "hidden"])


@dataclass
class Output:
    """A plain dataclass, which transformers knows nothing of."""

    weights: None
    hidden: Tensor


@dataclass
class NamedOutput(ModelOutput):
    """An output whose first tensor is not the hidden states."""

    weights: Tensor | None = None
    hidden_states: Tensor | None = None


class Block(nn.Module):
    """A feed-forward network around a residual."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))


class Returning(Block):
    """A block that packs what it returns."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, hidden: Tensor) -> Any:
        return self.pack(super().forward(hidden))


class KeywordOnly(Block):
    def forward(self, *, scale: Tensor, states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(states * scale)


class HiddenSecond(Block):
    def forward(self, step: int, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden) + step


class Halving(Block):
    """A stage of a hierarchy: half as many tokens, twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.merge = nn.Linear(2 * width, 2 * width)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, tokens, width = hidden.shape
        return self.merge(super().forward(hidden).view(rows, tokens // 2, 2 * width))


BODIES: list[nn.Module] = []
"""Copies of the bodies of all models, by which a config can say what its model is made of."""


class OwnConfig(PreTrainedConfig):
    """The config of an own model. `body` is the place of the model's body in `BODIES`."""

    model_type = "own-blocks"

    def __init__(self, body: int = 0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.body = body


class OwnModel(PreTrainedModel):
    """Embeddings, and a body that calls its blocks in its own way."""

    config_class = OwnConfig
    base_model_prefix = "base"

    def __init__(self, made_of: nn.Module | OwnConfig, is_encoder_decoder: bool = False) -> None:
        """Make a model of a body, or again from its config. A model that its class cannot make again is refused."""
        if not isinstance(made_of, OwnConfig):
            BODIES.append(copy.deepcopy(made_of))
        config = made_of if isinstance(made_of, OwnConfig) else OwnConfig(len(BODIES) - 1)
        config.is_encoder_decoder |= is_encoder_decoder
        super().__init__(config)
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.body = copy.deepcopy(BODIES[config.body])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.body(self.embeddings(input_ids)),)


class Chain(nn.Module):
    """Calls blocks one after the other. `call` calls one of them and unpacks its output."""

    def __init__(self, blocks: list[nn.Module], call: Callable[[nn.Module, Tensor, int], Tensor], rounds: int = 1):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.call = call
        self.rounds = rounds

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(self.rounds):
            for index, block in enumerate(self.blocks):
                hidden = self.call(block, hidden, index)
        return hidden


class EachTwice(Chain):
    """Calls every block twice before the next one."""

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden = self.call(block, self.call(block, hidden, index), index)
        return hidden


class TwoStacks(nn.Module):
    """Two lists of blocks that read the same embeddings, as two towers do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])

    def forward(self, hidden: Tensor) -> Tensor:
        one = other = hidden
        for left, right in zip(self.left, self.right, strict=True):
            one, other = left(one), right(other)
        return one + other


class WithHeads(Chain):
    """Has several heads in a list: linear layers by themselves."""

    def __init__(self) -> None:
        super().__init__([Block(), Block()], plain)
        self.heads = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = super().forward(hidden)
        return torch.stack([head(hidden) for head in self.heads]).sum(dim=0)


class Nested(nn.Module):
    """Lists of blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])

    def forward(self, hidden: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                hidden = block(hidden)
        return hidden


class BlocksInHead(PreTrainedModel):
    """A base model, and blocks of the head beside it."""

    config_class = OwnConfig
    base_model_prefix = "base"

    def __init__(self, config: OwnConfig | None = None) -> None:
        super().__init__(config or OwnConfig())
        self.base = OwnModel(Chain([Block()], plain))
        self.head = nn.ModuleList([Block()])
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        (hidden,) = self.base(input_ids, attention_mask)
        return (self.head[0](hidden),)


def plain(block: nn.Module, hidden: Tensor, index: int) -> Tensor:
    return block(hidden)


def returning(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> OwnModel:
    return OwnModel(Chain([Returning(pack) for _ in range(2)], lambda block, hidden, index: unpack(block(hidden))))


def sharing(part: str) -> OwnModel:
    """Return a model whose blocks have one part in common."""
    blocks = [Block(), Block()]
    setattr(blocks[1], part, getattr(blocks[0], part))
    return OwnModel(Chain(blocks, plain))


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.own = inner, Block()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.own(self.inner(hidden))


def sharing_block() -> OwnModel:
    """Return a model whose blocks have a whole network in common, beside one of their own (Zamba)."""
    inner = Block()
    return OwnModel(Chain([Wrapped(inner), Wrapped(inner)], plain))


def listed_twice() -> OwnModel:
    block = Block()
    return OwnModel(Chain([block, Block(), block], plain))


OWN_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "a tuple": lambda: returning(lambda x: (x, None), lambda out: out[0]),
    "a tuple, hidden states last": lambda: returning(lambda x: (None, x), lambda out: out[1]),
    "a list": lambda: returning(lambda x: [x], lambda out: out[0]),
    "a dictionary": lambda: returning(lambda x: {"states": x}, lambda out: out["states"]),
    "a dictionary with names": lambda: returning(
        lambda x: {"weights": x.mean(dim=-1), "hidden_states": x}, lambda out: out["hidden_states"]
    ),
    "a ModelOutput": lambda: returning(
        lambda x: BaseModelOutput(last_hidden_state=x), lambda out: out.last_hidden_state
    ),
    "a ModelOutput with other tensors first": lambda: returning(
        lambda x: NamedOutput(weights=x.mean(dim=-1), hidden_states=x), lambda out: out.hidden_states
    ),
    "a dataclass": lambda: returning(lambda x: Output(None, x), lambda out: out.hidden),
    "a named tuple": lambda: returning(lambda x: Pair(None, x), lambda out: out.hidden),
    "a tensor in a tuple in a list": lambda: returning(lambda x: [(x,)], lambda out: out[0][0]),
    "keywords only": lambda: OwnModel(
        Chain([KeywordOnly(), KeywordOnly()], lambda block, x, index: block(states=x, scale=torch.ones(())))
    ),
    "hidden states second": lambda: OwnModel(
        Chain([HiddenSecond(), HiddenSecond()], lambda block, x, index: block(index, x))
    ),
    "one block several times": lambda: OwnModel(Chain([Block()], plain, rounds=3)),
    "all blocks in several rounds": lambda: OwnModel(Chain([Block(), Block()], plain, rounds=2)),
    "each block twice": lambda: OwnModel(EachTwice([Block(), Block()], plain)),
    "a block listed twice": listed_twice,
    "blocks with a network in common": sharing_block,
    "blocks with a layer in common": lambda: sharing("up"),
    "an encoder-decoder by name only": lambda: OwnModel(Chain([Block()], plain), is_encoder_decoder=True),
    "two stacks": lambda: OwnModel(TwoStacks()),
    "heads in a list": lambda: OwnModel(WithHeads()),
    "blocks in the head": BlocksInHead,
    "lists in a list": lambda: OwnModel(Nested()),
    "stages that change shape": lambda: OwnModel(Chain([Halving(WIDTH), Halving(2 * WIDTH)], plain)),
}
"""Makes a model by what is special about its blocks, or about what they return."""


def own_model(name: str) -> PreTrainedModel:
    """Return one of the models, with the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OWN_MODELS[name]().eval()
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model
