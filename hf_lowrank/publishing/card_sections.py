"""Sections of a model card as Markdown."""

from collections import Counter
from typing import Any

from ..checkpoints.inspect import asked_in_words
from ..execution.files import human_bytes
from ..methods import method_class, registered_methods
from ..runtime.privacy import public_name
from .measurements import Quality, Speed

NOT_MEASURED = "Not measured."
"""Content of a section without measurements."""

COUNTED_BITS = {"bits": "everything that is stored", "paper": "everything but mask bits, as papers count"}
"""Bits that a ratio counts, in words, by `CompressionConfig.accounting`."""
COMPONENT_FIGURES = {
    "density": ".1%",
    "rank": "",
    "binary_rank": "",
    "bits_per_weight": ".2f",
    "relative_error": ".3f",
}
"""Fields of a stored layer that the table of components shows, with their formats."""


def summary(inspection: dict[str, Any], base: str) -> str:
    """Return the first sentences: what was compressed, by which method, and how much is removed.

    Args:
        inspection: `checkpoints.inspect.Inspection` as a dictionary.
        base: the base model as the card shows it.
    """
    return (
        f"This is {base} with its linear layers compressed by {method_name(inspection['method'])}. "
        f"{inspection['ratio_stored']:.1%} of the stored bits of these layers are removed, counting everything that "
        "is stored in their place."
    )


def method_name(name: str) -> str:
    """Return the name of a method with its source, if it is registered and has one."""
    # A checkpoint may come from a method that is not registered here.
    source = ""
    if name in registered_methods():
        source = method_class(name).source
    if source:
        return f"`{name}` ({source})"
    return f"`{name}`"


def option_list(options: dict[str, Any]) -> str:
    """Return the options of a method with their values, in alphabetical order."""
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items())) or "none"


def recipe_table(recipe: dict[str, Any], inspection: dict[str, Any]) -> str:
    """Return the table of what was asked for and what was reached.

    Args:
        recipe: `quantization_config` of the checkpoint.
        inspection: `checkpoints.inspect.Inspection` as a dictionary.
    """
    counted = COUNTED_BITS[recipe["accounting"]]
    asked = f"{recipe['ratio']:.2%} of the bits of the linear layers of the blocks, counting {counted}"
    if recipe.get("bits") or recipe.get("size"):
        words = asked_in_words(recipe["ratio"], inspection["bits_asked"], inspection["size_asked"])
        asked = f"{asked}, which follows from {words}"
    reached = (
        f"{inspection['ratio_stored']:.2%} ({inspection['ratio_paper']:.2%} without counting masks), "
        f"which leaves {inspection['bits_per_weight']:.2f} bits per weight"
    )
    rows = [
        ["method", method_name(recipe["method"])],
        ["options", option_list(recipe["options"])],
        ["asked to remove", asked],
        ["removed", reached],
        ["calibration", _calibration(recipe)],
        ["compressed layers", str(len(recipe["layers"]))],
        ["linear layers left dense", _reasons(inspection["layers"])],
    ]
    return table(["", ""], rows)


def calibration_source(text: str) -> str:
    """Return where the calibration text came from, as it is shown."""
    if text == "self":
        return "text sampled from the model itself"
    if text == "bundled":
        return "the text that is installed with hf_lowrank (public domain and CC0)"
    return public_name(text)


def _calibration(recipe: dict[str, Any]) -> str:
    parts = [calibration_source(recipe["calibration"])]
    tokens = recipe.get("provenance", {}).get("calibration_tokens")
    if tokens:
        parts.append(f"{tokens:,} tokens")
    parts.append(f"seed {recipe['seed']}")
    return ", ".join(parts)


def _reasons(layers: list[dict[str, Any]]) -> str:
    """Return how many layers were left dense for each reason."""
    counts = Counter(layer["reason"] for layer in layers if layer["kind"] == "dense")
    return "; ".join(f"{count} ({reason})" for reason, count in counts.items()) or "none"


