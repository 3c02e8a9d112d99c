"""Model cards: what a compressed checkpoint says about itself, made from its own files and from what was measured."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..calibration.texts import DATASETS
from ..checkpoints.inspect import damaged_report, inspect_checkpoint
from ..methods import method_class, registered_methods
from ..runtime.checksums import weights_checksum
from ..runtime.errors import CheckpointError
from ..runtime.reports import CARD_FILE, MEASURED, read_current_report, write_report
from ..runtime.saving import AUTO_CLASSES

NOT_MEASURED = "Not measured."

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
"""Pipeline tag of the Hub, and what makes the inputs, by Auto class; where several open a model, the first is shown."""

TAGS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "sparse": lambda layer: layer["sparse"] not in ("none", "full"),
    "low-rank": lambda layer: layer["rank"] > 0,
    "binary": lambda layer: layer["binary_rank"] > 0,
    "quantized": lambda layer: bool(layer.get("weight_bits") or layer.get("lowrank_bits")),
}
"""Tags of the Hub by what a layer stores."""


class Quality(TypedDict, total=False):
    """One metric on one text or task.

    Attributes:
        metric: such as "perplexity" or "acc_norm".
        dataset: name to show; `dataset_id`: its id on the Hub, with `dataset_config` and `split`, if it has them.
        settings: how it was measured, in a few words.
        dense, compressed: the two values; `dense` is left out where the metric itself compares the two models.
    """

    metric: str
    dataset: str
    dataset_id: str
    dataset_config: str
    split: str
    settings: str
    dense: float
    compressed: float


class Speed(TypedDict):
    """One measured speed: what was run, on which device, and the two values with their unit."""

    what: str
    device: str
    unit: str
    dense: float
    compressed: float


def write_model_card(folder: Path, name: str | None = None) -> ModelCard:
    """Write the card of the compressed checkpoint in `folder` and return it; see `make_card`."""
    card = make_card(folder, name)
    card.save(folder / CARD_FILE)
    return card


def record(folder: Path, **facts: Any) -> None:
    """Add facts to the report of the checkpoint in `folder` and write its card anew.

    Args:
        facts: any of `quality` (list of `Quality`), `speed` (list of `Speed`), `command` (the exact command that made the checkpoint) and
            `license` (of the base model, as the Hub names it). What is recorded under the same name is replaced, and what was measured
            before the weights were changed is left out.
    """
    if not facts.keys().isdisjoint(MEASURED):
        facts["measured_on"] = weights_checksum(folder)
    write_report(folder, {**read_current_report(folder), **facts})
    write_model_card(folder)


def record_quality(folder: Path, measured: list[Quality]) -> None:
    """Add measurements to the report and write the card anew; one of the same metric on the same data takes the place of the old."""
    new = {(row["dataset"], row["metric"]) for row in measured}
    before = read_current_report(folder).get("quality", [])
    record(folder, quality=[row for row in before if (row["dataset"], row["metric"]) not in new] + measured)


def make_card(folder: Path, name: str | None = None) -> ModelCard:
    """The card of the compressed checkpoint in `folder`; the same folder gives the same card.

    Args:
        name: what `from_pretrained` is to be given: the repo's id, by default the folder's name.

    Raises:
        CheckpointError: if there is no compressed checkpoint in `folder`.
    """
    config, inspection = read_config(folder), asdict(inspect_checkpoint(folder))
    with damaged_report(folder):
        return model_card(config, inspection, read_current_report(folder), name or folder.resolve().name)


def model_card(config: dict[str, Any], inspection: dict[str, Any], report: dict[str, Any], name: str) -> ModelCard:
    """The card of a compressed checkpoint, from plain data.

    Args:
        config: content of its `config.json`.
        inspection: what its files store (`inspection.Inspection`, as a dictionary).
        report: content of its report: of the compression, and what `record` added; {} if there is none.
        name: what `from_pretrained` is to be given.
    """
    recipe = config["quantization_config"]
    layers, provenance = recipe["layers"], recipe.get("provenance", {})
    architecture = (config.get("architectures") or ["PreTrainedModel"])[0]
    auto_class = _auto_class(config["model_type"], architecture)
    pipeline_tag, processor = TASKS.get(auto_class, (None, "AutoProcessor"))
    base = provenance.get("base_model", "")
    on_hub = is_hub_id(base)
    base_text = (
        f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`" if base else "the dense model"
    )
    calibration = DATASETS.get(recipe["calibration"], {}).get("path")
    results = _eval_results(report.get("quality", []), pipeline_tag)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=report.get("license"),
        datasets=[calibration] if calibration else None,
        tags=[
            "hf_lowrank",
            recipe["method"],
            "compressed",
            *(tag for tag, has in TAGS.items() if any(map(has, layers.values()))),
        ],
        model_name=name if results else None,
        eval_results=results or None,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=files("hf_lowrank").joinpath("data/model_card.md").read_text(encoding="utf-8"),
        name=name,
        architecture=architecture,
        auto_class=auto_class,
        processor=processor,
        base=base_text,
        summary=_summary(inspection, base_text),
        recipe=_recipe(recipe, inspection),
        components=_components(inspection["layers"]),
        sizes=_sizes(inspection),
        quality=_quality(report.get("quality", [])),
        speed=_speed(report.get("speed", [])),
        warnings=inspection["warnings"],
        origin=_origin(report, provenance),
    )
    return card


def text_quality(evaluation: dict[str, Any]) -> list[Quality]:
    """What a card shows of the evaluation on one text (`evaluation.perplexity.Evaluation`, as a dictionary)."""
    text = evaluation["text"]
    about: Quality = {
        "dataset": text_name(text),
        "settings": f"{evaluation['windows']:,} windows of {evaluation['window']:,} tokens",
    }
    if text in DATASETS:
        about |= {"dataset": text, "dataset_id": DATASETS[text]["path"], "split": "test"}
    if evaluation["stride"] < evaluation["window"]:
        about["settings"] += f", {evaluation['stride']:,} apart"
    rows: list[Quality] = [{**about, "metric": "perplexity", "compressed": evaluation["perplexity"]}]
    if evaluation["reference_nll"] is not None:
        rows[0]["dense"] = math.exp(evaluation["reference_nll"])
        compared = {"kl_divergence": "kl", "top1_agreement": "top1_agreement"}
        rows += [{**about, "metric": metric, "compressed": evaluation[name]} for metric, name in compared.items()]
    return rows


def task_quality(result: dict[str, Any]) -> list[Quality]:
    """What a card shows of one task (`evaluation.tasks.TaskResult`, as a dictionary)."""
    about: Quality = {
        "dataset": result["task"],
        "settings": f"{result['shots']}-shot, {result['items']:,} items, lm-eval {result['lm_eval']}",
    }
    if result["dataset"] is not None:
        on_hub: Quality = {
            "dataset_id": result["dataset"],
            "dataset_config": result["config"] or "default",
            "split": result["split"],
        }
        about |= on_hub
    rows: list[Quality] = []
    for metric, value in result["metrics"].items():
        rows.append({**about, "metric": metric, "compressed": value})
        if result["reference"] is not None:
            rows[-1]["dense"] = result["reference"][metric]
    return rows


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of the compressed checkpoint in `folder`.

    Raises:
        CheckpointError: if there is none, or it is that of a dense model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; give the folder that save_pretrained or hf-lowrank compress wrote"
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not config.get("quantization_config", {}).get("layers"):
        raise CheckpointError(
            f"{path}: no quantization_config.layers, so the model is dense; compress it first (hf-lowrank compress)"
        )
    return config


def text_name(text: str) -> str:
    """A dataset's name, or of a file the last two parts of its path: enough to tell texts apart, no more of this machine than that."""
    return "/".join(part for part in Path(text).parts[-2:] if part != "/")


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can only be an id on the Hub, not a path on this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _auto_class(model_type: str, architecture: str) -> str:
    """The Auto class that opens a checkpoint as the class that it was saved from; that class itself if there is none."""
    for name in dict.fromkeys((*TASKS, *AUTO_CLASSES)):
        known = getattr(transformers, name)._model_mapping.get(transformers.CONFIG_MAPPING[model_type], ())
        if architecture in {each.__name__ for each in (known if isinstance(known, tuple) else (known,))}:
            return name
    return architecture


