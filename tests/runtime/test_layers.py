"""A layer computes y = x Wᵀ + bias for the W of `to_dense()`, whatever it stores, and behaves like an `nn.Linear`."""

import copy
import pickle
import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_lowrank import CheckpointError, CompressionError, LayerSpec, SparseLowRankBinaryLinear, SparseLowRankLinear
from hf_lowrank.runtime.layers import build_layer

from .layer_cases import FLOAT_NAMES, LAYOUTS, bits_by_hand, dense_by_hand, layer_cases, make_spec, random_layer

RELATIVE_ERROR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Maximum ‖y − ŷ‖∞ / ‖y‖∞ by dtype: one rounding for every part of a layer, and one for the result."""

FULL = make_spec("bitmask", 5, rank=3, binary_rank=1, bias=True, adapter_rank=2)
# Together these layers have every layout of the sparse part, and every other part.
EVERY_PART = [
    FULL,
    make_spec("rows", 4, 3, 0, True, adapter_rank=2),
    make_spec("columns", 4, 3, 0, False),
    make_spec("none", 0, 3, 2, False),
]


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spec_id(spec: LayerSpec) -> str:
    return f"{spec.sparse}-{spec.rank}-{spec.binary_rank}"


def stored_parameters(layer: nn.Module) -> list[Tensor]:
    """Return all parameters but the empty `weight` of a layer that has no sparse part."""
    return [parameter for parameter in layer.parameters() if parameter.numel()]


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what the layer must give for x, in float64."""
    y = x.double() @ dense_by_hand(layer).T  # type: ignore[arg-type]
    return y if layer.bias is None else y + layer.bias.detach().double()  # type: ignore[operator, union-attr]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Fail unless two tensors are as close as roundings in `dtype` allow."""
    assert actual.shape == expected.shape
    scale = expected.abs().max() if expected.numel() else torch.tensor(1.0)
    assert torch.all((actual.double() - expected).abs() <= RELATIVE_ERROR[dtype] * scale)


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("binary_rank", [0, 1, 2])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("sparse", LAYOUTS)
def test_forward_is_the_dense_product(
    sparse: str, rank: int, binary_rank: int, bias: bool, dtype: torch.dtype
) -> None:
    layer = random_layer(make_spec(sparse, 7, rank, binary_rank, bias), 20, 27, dtype)
    x = tokens(5, 27, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, expected(layer, x), dtype)


@given(case=layer_cases(), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_any_layer_is_its_dense_matrix(case: tuple[LayerSpec, int, int], seed: int) -> None:
    spec, m, n = case
    layer = random_layer(spec, m, n, torch.float64, seed)
    dense = layer.to_dense()
    assert torch.allclose(dense, dense_by_hand(layer), rtol=1e-14, atol=1e-14)
    x = tokens(3, n, dtype=torch.float64)
    assert_close(layer(x), expected(layer, x), torch.float64)


@pytest.mark.parametrize(("m", "n"), [(172, 64), (64, 172), (352, 130), (130, 352), (1, 9), (9, 1)])
@pytest.mark.parametrize("sparse", LAYOUTS)
def test_a_layer_of_any_size_is_its_dense_matrix(sparse: str, m: int, n: int) -> None:
    kept = (m if sparse == "rows" else n) // 3
    layer = random_layer(make_spec(sparse, kept, 1, 1, False), m, n)
    x = tokens(2, n)
    assert_close(layer(x), expected(layer, x), torch.float32)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (4,), (2, 3), (2, 0, 3), (2, 1, 2, 2)])
@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_batch_shapes_are_free_forward_and_backward(spec: LayerSpec, shape: tuple[int, ...]) -> None:
    layer = random_layer(spec, 12, 11)
    x = tokens(*shape, 11).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, 12)
    assert_close(y, expected(layer, x.detach()), torch.float32)
    y.sum().backward()
    assert x.grad is not None
    assert_close(x.grad, dense_by_hand(layer).sum(dim=0).expand(x.shape), torch.float32)
    for parameter in stored_parameters(layer):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("binary_rank", [0, 1, 2])
