"""Looks for the package `hf_lowrank`, which is used in place of the code in a checkpoint where it is installed.

Only the code in a checkpoint has this module. It does so before it defines anything.
"""

import importlib
import importlib.util
import logging

PACKAGE = "hf_lowrank"


def import_installed_package() -> None:
    """Import the package if it is installed, so that it registers itself and declares the operations of the layers.

    The definitions of a checkpoint then find these operations, and declare none. A package that cannot be imported is
    one warning, and a folder that happens to have its name is none.
    """
    try:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            return
        importlib.import_module(PACKAGE)
    except Exception as error:  # whatever is wrong with it, the checkpoint has all that is needed
        logging.getLogger(__name__).warning(
            "hf_lowrank is installed and cannot be imported (%s: %s), so the code of the checkpoint is used; "
            "install it again",
            type(error).__name__,
            error,
        )


import_installed_package()
