"""Exports to compressed-tensors: `pack-quantized` integers, which Transformers and vLLM open without this package.

Only 4 and 8 bits are written. Other widths are packed differently by different versions of the library, and engines
compute no others. A layer of b bits takes 4 of them up to b = 3, as its integers have a sign (`integers`), and 8 up to
b = 7. What is not quantized, or in 8 bits, is dense.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.checksums import CONFIG
from ..runtime.companions import carry_over
from ..runtime.errors import CompressionError
from ..runtime.experts import ExpertBank
from ..runtime.layers import CompressedLinear
from ..runtime.quantization import pack_codes
from .integers import Integers, integers_of, reason_against
from .report import ExportedLayer, check_exact

TARGET = "compressed-tensors"
WIDTHS = (4, 8)
LEAST_GROUP = 16
"""Values that share a scale. In smaller groups, scales take more than a dense layer saves."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines fuse into one, for which all of them have to have the same form."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a layer is packed: bits of an integer, and values that share a scale (0: all of a row)."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.bits} bits, " + (f"groups of {self.group}" if self.group else "a scale per row")


def write(model: PreTrainedModel, folder: Path, exact: bool = False) -> list[ExportedLayer]:
    """Write a compressed model, which becomes dense by that, and return what became of its layers.

    Raises:
        CompressionError: if no layer can be packed, or not all of them though `exact` was asked for.
    """
    specs = {name: layer.spec for name, layer in _compressed_layers(model).items()}
    integers = _integers(model)
    forms = _forms(integers)
    layers = []
    for name, spec in specs.items():
        if name in forms:
            layers.append(ExportedLayer(name, str(forms[name])))
        else:
            reason = "an expert of a mixture" if _is_expert(model, name) else reason_against(spec)
            layers.append(ExportedLayer(name, "dense", f"the format does not hold {reason}"))
    if exact:
        check_exact(layers, TARGET)
    if not forms:
        raise CompressionError(
            f"{TARGET}: holds none of the compressed layers, which are {layers[0].loss or 'dense'}; "
            "hf-lowrank dense DIR -o OUT writes all of them dense"
        )
    packed = {name: pack(integers[name], form) for name, form in forms.items()}
    model.dequantize()
    state = model.state_dict()
    for name, tensors in packed.items():
        del state[f"{name}.weight"]
        state.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
    model.save_pretrained(folder, state_dict=state)
    carry_over(model, folder)
    _write_config(model, folder, forms)
    return layers


def pack(integers: Integers, form: Form) -> dict[str, Tensor]:
    """Return the tensors of a packed layer: `weight_packed`, `weight_scale` and `weight_shape`."""
    m, n = integers.values.shape
    codes = (integers.values + 2 ** (form.bits - 1)).to(torch.uint8)
    stream = pack_codes(codes, form.bits).squeeze(2)
    words = nn.functional.pad(stream, (0, -stream.shape[1] % 4)).contiguous().view(torch.int32)
    repeats = integers.group // (form.group or n)
    scale = integers.steps.repeat_interleave(repeats, dim=1)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([m, n])}


def _compressed_layers(model: PreTrainedModel) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def _is_expert(model: PreTrainedModel, name: str) -> bool:
    """Return whether a layer is stored as one of the fused experts of a mixture."""
    parents = [name.rsplit(".", steps)[0] for steps in range(1, name.count(".") + 1)]
    return any(isinstance(model.get_submodule(parent), ExpertBank) for parent in parents)


def _integers(model: PreTrainedModel) -> dict[str, Integers]:
    """Return the integers of the layers that the format can hold."""
    held = {}
    for name, layer in _compressed_layers(model).items():
        integers = None if layer.replaces_conv1d or _is_expert(model, name) else integers_of(layer)
        if integers is None or integers.bits >= WIDTHS[-1]:
            continue
        if integers.group >= min(LEAST_GROUP, layer.in_features):
            held[name] = integers
    return held


def _forms(integers: dict[str, Integers]) -> dict[str, Form]:
    """Return the form of every layer. Layers that engines fuse get the same one, if all of them can be packed."""
    forms = {}
    for name, layer in integers.items():
        bits = next(width for width in WIDTHS if layer.bits < width)
        forms[name] = Form(bits, 0 if layer.group == layer.values.shape[1] else layer.group)
    for name in list(forms):
        parent, _, own_name = name.rpartition(".")
        siblings = [f"{parent}.{other}" for fused in FUSED if own_name in fused for other in fused]
        present = [forms[sibling] for sibling in siblings if sibling in forms]
        if len({*present}) > 1:
            # More bits hold the same values, and smaller groups repeat their scales.
            bits = max(form.bits for form in present)
            group = math.gcd(*(form.group or integers[name].values.shape[1] for form in present))
            forms |= {sibling: Form(bits, group) for sibling in siblings if sibling in forms}
    return forms


def _write_config(model: PreTrainedModel, folder: Path, forms: dict[str, Form]) -> None:
    """Add to config.json how the layers are packed, in the words of the library."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups = {}
    for index, form in enumerate(dict.fromkeys(forms.values())):
        groups[f"group_{index}"] = {
            "targets": [name for name in forms if forms[name] == form],
            "weights": _weights(form),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    file = folder / CONFIG
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in forms],
        "kv_cache_scheme": None,
    }
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weights(form: Form) -> dict[str, Any]:
    return {
        "num_bits": form.bits,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if form.group else "channel",
        "group_size": form.group or None,
    }