@pytest.mark.parametrize("sparse", LAYOUTS)
def test_every_float_tensor_has_the_right_gradient(sparse: str, binary_rank: int) -> None:
    layer = random_layer(make_spec(sparse, 2, 2, binary_rank, bias=True), 4, 5, torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = tokens(2, 3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_half_precision_gradients_are_rounded_gradients(spec: LayerSpec, dtype: torch.dtype) -> None:
    layer = random_layer(spec, 12, 11, dtype)
    exact = copy.deepcopy(layer).double()  # the same rounded values, computed with in float64
    x = tokens(6, 11, dtype=dtype)
    layer(x).sum().backward()
    exact(x.double()).sum().backward()
    for parameter, reference in zip(stored_parameters(layer), stored_parameters(exact), strict=True):
        assert parameter.grad.dtype == dtype  # type: ignore[union-attr]
        assert_close(parameter.grad, reference.grad, dtype)  # type: ignore[arg-type]


def test_only_float_tensors_are_trainable() -> None:
    layer = random_layer(FULL, 8, 8)
    assert {name for name, _ in layer.named_parameters()} == set(FLOAT_NAMES)
    assert dict(layer.named_buffers()).keys() == {"weight_mask", "sign_bits"}


def test_training_keeps_the_sparsity() -> None:
    layer = random_layer(make_spec("bitmask", 3, 0, 0, False), 8, 9)
    zeros = layer.to_dense() == 0
    layer(tokens(4, 9)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1).step()
    assert torch.equal(layer.to_dense() == 0, zeros)


@pytest.mark.parametrize("spec", [FULL, make_spec("columns", 4, 3, 0, True)], ids=spec_id)
def test_a_layer_compiles_in_one_graph(spec: LayerSpec) -> None:
    layer = random_layer(spec, 10, 12)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = tokens(3, 12)
    y, compiled_y = layer(x), compiled(x)
    assert_close(compiled_y, y.detach().double(), torch.float32)
    y.sum().backward()
    compiled_y.sum().backward()
    for reference, parameter in zip(layer.parameters(), compiled.parameters(), strict=True):
        assert_close(parameter.grad, reference.grad.double(), torch.float32)  # type: ignore[union-attr, arg-type]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler, which inductor needs")
def test_a_layer_compiles_with_inductor() -> None:
    layer = random_layer(FULL, 10, 12).requires_grad_(False)
    x = tokens(3, 12)
    assert_close(torch.compile(layer, fullgraph=True)(x), layer(x).double(), torch.float32)


def pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(spec: LayerSpec, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = random_layer(spec, 12, 11)
    twin = copied(layer)
    x = tokens(3, 11)
    assert type(twin) is type(layer)
    assert twin.spec == layer.spec
    assert torch.equal(twin(x), layer(x))
    before = layer(x)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_state_goes_through_safetensors_into_a_meta_skeleton(spec: LayerSpec, dtype: torch.dtype) -> None:
    layer = random_layer(spec, 12, 11, dtype)
    skeleton = build_layer(spec, 11, 12, device="meta", dtype=dtype)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    skeleton.load_state_dict(load(save(layer.state_dict())), strict=True, assign=True)
    x = tokens(3, 11, dtype=dtype)
    assert torch.equal(skeleton(x), layer(x))


@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_a_dtype_change_leaves_masks_and_signs_alone(spec: LayerSpec) -> None:
    layer = random_layer(spec, 12, 11)
    # A layer without a sparse part has an empty buffer in its place.
    bits = {name: buffer.clone() for name, buffer in layer.named_buffers() if buffer.numel()}
    layer.to(torch.bfloat16)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    for name, before in bits.items():
        assert before.dtype == torch.uint8
        assert torch.equal(layer.get_buffer(name), before)


def test_a_new_layer_is_a_valid_one() -> None:
    layer = SparseLowRankBinaryLinear(11, 12, sparse="bitmask", kept=4, rank=2, binary_rank=2, bias=True)
    assert torch.isfinite(layer.to_dense()).all()
    assert_close(layer(tokens(2, 11)), expected(layer, tokens(2, 11)), torch.float32)


@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_a_layer_is_an_nn_linear_of_the_dense_shape(spec: LayerSpec) -> None:
    layer = random_layer(spec, 12, 11)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (11, 12)
    assert (layer.bias is not None) == spec.bias
    assert layer.weight.shape != (12, 11)


def test_repr_says_what_is_stored() -> None:
    text = repr(random_layer(FULL, 16, 16))
    sizes = ("in_features=16", "out_features=16", "5 of 16", "rank=5", "adapter_rank=2", "binary_rank=1")
    for part in (*sizes, "bitmask", "bias=True"):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_stored_bits_are_the_bytes_of_the_state(spec: LayerSpec) -> None:
    layer = random_layer(spec, 12, 11, torch.bfloat16)
    assert layer.stored_bits() == 8 * sum(tensor.numel() * tensor.itemsize for tensor in layer.state_dict().values())


@given(
    m=st.integers(1, 9),
    n=st.integers(2, 12),
    density=st.floats(0, 0.9),
    bias=st.booleans(),
    dtype=st.sampled_from(list(RELATIVE_ERROR)),
)
@settings(deadline=None)
def test_from_dense_is_exact(m: int, n: int, density: float, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(m * 100 + n)
    weight = torch.randn(m, n, generator=generator) * (torch.rand(m, n, generator=generator) < density)
    weight[:, 0] = 0  # at least one column is not kept
    weight = weight.to(dtype)
    bias_values = torch.randn(m, generator=generator).to(dtype) if bias else None
    layer = SparseLowRankLinear.from_dense(weight, bias_values)
    assert torch.equal(layer.to_dense(), weight)
    assert layer.weight.dtype == dtype
    if bias_values is None:
        assert layer.bias is None
    else:
        assert torch.equal(layer.bias, bias_values)


def test_from_dense_refuses_a_matrix_without_zeros() -> None:
    with pytest.raises(CompressionError, match="keep it as a dense"):
        SparseLowRankLinear.from_dense(torch.ones(3, 4))


@given(case=layer_cases(max_side=12, max_adapter_rank=0), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_from_parts_inverts_taking_apart(case: tuple[LayerSpec, int, int], dtype: torch.dtype) -> None:
    spec, m, n = case
    if not (spec.sparse != "none" or spec.rank or spec.binary_rank or spec.bias):
        return  # there is no part to build it from
    layer = random_layer(spec, m, n, dtype)
    parts = {name: parameter for name, parameter in layer.named_parameters() if name != "weight"}
    if spec.sparse == "bitmask":
        sparse_only = random_layer(make_spec("bitmask", spec.kept, 0, 0, False), m, n)
        sparse_only.load_state_dict({name: getattr(layer, name) for name in ("weight", "weight_mask")})
        mask = bits_by_hand(layer.weight_mask, n)
        parts |= {"weight": sparse_only.to_dense(dtype), "mask": mask}
    elif spec.sparse != "none":
        parts["weight"] = layer.weight
    if spec.binary_rank:
        parts["signs"] = bits_by_hand(layer.sign_bits, n)
    rebuilt = SparseLowRankLinear.from_parts(n, m, sparse=spec.sparse, **parts)
    assert type(rebuilt) is type(layer)
    assert rebuilt.spec == spec
    for name, tensor in layer.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor), name


def test_parts_are_rounded_once_to_the_dtype_asked_for() -> None:
    a, b = tokens(2, 6, dtype=torch.float64), tokens(5, 2, dtype=torch.float64)
    layer = SparseLowRankLinear.from_parts(6, 5, lowrank_a=a, lowrank_b=b, dtype=torch.bfloat16)
    assert torch.equal(layer.lowrank_a, a.bfloat16())
    assert torch.equal(layer.lowrank_b, b.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_autocast_does_as_for_an_nn_linear(spec: LayerSpec, dtype: torch.dtype) -> None:
    layer = random_layer(spec, 12, 11)
    linear = nn.Linear(11, 12, bias=spec.bias)
    if dtype == torch.float64:  # autocast leaves float64 alone
        layer, linear = layer.double(), linear.double()
    x = tokens(3, 11, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype
    assert_close(y, expected(layer, x), torch.bfloat16)
    y.sum().backward()
    for parameter in stored_parameters(layer):
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"sparse": "diagonal"}, "sparse"),
        ({"sparse": "bitmask", "kept": 8}, "kept"),
        ({"sparse": "rows", "kept": 6}, "kept"),
        ({"kept": 1}, "kept"),
        ({"rank": 7}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 1.0}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 1, "adapter_rank": 2}, "rank"),
        ({"rank": 9, "adapter_rank": 2}, "rank"),
        ({"rank": 15, "adapter_rank": 15}, "adapter_rank"),
        ({"bias": 1}, "bias"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments: dict, field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"SparseLowRankLinear: {field} is .*, expected "):
        SparseLowRankLinear(8, 6, **arguments)


@pytest.mark.parametrize("spec", [FULL, EVERY_PART[3]], ids=spec_id)
def test_a_state_dict_with_averaged_bits_is_refused(spec: LayerSpec) -> None:
    """The average over all tensors of two checkpoints is a valid one of a dense layer, but not of packed bits."""
    layer, other = random_layer(spec, 6, 8), random_layer(spec, 6, 8, seed=1)
    averages = {name: (tensor + other.state_dict()[name]) / 2 for name, tensor in layer.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    model = nn.Sequential(layer)
    with pytest.raises(CompressionError, match=r"^0\.\w+: packed bits as torch.float32, expected torch.uint8; "):
        model.load_state_dict({f"0.{name}": tensor for name, tensor in averages.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    floats_only = {name: averages[name] if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    model.load_state_dict({f"0.{name}": tensor for name, tensor in floats_only.items()})
    assert torch.equal(layer.scale_in, averages["scale_in"])


@pytest.mark.parametrize("spec", EVERY_PART, ids=spec_id)
def test_a_layer_that_refuses_to_be_pruned_is_unchanged(spec: LayerSpec) -> None:
    """torch's pruning registers a `weight_mask` of its own, in the place of the layer's."""
    layer = random_layer(spec, 6, 8)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = tokens(2, 8)
    y = layer(x)
    with pytest.raises(CompressionError, match="^weight: torch.nn.utils works on the dense weight"):
        prune.random_unstructured(layer, "weight", 1)
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer(x), y)
