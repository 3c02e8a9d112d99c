"""Whatever way a checkpoint is saved and opened with the package, the same model comes back bit for bit."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank import CheckpointError, CompressedLinear, CompressionConfig, CompressionError, LayerSpec, compress
from hf_lowrank.runtime.checksums import LOADING_CODE
from hf_lowrank.runtime.layers import build_layer
from hf_lowrank.runtime.quantizer import CompressionQuantizer, attach, swap_module
from tests.support import tiny_models
from tests.support.fresh_process import open_elsewhere
from tests.support.torchrun import torchrun_variables

from .conftest import Checkpoint, answer, calibration, tiny_llama

ALL = ["slab", "sola", "svd", "gpt2"]
"""Names of the fixtures in `conftest.py`, one of every layout."""


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """The checkpoint of the fixture that the test names."""
    return request.getfixturevalue(request.param)


def compressed_layers(model: nn.Module) -> dict[str, LayerSpec]:
    return {name: module.spec for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def assert_same(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    assert type(model) is type(checkpoint.model)
    assert compressed_layers(model) == compressed_layers(checkpoint.model)
    assert torch.equal(answer(model), checkpoint.logits)


@pytest.mark.parametrize("checkpoint", ALL, indirect=True)
def test_the_native_class_comes_back_with_equal_logits(checkpoint: Checkpoint) -> None:
    assert_same(AutoModelForCausalLM.from_pretrained(checkpoint.folder), checkpoint)


@pytest.mark.parametrize("checkpoint", ALL, indirect=True)
def test_a_loaded_model_is_saved_again_as_it_was(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.load().save_pretrained(tmp_path / "again")
    assert_same(checkpoint.load().from_pretrained(tmp_path / "again"), checkpoint)
    for name in ("model.safetensors", LOADING_CODE):
        assert (tmp_path / "again" / name).read_bytes() == (checkpoint.folder / name).read_bytes()
    first = json.loads((checkpoint.folder / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == first


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_changes_nothing(slab: Checkpoint, device_map: object) -> None:
    assert_same(slab.load(device_map=device_map), slab)


@pytest.mark.parametrize("checkpoint", ["slab", "gpt2"], indirect=True)
def test_shards_open_as_one_file_does(checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), checkpoint)


@pytest.mark.parametrize("checkpoint", ["slab", "sola"], indirect=True)
def test_another_dtype_rounds_the_values_and_leaves_the_bits(checkpoint: Checkpoint) -> None:
    loaded = checkpoint.load(dtype=torch.bfloat16)
    expected = copy.deepcopy(checkpoint.model).to(torch.bfloat16).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.uint8 if name.endswith(("weight_mask", "sign_bits")) else torch.bfloat16)
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("checkpoint", ALL, indirect=True)
def test_the_base_model_opens_from_the_full_one_and_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(checkpoint.folder)
    assert type(base) is type(checkpoint.model.base_model)
    assert torch.equal(answer(base), answer(checkpoint.model.base_model))
    base.save_pretrained(tmp_path)
    assert torch.equal(answer(AutoModel.from_pretrained(tmp_path)), answer(base))
    assert_same(type(checkpoint.model).from_pretrained(tmp_path), checkpoint)


def test_several_checkpoints_open_in_one_process(slab: Checkpoint, sola: Checkpoint, gpt2: Checkpoint) -> None:
    loaded = [checkpoint.load() for checkpoint in (slab, sola, gpt2)]
    for model, checkpoint in zip(loaded, (slab, sola, gpt2), strict=True):
        assert_same(model, checkpoint)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_saves_itself_completely(
    slab: Checkpoint, copied: Callable[[PreTrainedModel], PreTrainedModel], tmp_path: Path
) -> None:
    twin = copied(slab.load())
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    twin.save_pretrained(tmp_path)
    assert (tmp_path / LOADING_CODE).is_file()
    assert torch.equal(answer(slab.load().from_pretrained(tmp_path)), answer(twin))
    assert not torch.equal(answer(twin), slab.logits)


def test_generation_and_training_go_on_as_usual(slab: Checkpoint) -> None:
    model = slab.load()
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 7)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.numel()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("checkpoint", ALL, indirect=True)
def test_dequantize_gives_an_ordinary_dense_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    dense = checkpoint.load().dequantize()
    assert not compressed_layers(dense)
    kinds = {type(dense.get_submodule(name)) for name in compressed_layers(checkpoint.model)}
    assert kinds == {Conv1D if checkpoint.folder.name.startswith("gpt2") else nn.Linear}
    assert torch.allclose(answer(dense), checkpoint.logits, atol=1e-4)
    dense.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved
    assert "auto_map" not in saved
    assert not (tmp_path / LOADING_CODE).exists()
    assert torch.equal(answer(type(dense).from_pretrained(tmp_path)), answer(dense))


def test_dequantize_gives_layers_the_dtype_that_they_have_now(slab: Checkpoint, tmp_path: Path) -> None:
    model = slab.load()
    model.save_pretrained(tmp_path)  # leaves the name of a dtype in the model's config
    model.to(torch.float64).dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert torch.allclose(answer(model), slab.logits.double(), atol=1e-4)


def test_dense_experts_are_saved_under_the_names_of_their_family(tmp_path: Path) -> None:
    """Other engines know these names only. Compressed checkpoints use those of transformers' fused experts."""
    dense = tiny_models.mixtral()
    dense.save_pretrained(tmp_path / "dense")
    config = CompressionConfig(method="svd", ratio=0.3, samples=2, sequence_length=16)
    model = compress(dense, config, calibration=tiny_models.token_ids(2, 16).tolist(), progress=False)
    model.save_pretrained(tmp_path / "compressed")
    AutoModelForCausalLM.from_pretrained(tmp_path / "compressed").dequantize().save_pretrained(tmp_path / "again")
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("dense", "compressed", "again")]
    assert names[0] == names[2] != names[1]


