"""Exports to compressed-tensors hold the values of the checkpoint, and say of every linear layer how it is stored.

What is decoded here by the words of the format, the library itself decodes in `tests/serving/engine`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import CompressedLinear, CompressionConfig, CompressionError, cli, compress, export
from hf_lowrank.exporting.compressed_tensors import FUSED, Form, pack
from hf_lowrank.exporting.integers import integers_of
from hf_lowrank.runtime.layers import SparseLowRankLinear
from hf_lowrank.runtime.quantization import BITS, quantize
from tests.support import tiny_models
from tests.support.compressed import RECIPES, compressed_model


def rounded(bits: dict[str, int], group: int = 32, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a Llama whose layers are rounded to so many bits each, by the ends of their names; others stay dense."""
    model = tiny_models.llama(dtype=dtype, num_hidden_layers=1, hidden_size=64, intermediate_size=112)
    config = CompressionConfig(method="rtn", options={"bits": 8, "group_size": group}, samples=2, sequence_length=8)
    compress(model, config, calibration=[tiny_models.token_ids(2, 8)], progress=False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear):
            width = next((count for end, count in bits.items() if name.endswith(end)), None)
            if width is not None:
                weight = quantize(layer.to_dense(torch.float64), width, group)
                model.set_submodule(
                    name,
                    SparseLowRankLinear.from_parts(layer.in_features, layer.out_features, "full", weight, dtype=dtype),
                )
    return model


def decoded(tensors: dict[str, Tensor], name: str, weights: dict[str, Any]) -> Tensor:
    """Return a packed matrix by the words of the format: integers from the lowest bits up, times their scales."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    bits = weights["num_bits"]
    words = tensors[f"{name}.weight_packed"].long() & 0xFFFFFFFF
    shifts = torch.arange(0, 32, bits)
    integers = ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)[:, :columns] - 2 ** (bits - 1)
    scale = tensors[f"{name}.weight_scale"]
    group = weights["group_size"] or columns
    assert scale.shape == (rows, columns // group) and weights["symmetric"]
    return integers.to(scale.dtype) * scale.repeat_interleave(group, dim=1)


def exported(folder: Path, output: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, dict[str, Any]]]:
    """Export a checkpoint, and return the tensors, the config, and how each packed layer is packed."""
    export(folder, output, "compressed-tensors")
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    packed = {name: group["weights"] for group in config["config_groups"].values() for name in group["targets"]}
    return load_file(output / "model.safetensors"), config, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [16, 32, 48, 200])
@pytest.mark.parametrize("bits", BITS[:-1])
def test_packed_integers_are_the_values_of_the_layer(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = SparseLowRankLinear.from_parts(96, 5, "full", quantize(weight, bits, group), dtype=dtype)
    integers = integers_of(layer)
    assert integers is not None and integers.bits == bits
    for width in (4, 8):
        if bits < width:
            form = Form(width, 0 if integers.group == 96 else 16)
            tensors = {f"layer.{name}": tensor for name, tensor in pack(integers, form).items()}
            weights = {"num_bits": width, "group_size": form.group or None, "symmetric": True}
            assert torch.equal(decoded(tensors, "layer", weights), layer.to_dense())


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("slab-gpt2", "quantized")])
def test_a_model_without_a_layer_that_it_holds_is_refused(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = compressed_model(name, tmp_path_factory).folder
    with pytest.raises(CompressionError, match=r"^compressed-tensors: holds none of .*hf-lowrank dense.*$"):
        export(folder, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_every_tensor_has_the_value_of_the_dense_model(tmp_path: Path) -> None:
    """Every linear layer is packed, or listed as dense; layers that engines fuse are packed alike."""
    widths = {"q_proj": 3, "k_proj": 4, "v_proj": 2, "o_proj": 7, "gate_proj": 3, "up_proj": 3}
    model = rounded(widths)
    model.save_pretrained(tmp_path / "model")
    tensors, config, packed = exported(tmp_path / "model", tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model").dequantize()
    linears = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)]
    assert sorted([*packed, *config["ignore"]]) == sorted(linears)
    assert {name.rsplit(".")[-1] for name in packed} == {*widths}  # 8 bits are one too many for down_proj
    for name, tensor in dense.state_dict().items():
        layer = name.removesuffix(".weight")
        assert torch.equal(tensor, decoded(tensors, layer, packed[layer]) if layer in packed else tensors[name])
    for fused in FUSED:
        forms = {json.dumps(form, sort_keys=True) for name, form in packed.items() if name.endswith(fused)}
        assert len(forms) == 1
    summary = export(tmp_path / "model", tmp_path / "again", "compressed-tensors").summary()
    assert (1, "dense", "the format does not hold 8 bits in groups of 32") in summary


def test_the_tokenizer_comes_along_and_nothing_of_this_package(tmp_path: Path) -> None:
    model = rounded({"_proj": 4})
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", "compressed-tensors")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith(".py")]
    assert "hf_lowrank" not in (tmp_path / "out" / "config.json").read_text()


def test_exact_refuses_a_dense_layer_and_leaves_nothing(tmp_path: Path) -> None:
    rounded({"q_proj": 4}).save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--format", "compressed-tensors"]
    done = CliRunner().invoke(cli.app, [*command, "--exact"])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1
    assert "--exact: compressed-tensors does not hold model.layers.0.self_attn.k_proj exactly" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0 and "8 bits, groups of 32" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx"], "format 'onnx': expected one of compressed-tensors, gguf"),
        (["--format", "compressed-tensors", "--dense-type", "q8_0"], "dense type q8_0: only gguf has it"),
        (["--format", "gguf", "--dense-type", "q9"], "dense type 'q9': expected one of"),
        (["--format", "compressed-tensors"], "is not compressed by hf_lowrank"),
        (["--format", "gguf"], "is not compressed by hf_lowrank"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    dense = tiny_models.saved(tiny_models.llama(num_hidden_layers=1), tmp_path / "dense")
    done = CliRunner().invoke(cli.app, ["export", str(dense), "-o", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and message in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]
