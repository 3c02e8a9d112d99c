"""Model cards: the README of a compressed checkpoint, written from its own files and from measurements."""

import json
import re
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..calibration.texts import DATASETS
from ..checkpoints.inspect import damaged_report, inspect
from ..runtime.checksums import weights_checksum
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CheckpointError, path_in_message
from ..runtime.privacy import public_name, public_text
from ..runtime.reports import CARD_FILE, MEASURED, read_current_report, sealed_card, write_report
from ..runtime.saving import has_users_card
from ..runtime.skeletons import AUTO_CLASSES
from . import card_sections
from .measurements import Quality

TASKS = {
    "AutoModelForCausalLM": ("text-generation", "AutoTokenizer"),
    "AutoModelForSeq2SeqLM": (None, "AutoTokenizer"),
    "AutoModelForSpeechSeq2Seq": ("automatic-speech-recognition", "AutoProcessor"),
    "AutoModelForImageTextToText": ("image-text-to-text", "AutoProcessor"),
    "AutoModelForMaskedLM": ("fill-mask", "AutoTokenizer"),
    "AutoModelForSequenceClassification": ("text-classification", "AutoTokenizer"),
    "AutoModelForTokenClassification": ("token-classification", "AutoTokenizer"),
    "AutoModelForQuestionAnswering": ("question-answering", "AutoTokenizer"),
    "AutoModelForImageClassification": ("image-classification", "AutoProcessor"),
    "AutoModelForAudioClassification": ("audio-classification", "AutoProcessor"),
    "AutoModelForCTC": ("automatic-speech-recognition", "AutoProcessor"),
    "AutoModel": ("feature-extraction", "AutoTokenizer"),
}
"""Pipeline tag of the Hub and class that prepares the inputs, by Auto class. The first that opens a model is shown."""


def write_model_card(folder: Path, name: str | None = None) -> ModelCard:
    """Write the card of the compressed checkpoint in `folder` (see `make_card`) and return it."""
    card = make_card(folder, name)
    card.save(folder / CARD_FILE)
    return card


def record(folder: Path, **facts: Any) -> None:
    """Add facts to the report of the checkpoint in `folder` and write its card again, unless that is the user's.

    Args:
        facts: any of `quality` (list of `Quality`), `speed` (list of `Speed`), `command` (the exact command that
            compressed the model) and `license` (license of the base model, as the Hub names it). A fact replaces what
            was recorded under the same name. Measurements from before the weights were changed are left out.
    """
    # The checksum says which weights the figures belong to, so that they are dropped when the weights change.
    if not facts.keys().isdisjoint(MEASURED):
        facts["measured_on"] = weights_checksum(folder)
    if "command" in facts:
        facts["command"] = public_text(facts["command"])
    write_report(folder, {**read_current_report(folder), **facts})
    if not has_users_card(folder):
        write_model_card(folder)


def record_quality(folder: Path, measurements: list[Quality]) -> None:
    """Add measurements to the report of a checkpoint and write its card again.

    A measurement replaces an earlier one of the same metric on the same data.
    """
    replaced = {(row["dataset"], row["metric"]) for row in measurements}
    kept = []
    for row in read_current_report(folder).get("quality", []):
        if (row["dataset"], row["metric"]) not in replaced:
            kept.append(row)
    record(folder, quality=kept + measurements)


def make_card(folder: Path, name: str | None = None) -> ModelCard:
    """Return the card of the compressed checkpoint in `folder`. It depends on nothing but the content of the folder.

    Args:
        name: argument for `from_pretrained` that the card shows, the id of a repo. The default is the name of the
            folder.

    Raises:
        CheckpointError: if there is no compressed checkpoint in `folder`.
    """
    config = read_config(folder)
    # A model that was made by hand may have a recipe without a ratio.
    config["quantization_config"].setdefault("ratio", float(CompressionConfig.ratio))
    inspection = asdict(inspect(folder))
    # The report may have been edited by hand, and every access to a field of it can fail then.
    with damaged_report(folder):
        return model_card(config, inspection, read_current_report(folder), name or folder.resolve().name)


