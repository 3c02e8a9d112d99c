"""The version of the package, and of the libraries that a result depends on."""

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Return the versions of hf_lowrank, torch and transformers, as checkpoints and comparisons record them."""
    import torch
    import transformers

    return {"hf_lowrank": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
