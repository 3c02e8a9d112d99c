"""Singular values of what a checkpoint stores, read from its files layer by layer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..compression.report import sampled_spectrum
from ..runtime.layers import CompressedLinear, build_layer
from ..runtime.safetensors_headers import weight_files
from ..runtime.validation import dense_shape


def stored_spectra(folder: Path, model: Any, specs: dict[str, Any], names: Iterable[str]) -> dict[str, list[float]]:
    """Spectra (see `sampled_spectrum`) of the matrices that some compressed layers multiply by.

    Args:
        model: the dense skeleton of the checkpoint, on the meta device. specs: what its layers store, by name.
        names: of the layers; only these are read.
    """
    owners: dict[str, str] = {}
    for file in weight_files(str(folder)):
        with safe_open(file, "pt") as tensors:
            owners |= dict.fromkeys(tensors.keys(), file)
    spectra = {}
    for name in names:
        layer = _read_layer(model, name, specs[name], owners)
        spectra[name] = sampled_spectrum(torch.linalg.svdvals(layer.to_dense(torch.float32)))
    return spectra


@torch.no_grad()
def _read_layer(model: Any, name: str, spec: Any, owners: dict[str, str]) -> CompressedLinear:
    out_features, in_features = dense_shape(model.get_submodule(name))
    layer = build_layer(spec, in_features, out_features, dtype=torch.float32)
    for tensor, target in layer.state_dict(keep_vars=True).items():
        if target.numel():
            with safe_open(owners[f"{name}.{tensor}"], "pt") as tensors:
                target.copy_(tensors.get_tensor(f"{name}.{tensor}"))
    return layer
