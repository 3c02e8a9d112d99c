"""Pivoted factors lose nothing, stay bounded, and live like every other part of a layer."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_lowrank import (
    CheckpointError,
    CompressionError,
    LayerSpec,
    NumericalError,
    SparseLowRankLinear,
)
from hf_lowrank.budget import Budget
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.packing import pack_bits
from hf_lowrank.runtime.pivoting import LARGEST_ENTRY, pivot, row_sources, unpivot

from .layer_cases import shapes_of
from .layers_in_models import llama_of, replace_linears


def factors(m: int, n: int, rank: int, decay: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random A (r, n) and B (m, r) in float64. The singular values of B A fall like i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=generator)).Q.T
    left = torch.linalg.qr(torch.randn(m, rank, dtype=torch.float64, generator=generator)).Q
    root = torch.arange(1, rank + 1, dtype=torch.float64).pow(-decay / 2)
    return root[:, None] * right, left * root


def relative_norm(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return float(difference.double().norm() / reference.double().norm())


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    rank = draw(st.integers(1, 12))
    return draw(st.integers(rank, 40)), draw(st.integers(rank, 40)), rank


@settings(deadline=None, max_examples=60)
@given(shapes(), st.floats(0, 8), st.integers(0, 1000))
def test_pivoting_loses_nothing_and_bounds_every_entry(shape, decay, seed):
    m, n, rank = shape
    a, b = factors(m, n, rank, decay, seed)
    a2, b2, pivots = pivot(a, b)
    assert a2.shape == (rank, n)
    assert b2.shape == (m - rank, rank)
    assert int(pivots.sum()) == rank
    torch.testing.assert_close(unpivot(b2, pivots) @ a2, b @ a, rtol=1e-11, atol=1e-12)
    assert b2.numel() == 0 or float(b2.abs().max()) <= LARGEST_ENTRY + 1e-9
    torch.testing.assert_close(a2, (b @ a)[pivots])  # A' are rows of the matrix itself


def test_pivoting_by_hand():
    a = torch.tensor([[1.0, 2.0]])
    b = torch.tensor([[2.0], [-4.0], [1.0]])
    a2, b2, pivots = pivot(a, b)
    assert pivots.tolist() == [False, True, False]
    assert a2.tolist() == [[-4.0, -8.0]]
    assert b2.tolist() == [[-0.5], [-0.25]]
    assert row_sources(pack_bits(pivots), 3, 1).tolist() == [1, 0, 2]


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(256, 256, 64), (256, 256, 140), (64, 172, 35), (172, 64, 35)])
def test_bfloat16_storage_costs_little_more_than_that_of_ordinary_factors(m, n, rank, decay):
    a, b = factors(m, n, rank, decay)
    a2, b2, pivots = pivot(a, b)
    ordinary = relative_norm(b.bfloat16().double() @ a.bfloat16().double() - b @ a, b @ a)
    pivoted = relative_norm(unpivot(b2.bfloat16().double(), pivots) @ a2.bfloat16().double() - b @ a, b @ a)
    # bfloat16 rounds by up to 2^-9 ≈ 0.002. Entries of B' may be larger than those of an orthogonal B.
    assert ordinary < 0.003
    assert pivoted < 0.007


def test_rank_deficient_factors_are_regular():
    a, b = factors(12, 10, 6)
    b[:, 3:] = 0  # leaves rank 3 of 6
    a2, b2, pivots = pivot(a, b)
    assert bool(b2.isfinite().all())
    torch.testing.assert_close(unpivot(b2, pivots) @ a2, b @ a)


def test_bad_factors_are_refused_with_the_reason():
    with pytest.raises(NumericalError, match="not finite"):
        pivot(torch.ones(2, 5), torch.full((4, 2), torch.nan))
    with pytest.raises(CompressionError, match="more columns than rows"):
        pivot(torch.ones(4, 5), torch.ones(2, 4))


def layer_of(sparse: str, dtype: torch.dtype = torch.float64) -> tuple[SparseLowRankLinear, SparseLowRankLinear]:
    """Build one random layer, 15 × 20 with rank 6, with ordinary and with pivoted factors."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"rows": (4, 20), "columns": (15, 5), "bitmask": (15, 20)}  # of the kept weights
    kept_rows = 4 if sparse == "rows" else 0
    kept_columns = 5 if sparse == "columns" else 0
    a, b = factors(15 - kept_rows, 20 - kept_columns, 6)
    weight = mask = None
    if sparse != "none":
        weight = torch.randn(shapes[sparse], dtype=torch.float64, generator=generator)
    if sparse == "bitmask":
        columns = torch.rand(15, 20, generator=generator).argsort(1)[:, :3]
        mask = torch.zeros(15, 20, dtype=torch.bool).scatter_(1, columns, True)
    bias = torch.randn(15, dtype=torch.float64, generator=generator)
    common = {"sparse": sparse, "weight": weight, "mask": mask, "bias": bias, "dtype": dtype}
    a2, b2, pivots = pivot(a, b)
    return (
        SparseLowRankLinear.from_parts(20, 15, lowrank_a=a, lowrank_b=b, **common),
        SparseLowRankLinear.from_parts(20, 15, lowrank_a=a2, lowrank_b=b2, pivots=pivots, **common),
    )


