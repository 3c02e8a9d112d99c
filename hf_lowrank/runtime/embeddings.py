"""Embeddings as quantized rows, and a head that multiplies by the same rows where the model ties the two."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import CheckpointError, CompressionError
from .layer_spec import LayerSpec
from .quantization import Quantized, levels, pack_codes, spread_scale, unpack_codes
from .quantized_ops import quantized_linear

SCALED_EMBEDDING = "ScaledWordEmbedding"
"""End of the names of the subclasses of `nn.Embedding` that multiply what it gives by a number, and do no more."""

CHUNK_OF_ROWS = 4096
"""Number of rows that are quantized or dequantized at a time, where all of them are."""


def is_embedding(module: nn.Module | None) -> bool:
    """Return whether a module is a dense embedding whose rows can be stored quantized."""
    if type(module) is nn.Embedding:
        return module.max_norm is None
    if not isinstance(module, nn.Embedding) or not type(module).__name__.endswith(SCALED_EMBEDDING):
        return False
    return module.max_norm is None and isinstance(_embed_scale(module), (int, float))


def _embed_scale(module: nn.Module) -> Any:
    """Return the number by which an embedding multiplies its rows, 1 if it does not."""
    return getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1))


class CompressedEmbedding(nn.Module):
    """Stands in for an embedding (V, n). Only the rows that are looked up are dequantized.

    The codes are a buffer and the scales a parameter, as those of a compressed linear layer are.

    Args:
        dense: the embedding that it replaces. It is kept without its values, to be put back by `to_module`.
        spec: what is stored: a quantized `full` matrix, and nothing else.

    Raises:
        CheckpointError: if the spec is another one.
    """

    weight: Tensor
    weight_scale: nn.Parameter

    def __init__(self, dense: nn.Module, spec: LayerSpec) -> None:
        super().__init__()
        assert isinstance(dense, nn.Embedding)
        check_embedding_spec(type(self).__name__, spec, dense.num_embeddings, dense.embedding_dim)
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx
        self.spec = spec
        stored = spec.tensors(self.num_embeddings, self.embedding_dim)
        device, dtype = dense.weight.device, dense.weight.dtype
        self.register_buffer("weight", torch.zeros(stored["weight"][0], dtype=torch.uint8, device=device))
        self.weight_scale = nn.Parameter(torch.zeros(stored["weight_scale"][0], dtype=dtype, device=device))
        vars(self)["dense"] = without_weight(dense)  # no child: it is no part of the model
        self.train(dense.training)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the scales, and of the rows that come out."""
        return self.weight_scale.dtype

    @torch.no_grad()
    def store(self, quantized: Quantized) -> None:
        """Store a quantized matrix (V, n) of the bits and the group of the spec."""
        self.weight.copy_(pack_codes(quantized.codes, quantized.bits))
        self.weight_scale.copy_(quantized.scale)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of token ids (...), (..., n)."""
        codes = F.embedding(input_ids, self.weight.squeeze(2))
        scale = F.embedding(input_ids, self.weight_scale)
        rows = self._rows(codes.flatten(0, -2).unsqueeze(2), scale.flatten(0, -2))
        rows = rows.view(*input_ids.shape, self.embedding_dim)
        factor = _embed_scale(vars(self)["dense"])
        if hasattr(vars(self)["dense"], "scalar_embed_scale"):
            return rows * torch.tensor(factor, dtype=rows.dtype, device=rows.device)
        return rows if factor == 1 else rows * factor

    def _rows(self, packed: Tensor, scale: Tensor) -> Tensor:
        """Return rows (k, n) from their packed codes (k, bytes, 1) and scales (k, groups), in the dtype of these."""
        bits, group, columns = self.spec.weight_bits, self.spec.weight_group, self.embedding_dim
        values = levels(unpack_codes(packed, bits, columns), bits, scale.dtype)
        return values * spread_scale(scale, group, columns)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return all rows, (V, n), by default in the dtype of the scales."""
        dtype = dtype or self.dtype
        parts = []
        chunks = zip(self.weight.split(CHUNK_OF_ROWS), self.weight_scale.split(CHUNK_OF_ROWS), strict=True)
        for packed, scale in chunks:
            parts.append(self._rows(packed, scale.detach().double()).to(dtype))
        return torch.cat(parts)

    def to_module(self, weight: nn.Parameter) -> nn.Module:
        """Return the dense embedding with a weight (V, n)."""
        dense: nn.Module = vars(self)["dense"]
        dense.weight = weight
        if hasattr(dense, "scalar_embed_scale"):  # whose buffer may never have had a value
            dense.embed_scale = torch.tensor(dense.scalar_embed_scale, device=weight.device)
        return dense.train(self.training)

    def stored_bits(self) -> int:
        """Return the number of bits that the embedding takes in a checkpoint of its dtype."""
        return self.spec.stored_bits(self.num_embeddings, self.embedding_dim, self.dtype.itemsize * 8)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight_bits={self.spec.weight_bits}"


