"""The version of the package, and those of the libraries that a result depends on."""

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Return the versions of hf_lowrank, torch and transformers, as checkpoints and work folders record them."""
    # Imported here, so that the version alone costs nothing.
    import torch
    import transformers

    return {"hf_lowrank": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