LAYOUTS = ["none", "rows", "columns", "bitmask"]


@pytest.mark.parametrize("sparse", LAYOUTS)
def test_the_layer_computes_what_ordinary_factors_compute(sparse):
    ordinary, pivoted = layer_of(sparse)
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(pivoted(x), ordinary(x))
    torch.testing.assert_close(pivoted.to_dense(), ordinary.to_dense())
    torch.testing.assert_close(pivoted(x), nn.functional.linear(x, pivoted.to_dense(), pivoted.bias))


@pytest.mark.parametrize("sparse", LAYOUTS)
def test_every_stored_bit_is_counted(sparse):
    ordinary, pivoted = layer_of(sparse)
    rows = 15 - (4 if sparse == "rows" else 0)
    for layer in (ordinary, pivoted):
        assert layer.stored_bits() == sum(tensor.nbytes * 8 for tensor in layer.state_dict().values())
    assert ordinary.stored_bits() - pivoted.stored_bits() == 6 * 6 * 64 - (rows + 7) // 8 * 8


@pytest.mark.parametrize("sparse", LAYOUTS)
def test_every_parameter_has_the_right_gradient(sparse):
    _, layer = layer_of(sparse)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *(value.detach().clone().requires_grad_() for value in values)))


def test_a_layer_compiles_copies_and_is_built_on_meta():
    torch.compiler.reset()
    _, layer = layer_of("bitmask", torch.float32)
    x = torch.randn(3, 20)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    skeleton = build_layer(layer.spec, 20, 15, device="meta", dtype=torch.float32)
    assert shapes_of(skeleton) == shapes_of(layer)
    skeleton.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(skeleton(x), layer(x))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 20000), st.sampled_from([0, 4]))
def test_a_budget_buys_the_largest_rank_that_fits(m, n, bits, lowrank_bits):
    spec = LayerSpec(pivoted=True, lowrank_bits=lowrank_bits, lowrank_group=8 if lowrank_bits else 0)
    rank = Budget(bits, m, n, 16).rank(spec)
    assert 0 <= rank <= min(m, n)
    assert rank == 0 or replace(spec, rank=rank).stored_bits(m, n, 16) <= bits
    assert rank == min(m, n) or replace(spec, rank=rank + 1).stored_bits(m, n, 16) > bits


def test_full_rank_stores_the_matrix_itself():
    matrix = torch.randn(6, 9, dtype=torch.float64)
    a2, b2, pivots = pivot(matrix, torch.eye(6, dtype=torch.float64))
    layer = SparseLowRankLinear.from_parts(9, 6, lowrank_a=a2, lowrank_b=b2, pivots=pivots)
    torch.testing.assert_close(layer.to_dense(), matrix)
    torch.testing.assert_close(layer(torch.eye(9, dtype=torch.float64)).T, matrix)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"rank": 0}, "rank"), ({"rank": 12, "sparse": "rows", "kept": 4}, "rank"), ({"pivoted": 1}, "pivoted")],
)
def test_impossible_specs_are_refused(change, field):
    valid = {"kind": "sparse_lowrank", "sparse": "none", "kept": 0, "rank": 3, "binary_rank": 0, "pivoted": True}
    values = valid | change
    with pytest.raises(CheckpointError, match=f"layer: {field} is"):
        LayerSpec.from_dict("layer", values).validate("layer", 15, 20)


def test_a_spec_without_the_field_is_not_pivoted():
    values = {"kind": "sparse_lowrank", "sparse": "none", "kept": 0, "rank": 3, "binary_rank": 0}
    assert LayerSpec.from_dict("layer", values) == LayerSpec(rank=3)
    assert "pivoted" not in LayerSpec(rank=3).to_dict()


def pivoted_half(weight: torch.Tensor, index: int) -> dict:
    """Return the pivoted factors of half the rank of a weight."""
    rank = min(weight.shape) // 2
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    a, b, pivots = pivot(S[:rank, None] * Vh[:rank], U[:, :rank])
    return {"lowrank_a": a, "lowrank_b": b, "pivots": pivots}


def test_a_checkpoint_opens_with_the_same_logits(tmp_path):
    model = llama_of(torch.bfloat16)
    replace_linears(model, "svd", parts_of=pivoted_half)
    tokens = torch.randint(0, 64, (2, 9))
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens).logits, logits)