class TiedHead(nn.Module):
    """Stands in for a linear layer whose weight is that of the embeddings. It has no tensors but a bias of its own.

    Args:
        dense: the linear layer that it replaces.
        embedding: the compressed embedding by whose rows it multiplies.
    """

    def __init__(self, dense: nn.Module, embedding: CompressedEmbedding) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias: Any = dense.bias
        # Neither is a child: the names of the embedding's tensors are those that it has in the model.
        vars(self)["embedding"] = embedding
        vars(self)["dense"] = without_weight(dense)
        self.train(dense.training)

    @property
    def weight(self) -> Tensor:
        """The packed codes of the embedding."""
        weight: Tensor = vars(self)["embedding"].weight
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # Transformers ties weights again and again. These are tied already.
        pass

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the embedding (V, n), (..., V), for x (..., n).

        Raises:
            CompressionError: if the embedding is not in memory.
        """
        embedding: CompressedEmbedding = vars(self)["embedding"]
        spec = embedding.spec
        weight, scale = embedding.weight, embedding.weight_scale
        if (weight.is_meta or scale.is_meta) and not x.is_meta:
            raise CompressionError(
                "the head multiplies by the rows of the embeddings, which are offloaded; "
                "give both the same device in device_map"
            )
        y = quantized_linear(x, weight, scale, None, spec.weight_bits, spec.weight_group, self.in_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_module(self, weight: nn.Parameter) -> nn.Module:
        """Return the dense linear layer with the weight of the embeddings."""
        dense: nn.Module = vars(self)["dense"]
        dense.weight, dense.bias = weight, self.bias
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied=True"


def without_weight(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose weight, and its bias if it has one, are on the meta device."""
    memo: dict[int, object] = {}
    for parameter in module.parameters(recurse=False):
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(module, memo)


def check_embedding_spec(name: str, spec: LayerSpec, rows: int, columns: int) -> None:
    """Raise CheckpointError if a spec is not that of a quantized embedding (V, n)."""
    spec.validate(name, rows, columns)
    if spec != LayerSpec(sparse="full", weight_bits=spec.weight_bits, weight_group=spec.weight_group):
        raise CheckpointError(f"{name}: an embedding stores quantized rows and nothing else; the config is damaged")


def has_compressed_embeddings(model: nn.Module) -> bool:
    """Return whether a model, or a part of one, holds compressed embeddings."""
    return any(isinstance(module, CompressedEmbedding) for module in model.modules())


def compress_embedding(
    model: nn.Module, name: str, spec: LayerSpec, heads: Mapping[str, nn.Module]
) -> CompressedEmbedding:
    """Put an empty compressed embedding in the place of a dense one, and heads that share its rows in theirs.

    Args:
        heads: the linear layers that are tied to the embedding, by name.
    """
    embedding = CompressedEmbedding(model.get_submodule(name), spec)
    swap_module(model, name, embedding)
    for head_name, head in heads.items():
        swap_module(model, head_name, TiedHead(head, embedding))
    ties: Any = getattr(model, "all_tied_weights_keys", None)
    if ties:  # what transformers would tie when it loads the model: dense tensors, which are not there
        tied = {f"{head_name}.weight" for head_name in heads}
        vars(model)["all_tied_weights_keys"] = {key: source for key, source in ties.items() if key not in tied}
    return embedding


def decompress_embeddings(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put dense embeddings, and heads that are tied to them, in the place of compressed ones."""
    weights: dict[int, nn.Parameter] = {}
    modules = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, CompressedEmbedding):
            weights[id(module)] = nn.Parameter(module.to_dense(dtype))
            swap_module(model, name, module.to_module(weights[id(module)]))
    for name, module in modules:
        if isinstance(module, TiedHead):
            swap_module(model, name, module.to_module(weights[id(vars(module)["embedding"])]))


def swap_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that has this name in the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def keep_ties(model: Any, *args: Any, **kwargs: Any) -> None:
    """Stand in for `tie_weights` of a model with compressed embeddings, whose head is tied to them already.

    Transformers would look for a weight of the head anew. Whatever else is tied is tied by it.
    """
    kwargs["recompute_mapping"] = False
    type(model).tie_weights(model, *args[:1], **kwargs)


def refuse_resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Stand in for `resize_token_embeddings` of a model with compressed embeddings.

    Raises:
        CompressionError: if the number of rows would change.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings
    wanted = rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != rows:
        raise CompressionError(
            f"resize_token_embeddings: the compressed embeddings have {rows} rows and keep them, {wanted} were asked "
            "for; resize the dense model and compress it again, or make this one dense first (model.dequantize())"
        )
    return embedding
