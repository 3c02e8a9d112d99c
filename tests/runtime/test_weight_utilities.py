"""What changes or averages the weights of an `nn.Linear` either does the same to a compressed layer, or is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_lowrank import CompressedLinear, CompressionError

from .every_layer import EVERY_LAYER, N

UTILITIES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "l1_unstructured": lambda layer, name: prune.l1_unstructured(layer, name, 0.3),
    "random_unstructured": lambda layer, name: prune.random_unstructured(layer, name, 0.3),
    "ln_structured": lambda layer, name: prune.ln_structured(layer, name, 0.3, n=2, dim=0),
    "identity": prune.identity,
    "parametrize": lambda layer, name: parametrize.register_parametrization(layer, name, nn.Identity()),
}
FLOAT_WEIGHTS = [name for name, make in EVERY_LAYER.items() if make().weight.dim() == 2]
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def tokens() -> Tensor:
    return torch.randn(4, N, generator=torch.Generator().manual_seed(1))


def computes_what_it_stands_for(layer: CompressedLinear) -> bool:
    y = layer(tokens())
    expected = nn.functional.linear(tokens(), layer.to_dense(), layer.bias)
    return torch.allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("name", FLOAT_WEIGHTS)
def test_what_works_on_a_dense_weight_is_refused_and_leaves_the_layer_as_it_was(name: str, utility: str) -> None:
    layer = EVERY_LAYER[name]()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(CompressionError, match="works on the dense weight of a layer"):
        UTILITIES[utility](layer, "weight")
    assert type(layer) is type(EVERY_LAYER[name]())
    assert [*layer.state_dict()] == [*before] or utility.startswith("old")  # these take it away before they ask
    assert "old" in utility or computes_what_it_stands_for(layer)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("name", ["full, 2 bits", "bitmask, 6 bits", "columns+lowrank, 5 bits"])
def test_packed_codes_are_never_changed(name: str, utility: str) -> None:
    layer = EVERY_LAYER[name]()
    with pytest.raises((CompressionError, RuntimeError, KeyError)):  # torch refuses some of them itself
        UTILITIES[utility](layer, "weight")
    assert computes_what_it_stands_for(layer)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("name", ["none-0-3", "rows-2-3", "columns-0-3", "bitmask-2-3", "pivoted"])
def test_a_part_that_is_named_is_what_is_changed(name: str, utility: str) -> None:
    """The layer computes with the matrix that the utility puts there, and trains what is behind it."""
    layer = EVERY_LAYER[name]().eval()
    UTILITIES[utility](layer, "lowrank_a")
    assert computes_what_it_stands_for(layer)
    layer(tokens()).sum().backward()
    assert any("lowrank_a" in key and parameter.grad is not None for key, parameter in layer.named_parameters())


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", EVERY_LAYER)
def test_averaged_weights_are_the_average_and_the_bits_stay(name: str, use_buffers: bool) -> None:
    layer = EVERY_LAYER[name]()
    bits = {key: buffer.clone() for key, buffer in layer.named_buffers()}
    start = {key: parameter.detach().clone() for key, parameter in layer.named_parameters()}
    averages = [AveragedModel(layer, use_buffers=use_buffers)]
    if not use_buffers:
        averages.append(AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5)))
    for _ in range(2):
        for average in averages:
            average.update_parameters(layer)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(1.0)
    for average in averages:
        assert computes_what_it_stands_for(average.module)
        for key, parameter in average.module.named_parameters():
            torch.testing.assert_close(parameter, start[key] + 0.5)
        for key, buffer in average.module.named_buffers():
            assert torch.equal(buffer, bits[key])


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_an_average_of_all_tensors_of_two_layers_is_refused(name: str) -> None:
    layer, other = EVERY_LAYER[name](), EVERY_LAYER[name]()
    pairs = zip(layer.state_dict().items(), other.state_dict().values(), strict=True)
    average = {key: (one + two) / 2 for (key, one), two in pairs}
    bits = {key: buffer for key, buffer in layer.named_buffers() if buffer.dtype == torch.uint8}
    if not bits:
        layer.load_state_dict(average)
        assert computes_what_it_stands_for(layer)
        return
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(CompressionError, match="packed bits as torch.float32, expected torch.uint8"):
        layer.load_state_dict(average)
    assert all(torch.equal(bits[key], before[key]) for key in bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVERY_LAYER)
def test_bytes_that_were_loaded_as_floats_are_bytes_again(name: str, dtype: torch.dtype) -> None:
    """The oldest versions of transformers cast all tensors of modules that stay in float32, as T5 has them."""
    layer = EVERY_LAYER[name]()
    expected = copy.deepcopy(layer.state_dict())
    for key, buffer in layer.named_buffers():
        setattr(layer, key, buffer.to(dtype))
    layer.restore_bytes()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype))
        assert tensor.dtype == expected[key].dtype or not tensor.numel()
