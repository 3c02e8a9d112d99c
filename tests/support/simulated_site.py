"""A folder that looks to Python like one into which torch, transformers, PEFT and this package are installed.

The package in it is ours. The libraries are stand-ins of a few lines with the modules that our hooks wait for, so that
a process takes milliseconds and anything can be broken. Torch's way of calling entry points is torch's own code.
"""

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from .assets import PROJECT

LIBRARIES = {
    "transformers/__init__.py": "",
    "transformers/configuration_utils.py": "class PreTrainedConfig: pass",
    "transformers/tokenization_utils_base.py": "class PreTrainedTokenizerBase: pass",
    "transformers/quantizers/__init__.py": "",
    "transformers/quantizers/auto.py": "import transformers.configuration_utils\nAUTO_QUANTIZER_MAPPING = {}",
    "transformers/modeling_utils.py": "import transformers.quantizers.auto, transformers.tokenization_utils_base",
    "transformers/models/__init__.py": "",
    "transformers/models/auto/__init__.py": "",
    "transformers/models/auto/configuration_auto.py": "import transformers.configuration_utils",
    "peft/__init__.py": "",
    "peft/tuners/__init__.py": "",
    "peft/tuners/tuners_utils.py": "import transformers.modeling_utils",
}
"""The stand-ins, without torch."""
ACTIONS = {
    "hf_lowrank/runtime/load_hooks.py": "def hook_configs(): print('configs')\n"
    "def hook_models(): pass\n"  # it may be called early, and then comes again
    "def hook_tokenizers(): print('tokenizers')",
    "hf_lowrank/runtime/quantizer.py": "import transformers.quantizers.auto\n"
    "class CompressionQuantizer: pass\ndef register(override): print('quantizer')",
    "hf_lowrank/peft/__init__.py": "def extend_peft(): print('peft')",
}
"""Modules of ours that say what they would do, as the stand-ins have nothing to do it to."""
HOOKS = ["configs", "peft", "quantizer", "tokenizers"]
"""What they say, sorted."""


def make_site(folder: Path) -> Path:
    """Fill a folder with the libraries, the package and its entry points."""
    shutil.copytree(
        PROJECT / "hf_lowrank", folder / "hf_lowrank", ignore=shutil.ignore_patterns("data", "*.so", "*pycache*")
    )
    shutil.copyfile(PROJECT / "hf_lowrank_autoload.py", folder / "hf_lowrank_autoload.py")
    write(folder, {"torch/__init__.py": _torch(), **LIBRARIES})
    write(
        folder,
        {
            "hf_lowrank-0.dist-info/METADATA": "Metadata-Version: 2.1\nName: hf_lowrank\nVersion: 0\n",
            "hf_lowrank-0.dist-info/entry_points.txt": "[torch.backends]\nhf_lowrank = hf_lowrank_autoload:register\n",
        },
    )
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files, by their paths in a folder."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _torch() -> str:
    """Return a module that calls the entry points as the installed torch does."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    names = ("_import_device_backends", "_is_device_backend_autoload_enabled")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(functions) == len(names)
    call = "if _is_device_backend_autoload_enabled():\n    _import_device_backends()"
    return "\n".join(["import builtins, os", *map(ast.unparse, functions), call])


def run_program(
    code: str, site: Path, *, options: tuple[str, ...] = (), variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code in a Python process that finds what is in the site and the standard library, and nothing else."""
    program = site.parent / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(site)!r})\n{code}\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-S", *options, program],
        cwd=site.parent,
        env={"PATH": "", **(variables or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
