"""The model and the texts that are installed with the package, so that every example runs anywhere and offline."""

from importlib.resources import files


def reference_model() -> str:
    """Return the folder of the bundled dense checkpoint, a Llama of 7 million parameters with its tokenizer."""
    return str(files("hf_lowrank") / "data" / "reference-7m")


def reference_text() -> str:
    """Return the path of the bundled text, which the reference model was not trained on."""
    return str(files("hf_lowrank") / "data" / "demo.txt")


def calibration_text() -> str:
    """Return the path of the bundled text that models are calibrated on by default."""
    return str(files("hf_lowrank") / "data" / "calibration.jsonl.gz")