def model_card(config: dict[str, Any], inspection: dict[str, Any], report: dict[str, Any], name: str) -> ModelCard:
    """Return the card of a compressed checkpoint from plain data.

    Args:
        config: content of its `config.json`.
        inspection: the content of its files (`checkpoints.inspect.Inspection` as a dictionary).
        report: content of its report: of the compression, and what `record` added. It is empty if there is none.
        name: argument for `from_pretrained` that the card shows.
    """
    recipe = config["quantization_config"]
    provenance = recipe.get("provenance", {})
    base = _base_model(provenance)
    quality = report.get("quality", [])
    # transformers writes the class into every config, but a config may also be made by hand.
    architecture = (config.get("architectures") or ["PreTrainedModel"])[0]
    auto_class = _auto_class(config["model_type"], architecture)
    pipeline_tag, processor = TASKS.get(auto_class, (None, "AutoProcessor"))
    template = files("hf_lowrank").joinpath("data/model_card.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        _metadata(recipe, report, pipeline_tag, name),
        template_str=template,
        name=name,
        architecture=architecture,
        auto_class=auto_class,
        processor=processor,
        base=base,
        summary=card_sections.summary(inspection, base),
        recipe=card_sections.recipe_table(recipe, inspection),
        components=card_sections.component_table(inspection["layers"]),
        sizes=card_sections.size_table(inspection),
        quality=card_sections.quality_table(quality),
        speed=card_sections.speed_table(report.get("speed", [])),
        warnings=inspection["warnings"],
        origin=card_sections.origin(report, provenance),
    )
    return ModelCard(sealed_card(str(card)))


def _base_model(provenance: dict[str, Any]) -> str:
    """Return the base model as Markdown: a link to the Hub, the name of a folder, or words if it is not known."""
    base = provenance.get("base_model", "")
    if is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    if base:
        return f"`{public_name(base)}`"
    return "the dense model"


def _metadata(recipe: dict[str, Any], report: dict[str, Any], pipeline_tag: str | None, name: str) -> ModelCardData:
    """Return the metadata on top of the card, which the Hub reads."""
    optional: dict[str, Any] = {}
    base = recipe.get("provenance", {}).get("base_model", "")
    if is_hub_id(base):
        optional |= {"base_model": base, "base_model_relation": "quantized"}
    calibration = DATASETS.get(recipe["calibration"])
    if calibration is not None:
        optional["datasets"] = [calibration["path"]]
    results = _eval_results(report.get("quality", []), pipeline_tag)
    if results:
        optional |= {"model_name": name, "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=report.get("license"),
        tags=["hf_lowrank", recipe["method"], "compressed", *_tags(list(recipe["layers"].values()))],
        **optional,
    )


def _tags(layers: list[dict[str, Any]]) -> list[str]:
    """Return the tags that say what the layers store.

    Args:
        layers: `LayerSpec`s as dictionaries.
    """
    tags = []
    if any(layer["sparse"] not in ("none", "full") for layer in layers):
        tags.append("sparse")
    if any(layer["rank"] > 0 for layer in layers):
        tags.append("low-rank")
    if any(layer["binary_rank"] > 0 for layer in layers):
        tags.append("binary")
    if any(layer.get("weight_bits") or layer.get("lowrank_bits") for layer in layers):
        tags.append("quantized")
    return tags


def _eval_results(measurements: list[Quality], pipeline_tag: str | None) -> list[EvalResult]:
    """Return the measurements as the model index of the Hub."""
    results = []
    for quality in measurements:
        dataset_config = quality.get("dataset_config")
        # The Hub merges results with the same dataset and config, so texts without an id are told apart by the config.
        if "dataset_id" not in quality:
            dataset_config = quality["dataset"]
        result = EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=quality.get("dataset_id", "custom"),
            dataset_name=quality["dataset"],
            dataset_config=dataset_config,
            dataset_split=quality.get("split"),
            metric_type=quality["metric"],
            metric_name=quality["metric"],
            metric_value=quality["compressed"],
        )
        results.append(result)
    return results


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `config.json` of the compressed checkpoint in `folder`.

    Raises:
        CheckpointError: if there is none, or it belongs to a dense model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path_in_message(path)}: no such file; give the folder that save_pretrained or hf-lowrank compress wrote"
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("quantization_config", {}).get("layers"):
        raise CheckpointError(
            f"{path}: no quantization_config.layers, so the model is dense; compress it first (hf-lowrank compress)"
        )
    return config


def is_hub_id(name: str) -> bool:
    """Return whether the name of a base model can only be an id on the Hub, and is not a path on this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _auto_class(model_type: str, architecture: str) -> str:
    """Return the first Auto class that opens a checkpoint as `architecture`, or `architecture` if there is none."""
    if model_type not in transformers.CONFIG_MAPPING:  # that of a class of the user's own
        return architecture
    config_class = transformers.CONFIG_MAPPING[model_type]
    # TASKS comes first, because a class may be known to several Auto classes and these are the usual ones.
    for name in dict.fromkeys((*TASKS, *AUTO_CLASSES)):
        model_classes = getattr(transformers, name)._model_mapping.get(config_class, ())
        # transformers maps a config to one class, or to several from which the config chooses.
        if not isinstance(model_classes, tuple):
            model_classes = (model_classes,)
        if any(model_class.__name__ == architecture for model_class in model_classes):
            return name
    return architecture