def _eval_results(measured: list[Quality], pipeline_tag: str | None) -> list[EvalResult]:
    """The measurements as the Hub's model index; texts without an id there are told apart by `config`, or they would be merged."""
    return [
        EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=quality.get("dataset_id", "custom"),
            dataset_name=quality["dataset"],
            dataset_config=quality.get("dataset_config") if "dataset_id" in quality else quality["dataset"],
            dataset_split=quality.get("split"),
            metric_type=quality["metric"],
            metric_name=quality["metric"],
            metric_value=quality["compressed"],
        )
        for quality in measured
    ]


def _summary(inspection: dict[str, Any], base: str) -> str:
    method, share = _method(inspection["method"]), f"{inspection['ratio_stored']:.1%}"
    return f"{base}, its linear layers compressed by {method}: {share} of their stored bits removed, all that takes their place counted."


def _method(name: str) -> str:
    source = method_class(name).source if name in registered_methods() else ""
    return f"`{name}` ({source})" if source else f"`{name}`"


def _recipe(recipe: dict[str, Any], inspection: dict[str, Any]) -> str:
    counted = {"bits": "everything that is stored", "paper": "everything but mask bits, as papers count"}[
        recipe["accounting"]
    ]
    text = recipe["calibration"]
    calibration = "text sampled from the model itself" if text == "self" else text_name(text)
    tokens = recipe.get("provenance", {}).get("calibration_tokens")
    left = Counter(layer["reason"] for layer in inspection["layers"] if layer["kind"] == "dense")
    rows = [
        ["method", _method(recipe["method"])],
        ["options", ", ".join(f"{name} {value}" for name, value in sorted(recipe["options"].items())) or "none"],
        [
            "removed, asked for",
            f"{recipe['ratio']:.2%} of the bits of the linear layers of the blocks, counting {counted}",
        ],
        [
            "removed, reached",
            f"{inspection['ratio_stored']:.2%} ({inspection['ratio_paper']:.2%} without counting masks)",
        ],
        ["calibration", f"{calibration}, {f'{tokens:,} tokens, ' if tokens else ''}seed {recipe['seed']}"],
        ["compressed layers", str(len(recipe["layers"]))],
        ["linear layers left dense", "; ".join(f"{count} ({reason})" for reason, count in left.items()) or "none"],
    ]
    return _table(["", ""], rows)


