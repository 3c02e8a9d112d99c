"""Reads and checks the metadata on top of a model card as the Hub does, for the loopback server of `hub_server.py`.

The rules are those of the Hub's public documentation of model cards, as far as cards of this project use them. They
are not the Hub's own code: a card that passes here may still break a rule that is missing here, and a card that fails
here is wrong.
"""

import re
from typing import Any

import yaml

RELATIONS = ("adapter", "finetune", "merge", "quantized")
_FRONT_MATTER = re.compile(r"\A\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|\Z)", re.DOTALL)


def read_metadata(card: str) -> Any:
    """Return the value of the YAML block on top of a card, or None if there is no block or it is empty.

    Raises:
        yaml.YAMLError: the block is not YAML.
    """
    block = _FRONT_MATTER.match(card)
    return yaml.safe_load(block.group(1)) if block else None


def check_card(card: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings that the Hub's validator would give for a card."""
    try:
        metadata = read_metadata(card)
    except yaml.YAMLError as error:
        return [f"the metadata is not valid YAML: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return [f"the metadata must be a mapping, found {type(metadata).__name__}"], []

    errors = []
    for field in ("library_name", "pipeline_tag", "license_name"):
        if not isinstance(metadata.get(field, ""), str):
            errors.append(f'"{field}" must be a string')
    for field in ("license", "base_model", "datasets", "language", "tags", "metrics"):
        if not _is_string_or_strings(metadata.get(field, [])):
            errors.append(f'"{field}" must be a string or a list of strings')
    if not isinstance(metadata.get("tags", []), list):
        errors.append('"tags" must be an array')
    if "base_model_relation" in metadata and metadata["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
    errors += _model_index_errors(metadata.get("model-index", []))
    return errors, []


def index_fields(card: str) -> dict[str, Any]:
    """Return the fields of `GET /api/models/...` that come from the card.

    They are cardData, tags, and, where the card has them, library_name, pipeline_tag and model-index.
    """
    metadata = read_metadata(card)
    if not isinstance(metadata, dict):
        return {}
    tags = _as_list(metadata.get("tags"))
    tags += [metadata[field] for field in ("library_name", "pipeline_tag") if field in metadata]
    for base in _as_list(metadata.get("base_model")):
        relation = metadata.get("base_model_relation", "finetune")
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"dataset:{name}" for name in _as_list(metadata.get("datasets"))]
    tags += [f"license:{name}" for name in _as_list(metadata.get("license"))]
    fields = {"cardData": metadata, "tags": list(dict.fromkeys(tags))}
    for name in ("library_name", "pipeline_tag", "model-index"):
        if name in metadata:
            fields[name] = metadata[name]
    return fields


def _model_index_errors(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        errors += _missing(model, ("name", "results"), where)
        for j, result in enumerate(model.get("results", [])):
            there = f"{where}.results[{j}]"
            errors += _missing(result, ("task", "dataset", "metrics"), there)
            errors += _missing(result.get("task", {"type": ""}), ("type",), f"{there}.task")
            errors += _missing(result.get("dataset", {"type": "", "name": ""}), ("type", "name"), f"{there}.dataset")
            for k, metric in enumerate(result.get("metrics", [])):
                errors += _missing(metric, ("type", "value"), f"{there}.metrics[{k}]")
    return errors


def _missing(value: dict[str, Any], fields: tuple[str, ...], where: str) -> list[str]:
    return [f'"{where}.{field}" is required' for field in fields if value.get(field) is None]


def _is_string_or_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