def component_table(layers: list[dict[str, Any]]) -> str:
    """Return one row per compressed component (`q_proj`, ...), with its figures as ranges over the blocks.

    Args:
        layers: `checkpoints.inspect.StoredLayer` as dictionaries.
    """
    by_component: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        # Layers left dense are listed with their reasons in the table of the recipe.
        if layer["kind"] != "dense":
            component = layer["name"].rpartition(".")[2]
            by_component.setdefault(component, []).append(layer)
    rows = []
    for component, group in by_component.items():
        sparse_parts = sorted({layer["sparse"] for layer in group})
        row = [f"`{component}`", str(len(group)), ", ".join(sparse_parts)]
        for name, form in COMPONENT_FIGURES.items():
            row.append(_range([layer[name] for layer in group], form))
        rows.append(row)
    header = ["layers", "number", "sparse part", "values kept", "rank", "binary rank", "bits per weight"]
    return table([*header, "relative error when compressed"], rows)


def size_table(inspection: dict[str, Any]) -> str:
    """Return the bytes of the block linears, of embeddings and head, and of the whole model, dense and stored."""
    rows = [
        _size_row("linear layers of the blocks", inspection["dense_block_bytes"], inspection["block_bytes"]),
        _size_row("whole model", inspection["dense_model_bytes"], inspection["model_bytes"]),
    ]
    if inspection["dense_embedding_bytes"]:
        dense, stored = inspection["dense_embedding_bytes"], inspection["embedding_bytes"]
        rows.insert(1, _size_row("embeddings and head", dense, stored))
    return (
        f"{table(['', 'dense', 'stored', 'removed'], rows)}\n\n"
        "The sizes are counted from the weight files and include masks, signs, scales, factors and biases. "
        f"The weight files take {inspection['disk_bytes']:,} bytes on disk."
    )


def _size_row(name: str, dense: int, stored: int) -> list[str]:
    return [name, human_bytes(dense), human_bytes(stored), f"{1 - stored / dense:.1%}"]


def quality_table(measurements: list[Quality]) -> str:
    """Return one row per metric, or a sentence if nothing was measured."""
    if not measurements:
        return NOT_MEASURED
    rows = []
    for quality in measurements:
        data = quality["dataset"]
        if quality.get("settings"):
            data += f", {quality['settings']}"
        compressed = quality["compressed"]
        dense = quality.get("dense")
        # A metric that compares the two models has one value and no difference.
        if dense is None:
            rows.append([quality["metric"], data, "", f"{compressed:.4g}", ""])
        else:
            rows.append([quality["metric"], data, f"{dense:.4g}", f"{compressed:.4g}", f"{compressed - dense:+.3g}"])
    return table(["metric", "on", "dense", "this model", "difference"], rows)


def speed_table(measurements: list[Speed]) -> str:
    """Return one row per measured speed, or a sentence if nothing was measured."""
    if not measurements:
        return NOT_MEASURED
    rows = []
    for speed in measurements:
        dense = f"{speed['dense']:.4g} {speed['unit']}"
        compressed = f"{speed['compressed']:.4g} {speed['unit']}"
        rows.append([speed["what"], speed["device"], dense, compressed])
    return table(["", "device", "dense", "this model"], rows)


def origin(report: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return the command, the versions and the checksum of the calibration tokens, as far as they are recorded."""
    paragraphs = ["The command was not recorded."]
    if report.get("command"):
        paragraphs = [f"```\n{report['command']}\n```"]
    sentences = []
    versions = sorted(provenance.get("versions", {}).items())
    if versions:
        sentences.append(f"Versions: {', '.join(f'{name} {version}' for name, version in versions)}.")
    if provenance.get("calibration_sha256"):
        sentences.append(f"The sha256 of the calibration tokens is `{provenance['calibration_sha256']}`.")
    if sentences:
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = []
    for cells in (header, ["---"] * len(header), *rows):
        # A bar would end the cell, and a line break the row.
        escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def _range(values: list[float | None], form: str) -> str:
    """Return the smallest and the largest value, or nothing if none is known."""
    present = [value for value in values if value is not None]
    if not present:
        return ""
    # The texts are compared and not the numbers, so that a range never reads "8.00 to 8.00".
    low, high = f"{min(present):{form}}", f"{max(present):{form}}"
    if low == high:
        return low
    return f"{low} to {high}"
