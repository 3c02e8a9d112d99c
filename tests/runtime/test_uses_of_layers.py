"""Other programs use a compressed layer, and what it returns, as they use an `nn.Linear`.

They change outputs in place, differentiate twice, transform, trace and wrap a layer. Each law holds for every kind of
layer, in plain torch and with the kernels.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from hf_lowrank import CompressedLinear, CompressionError, kernels
from hf_lowrank.kernels.cpu import native

from .every_layer import EVERY_LAYER, SOME_LAYERS, M, N

SHAPES = ((), (1,), (5,), (64,), (2, 3), (2, 40), (0,), (2, 0, 3))
BACK_ENDS = ["plain", pytest.param("kernels", marks=pytest.mark.skipif(not native.library_path(), reason="not built"))]
every_layer = pytest.mark.parametrize("name", EVERY_LAYER)
some_layers = pytest.mark.parametrize("name", SOME_LAYERS)


@pytest.fixture(params=BACK_ENDS, autouse=True)
def back_end(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "kernels":
        kernels.load()
    yield request.param
    kernels.unload()


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense_product(layer: CompressedLinear, x: Tensor) -> Tensor:
    """Return what the `nn.Linear` that the layer stands for returns."""
    return F.linear(x, layer.to_dense(x.dtype), None if layer.bias is None else layer.bias.detach().to(x.dtype))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * max(float(expected.detach().abs().max()), 1))


# --- outputs and gradients are tensors of their own ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in EVERY_LAYER), *product(SOME_LAYERS, (torch.bfloat16, torch.float64))],
    ids=str,
)
def test_outputs_and_gradients_may_be_changed_in_place(name: str, dtype: torch.dtype) -> None:
    layer = EVERY_LAYER[name]().to(dtype)
    for shape in SHAPES:
        x = tokens(*shape, dtype=dtype).requires_grad_()
        stored = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        y = layer(x)
        assert y._base is None, shape
        before = y.detach().clone()
        y += 1
        assert torch.equal(y, before + 1)
        y.sum().backward()
        with torch.no_grad():
            z = layer(x)
            assert z._base is None, shape
            z.fill_(7)
        gradients = [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.numel())]
        for gradient in gradients:
            assert gradient is not None and gradient._base is None, shape
            gradient += 1
        assert len({gradient.data_ptr() for gradient in gradients if gradient.numel()}) == sum(
            gradient.numel() > 0 for gradient in gradients
        )
        layer.zero_grad()
        assert torch.equal(x.detach(), tokens(*shape, dtype=dtype))
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, stored[key]), key


@some_layers
def test_hooks_and_recomputed_parts_may_change_an_output_in_place(name: str) -> None:
    layer = EVERY_LAYER[name]()
    layer.register_forward_hook(lambda module, arguments, output: output.add_(1))
    for reentrant in (False, True):
        x = tokens(2, 30).requires_grad_()
        y = checkpoint(lambda x: layer(x).mul_(2), x, use_reentrant=reentrant)
        assert_close(y, 2 * (dense_product(layer, x) + 1))
        y.sum().backward()
        assert_close(x.grad, 2 * layer.to_dense().sum(dim=0).expand(2, 30, N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@some_layers
def test_outputs_under_autocast_may_be_changed_in_place(name: str, dtype: torch.dtype) -> None:
    layer = EVERY_LAYER[name]()
    for count in (1, 64):
        with torch.autocast("cpu", dtype=dtype):
            y = layer(tokens(count))
            y += 1
            loss = y.float().sum()
        assert y.dtype == dtype
        loss.backward()
        with torch.autocast("cpu", dtype=dtype), torch.no_grad():
            assert layer(tokens(count)).add_(1).dtype == dtype


@pytest.mark.parametrize("name", ["slab", "rows+pivoted, 4 bits", "columns-0-3"])
def test_a_compiled_layer_keeps_its_operation_and_its_output_may_be_changed_in_place(name: str) -> None:
    layer = EVERY_LAYER[name]()
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x).add_(1), fullgraph=True, backend=record)
    assert_close(compiled(tokens(30)), dense_product(layer, tokens(30)) + 1)
    assert any("hf_lowrank" in target for target in targets)

    compiled = torch.compile(lambda x: layer(x).add_(1), fullgraph=True, backend="aot_eager")
    x = tokens(30).requires_grad_()
    compiled(x).sum().backward()
    assert_close(x.grad, layer.to_dense().sum(dim=0).expand(30, N))


# --- derivatives and transforms -----------------------------------------------------------------------------------


@every_layer
def test_second_derivatives_are_those_of_the_steps(name: str) -> None:
    layer = EVERY_LAYER[name]().double()
    names = [key for key, parameter in layer.named_parameters() if parameter.numel()]

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [layer.get_parameter(key) for key in names]
    inputs = (tokens(2, dtype=torch.float64).requires_grad_(), *parameters)
    assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=True)


@every_layer
def test_transforms_of_torch_func_are_those_of_a_linear_layer(name: str) -> None:
    layer = EVERY_LAYER[name]()
    dense, x = layer.to_dense(), tokens(3)
    tangent = tokens(2, 3)[1]
    assert_close(vmap(layer, in_dims=1)(tokens(4, 3)), dense_product(layer, tokens(4, 3).transpose(0, 1)))
    assert_close(jvp(layer, (x,), (tangent,))[1], F.linear(tangent, dense))
    assert_close(jacrev(layer)(x[0]), dense)
    outputs = dense_product(layer, x[0])
    assert_close(hessian(lambda x: layer(x).pow(3).sum())(x[0]), dense.T @ torch.diag(6 * outputs) @ dense)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, tangent))
        assert_close(forward_ad.unpack_dual(y).tangent, F.linear(tangent, dense))
    with torch.no_grad():
        assert_close(vmap(layer)(tokens(3, 64)), dense_product(layer, tokens(3, 64)))


@some_layers
def test_parameters_may_be_vmapped_too(name: str) -> None:
    layers = [EVERY_LAYER[name]() for _ in range(3)]
    parameters, buffers = stack_module_state(layers)

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layers[0], (parameters, buffers), (x,))

    y = vmap(forward, in_dims=(0, 0, None))(parameters, buffers, tokens(4))
    for output, layer in zip(y, layers, strict=True):
        assert_close(output, dense_product(layer, tokens(4)))


@some_layers
def test_gradients_per_sample_add_up(name: str) -> None:
    layer = EVERY_LAYER[name]()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    parameters = dict(layer.named_parameters())
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, tokens(3))
    for key, gradient in grad(loss)(parameters, tokens(3)).items():
        assert_close(per_sample[key].sum(dim=0), gradient)


# --- whoever watches the operations ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recorded", [True, False])
@some_layers
def test_a_trace_computes_from_its_own_input(name: str, recorded: bool) -> None:
    """No result of a kernel becomes a constant of the graph."""
    layer = EVERY_LAYER[name]()
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(layer, tokens(2))
        graph = make_fx(lambda x: layer(x))(tokens(2))
    assert "hf_lowrank::" not in str(traced.inlined_graph)
    x = 2 * tokens(2)
    assert_close(traced(x), dense_product(layer, x))
    assert_close(graph(x), dense_product(layer, x))


# --- placement, wrappers, refusals ----------------------------------------------------------------------------------


@some_layers
def test_the_default_device_is_not_that_of_the_computation(name: str) -> None:
    layer = EVERY_LAYER[name]()
    inputs = [tokens(1), tokens(64)]
    expected = [dense_product(layer, x) for x in inputs]
    with torch.device("meta"):
        outputs = [layer(x.requires_grad_()) for x in inputs]
        outputs[1].sum().backward()
        with torch.no_grad():
            outputs += [layer(x) for x in inputs]
    for y, reference in zip(outputs, expected * 2, strict=True):
        assert_close(y, reference)


@every_layer
def test_a_layer_without_memory_gives_the_shape(name: str) -> None:
    y = EVERY_LAYER[name]().to("meta")(torch.empty(2, 3, N, device="meta"))
    assert y.is_meta and y.shape == (2, 3, M)


@every_layer
def test_an_input_of_another_width_or_type_is_refused(name: str) -> None:
    layer = EVERY_LAYER[name]()
    for x in (torch.randn(3, N + 1), torch.randn(64, N + 1), torch.randn(3, N - 1), torch.tensor(1.0)):
        for recorded in (True, False):
            with (
                torch.set_grad_enabled(recorded),
                pytest.raises(CompressionError, match=r"has the shape .*, expected"),
            ):
                layer(x)
    with pytest.raises(CompressionError, match="expected a floating-point tensor"):
        layer(torch.ones(2, N, dtype=torch.int64))


@some_layers
def test_a_layer_moves_to_shared_memory(name: str) -> None:
    layer = EVERY_LAYER[name]().share_memory()
    assert all(tensor.is_shared() for tensor in layer.state_dict().values() if tensor.numel())
    with torch.no_grad():
        y = layer(tokens(1)).share_memory_()
    assert y.is_shared()
    assert_close(y, dense_product(layer, tokens(1)))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_a_layer_trains_inside_ddp_and_fsdp(tmp_path: Path, back_end: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrappers = 1 if torch.__version__.startswith("2.6") else 2  # whose FSDP needs the streams of a GPU
        for name in SOME_LAYERS:
            layer = EVERY_LAYER[name]()
            sharded = nn.Sequential(copy.deepcopy(layer), nn.Linear(M, M))
            fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
            fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
            for model in (nn.parallel.DistributedDataParallel(layer), sharded)[:wrappers]:
                before = [parameter.detach().clone() for parameter in model.parameters()]
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                y = model(tokens(60))
                y += 1
                y.square().mean().backward()
                optimizer.step()
                after = list(model.parameters())
                assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), name
    finally:
        dist.destroy_process_group()