def test_a_dense_model_is_compressed_on_load(tmp_path: Path) -> None:
    dense = tiny_llama()
    dense.save_pretrained(tmp_path / "dense")
    config = CompressionConfig(method="slab", ratio=0.5, samples=2, sequence_length=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert type(model) is LlamaForCausalLM
    assert compressed_layers(model)
    model.save_pretrained(tmp_path / "compressed")
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")), answer(model))


def test_the_same_recipe_gives_the_same_bytes(slab: Checkpoint, tmp_path: Path) -> None:
    config = CompressionConfig(method="slab", ratio=0.5, samples=4, sequence_length=16)
    compress(tiny_llama(), config, calibration=calibration(), progress=False).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (slab.folder / "model.safetensors").read_bytes()


def test_the_file_holds_what_the_config_says_and_nothing_else(slab: Checkpoint) -> None:
    stored = load_file(slab.folder / "model.safetensors")
    assert "lm_head.weight" not in stored  # it is tied to the embeddings
    for name, spec in compressed_layers(slab.model).items():
        module = slab.model.get_submodule(name)
        expected = {}
        for key, (shape, _) in spec.tensors(module.out_features, module.in_features).items():
            expected[f"{name}.{key}"] = shape
        assert {key: tuple(value.shape) for key, value in stored.items() if key.startswith(f"{name}.")} == expected


def edit(slab: Checkpoint, folder: Path, **changes: object) -> Path:
    """Copy the checkpoint to a folder, change fields of its quantization_config, and return the folder."""
    shutil.copytree(slab.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes", [{"format_version": 2}, {"format_version": None}, {"entropy_coding": "rans"}], ids=str
)
def test_an_unknown_format_is_refused_before_a_model_is_built(
    slab: Checkpoint, tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edit(slab, tmp_path / "newer", **changes)
    # No memory may be allocated for a model that will be refused.
    monkeypatch.setattr(LlamaModel, "__init__", lambda *arguments: pytest.fail("a model was built"))
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_compressed_checkpoint_without_layers_is_refused(slab: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="layers: empty"):
        AutoModelForCausalLM.from_pretrained(edit(slab, tmp_path / "empty", layers={}))


def test_nothing_is_unpickled(slab: Checkpoint, tmp_path: Path) -> None:
    folder = edit(slab, tmp_path / "pickled")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        AutoModelForCausalLM.from_pretrained(folder)


def large_checkpoint(folder: Path) -> int:
    """Save a model that is small only because it is compressed, and return the bytes of its dense weights.

    No dense layer is ever allocated.
    """
    # On the meta device, dense layers have shapes and no values.
    with torch.device("meta"):
        model = tiny_llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=16)
    linears = {name: module for name, module in model.model.named_modules() if type(module) is nn.Linear}
    model.to_empty(device="meta")
    dense_bytes, specs = 0, {}
    for name, module in linears.items():
        dense_bytes += module.weight.numel() * 4
        specs[f"model.{name}"] = LayerSpec(rank=1)
        swap_module(model, f"model.{name}", build_layer(LayerSpec(rank=1), module.in_features, module.out_features))
    model.model.embed_tokens.to_empty(device="cpu")
    # All other parameters get values, as `save_pretrained` needs them.
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(2048))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
    model.lm_head.weight = model.model.embed_tokens.weight
    attach(model, CompressionQuantizer(CompressionConfig(layers=specs), pre_quantized=True))
    model.save_pretrained(folder)
    return dense_bytes


def test_a_fresh_process_gives_equal_logits_and_never_holds_a_dense_copy(
    slab: Checkpoint, sola: Checkpoint, svd: Checkpoint, gpt2: Checkpoint, tmp_path: Path
) -> None:
    dense_bytes = large_checkpoint(tmp_path / "large")
    checkpoints = (slab, sola, svd, gpt2)
    folders = [checkpoint.folder for checkpoint in checkpoints]
    folders.insert(1, tmp_path / "large")  # the first load also takes the memory of the imports
    answers = open_elsewhere([{"folder": str(folder)} for folder in folders], tmp_path, installed=True, imported=True)
    large = answers.pop(1)
    assert large["memory"] < dense_bytes / 8
    for opened, checkpoint in zip(answers, checkpoints, strict=True):
        assert opened["class"].rpartition(".")[2] == type(checkpoint.model).__name__
        assert opened["class"].startswith("transformers.models.")
        assert opened["layers"] == ["hf_lowrank.runtime.layers"]
        assert torch.equal(torch.tensor(opened["logits"]), checkpoint.logits.flatten())


def test_a_tensor_parallel_plan_is_refused_in_one_line(checkpoint_of_one_process: Path) -> None:
    with pytest.raises(CompressionError, match="tp_plan: compressed layers are not split over processes"):
        AutoModelForCausalLM.from_pretrained(checkpoint_of_one_process, tp_plan="auto")


@pytest.fixture
def checkpoint_of_one_process(slab: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compressed checkpoint, in a process with the variables that torchrun sets."""
    (variables,) = torchrun_variables(1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield slab.folder
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("with_model", [True, False], ids=["with the model", "without it"])
def test_every_version_of_transformers_may_ask_for_conversions(with_model: bool, slab: Checkpoint) -> None:
    """Versions up to 5.19 ask without the model, later ones with it."""
    model = AutoModelForCausalLM.from_pretrained(slab.folder)
    given = [object()]
    assert model.hf_quantizer.update_weight_conversions(given, *([model] if with_model else [])) is given