def _components(layers: list[dict[str, Any]]) -> str:
    """One row per compressed component (`q_proj`, ...): how many, what they store, bits per weight and error, as ranges over the blocks."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        if layer["kind"] != "dense":
            groups.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    rows = []
    for component, group in groups.items():
        sparse = ", ".join(sorted({layer["sparse"] for layer in group}))
        forms = {"density": ".1%", "rank": "", "binary_rank": "", "bits_per_weight": ".2f", "relative_error": ".3f"}
        ranges = [
            _range((layer[name] for layer in group if layer[name] is not None), form) for name, form in forms.items()
        ]
        rows.append([f"`{component}`", str(len(group)), sparse, *ranges])
    header = [
        "layers",
        "number",
        "sparse part",
        "values kept",
        "rank",
        "binary rank",
        "bits per weight",
        "relative error when compressed",
    ]
    return _table(header, rows)


def _sizes(inspection: dict[str, Any]) -> str:
    """Bytes of the block linears and of the whole model, dense and stored."""
    rows = [
        _size_row("linear layers of the blocks", inspection["dense_block_bytes"], inspection["block_bytes"]),
        _size_row("whole model", inspection["dense_model_bytes"], inspection["model_bytes"]),
    ]
    table = _table(["", "dense", "stored", "removed"], rows)
    on_disk = f"Weight files on disk: {inspection['disk_bytes']:,} bytes."
    return f"{table}\n\nCounted from the weight files; masks, signs, scales, factors and biases all count. {on_disk}"


def _size_row(what: str, dense: int, stored: int) -> list[str]:
    return [what, _bytes(dense), _bytes(stored), f"{1 - stored / dense:.1%}"]


def _quality(measured: list[Quality]) -> str:
    if not measured:
        return NOT_MEASURED
    rows = []
    for quality in measured:
        dense, compressed = quality.get("dense"), quality["compressed"]
        difference = "" if dense is None else f"{compressed - dense:+.3g}"
        where = quality["dataset"] + (f", {quality['settings']}" if quality.get("settings") else "")
        rows.append(
            [quality["metric"], where, "" if dense is None else f"{dense:.4g}", f"{compressed:.4g}", difference]
        )
    return _table(["metric", "on", "dense", "this model", "difference"], rows)


def _speed(measured: list[Speed]) -> str:
    if not measured:
        return NOT_MEASURED
    rows = [
        [s["what"], s["device"], f"{s['dense']:.4g} {s['unit']}", f"{s['compressed']:.4g} {s['unit']}"]
        for s in measured
    ]
    return _table(["", "device", "dense", "this model"], rows)


def _origin(report: dict[str, Any], provenance: dict[str, Any]) -> str:
    command = f"```\n{report['command']}\n```" if report.get("command") else "The command was not recorded."
    facts = [f"{name} {version}" for name, version in sorted(provenance.get("versions", {}).items())]
    if provenance.get("calibration_sha256"):
        facts.append(f"calibration tokens sha256 `{provenance['calibration_sha256']}`")
    return command + (f"\n\n{', '.join(facts)}." if facts else "")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _range(values: Iterable[float], form: str = "") -> str:
    found = sorted(values)
    if not found:
        return ""
    low, high = f"{found[0]:{form}}", f"{found[-1]:{form}}"
    return low if low == high else f"{low} to {high}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
