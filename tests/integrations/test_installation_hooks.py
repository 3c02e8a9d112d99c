"""What the installation hooks into never breaks an import: whatever is wrong with us is one warning, with its cure."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig

from hf_lowrank.runtime.load_hooks import HOOKED
from tests.support.simulated_site import ACTIONS, HOOKS, make_site, run_program, write

EVERYTHING = (
    "import torch, transformers.modeling_utils, transformers.models.auto.configuration_auto, peft.tuners.tuners_utils"
)
"""A program that imports all that our hooks wait for."""


@pytest.fixture(scope="module")
def whole_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("whole") / "site")


@pytest.fixture
def site(whole_site: Path, tmp_path: Path) -> Path:
    """A site that a test may break."""
    return Path(shutil.copytree(whole_site, tmp_path / "site"))


@pytest.fixture
def working_site(site: Path) -> Path:
    """A site in which our hooks succeed and print what they would do."""
    write(site, ACTIONS)
    return site


def warnings_in(errors: str) -> list[str]:
    return re.findall(r"^.*hf_lowrank: .*$", errors, flags=re.MULTILINE)


def remove(name: str) -> Callable[[Path], None]:
    return lambda site: shutil.rmtree(site / name) if (site / name).is_dir() else (site / name).unlink()


def replace(name: str, text: str) -> Callable[[Path], None]:
    return lambda site: write(site, {name: text})


def move_package_away(site: Path) -> None:
    """Leave a folder with the name of the package, without its modules."""
    shutil.rmtree(site / "hf_lowrank")
    write(site, {"hf_lowrank/data/README.md": ""})


MODULES = ("__init__", "registration", "runtime/errors", "runtime/load_hooks", "runtime/quantizer")
FAULTS = {"a syntax error": "def (", "an exception": "raise OSError('disk')", "nothing": ""}
BROKEN: dict[str, Callable[[Path], None]] = {
    "no package": remove("hf_lowrank"),
    "a folder of its name": move_package_away,
    **{f"no {name}": remove(f"hf_lowrank/{name}") for name in ("registration.py", "runtime", "version.py")},
    "no transformers that it knows": lambda site: None,  # the stand-ins lack what the package takes from transformers
    "a moved name": lambda site: write(site, ACTIONS | {
        "hf_lowrank/runtime/quantizer.py": "from transformers.quantizers.auto import MOVED"
    }),
    "a hook that raises": lambda site: write(site, ACTIONS | {
        "hf_lowrank/runtime/load_hooks.py": "def hook_configs(): raise AttributeError('several\\nlines')"
    }),
    "only PEFT's hook raises": lambda site: write(site, ACTIONS | {"hf_lowrank/peft/__init__.py": "1 / 0"}),
    **{f"{fault} in {name}": replace(f"hf_lowrank/{name}.py", FAULTS[fault]) for name in MODULES for fault in FAULTS},
}  # fmt: skip
"""What can be wrong, by a word for it."""


@pytest.mark.parametrize("fault", BROKEN)
def test_whatever_is_wrong_with_us_is_one_warning(site: Path, fault: str) -> None:
    BROKEN[fault](site)
    program = f"{EVERYTHING}\nprint('done')"
    finished = run_program(program, site)
    assert finished.returncode == 0 and finished.stdout.endswith("done\n"), finished.stderr
    (warning,) = warnings_in(finished.stderr)
    assert (
        "in this process (" in warning
        and "install hf_lowrank again" in warning
        and "HF_LOWRANK_AUTOLOAD=off" in warning
    )
    assert "Traceback" not in finished.stderr
    # Where warnings are errors, it is printed.
    strict = run_program(program, site, options=("-W", "error"))
    assert strict.returncode == 0 and len(warnings_in(strict.stderr)) == 1, strict.stderr
    for switch in ({"HF_LOWRANK_AUTOLOAD": "off"}, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}):
        off = run_program(program, site, variables=switch)
        assert (off.returncode, off.stderr, off.stdout) == (0, "", "done\n")


ASKED_BEFORE = "import importlib.util\nimport torch\nimportlib.util.find_spec('transformers.quantizers.auto')"
WRAPPED = """import torch
class Wrapper:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, *arguments): return self.finder.find_spec(*arguments)
sys.meta_path[:] = [Wrapper(finder) for finder in sys.meta_path]"""
COPIED = "import torch\nsys.meta_path = list(sys.meta_path)"
THREADS = f"""import threading
threads = [threading.Thread(target=exec, args=({EVERYTHING!r},)) for _ in range(8)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]"""
FIRST_FAILS = """import torch, transformers
transformers.fails = True
try: import transformers.quantizers.auto
except RuntimeError: pass
transformers.fails = False"""
FORK = """import os, torch
if os.fork():
    code = os.waitstatus_to_exitcode(os.wait()[1])
    os._exit(code)"""
SPAWN = f"""import multiprocessing, os
def child():
    exec({EVERYTHING!r}); sys.stdout.flush()
if __name__ == '__main__':
    process = multiprocessing.get_context('spawn').Process(target=child)
    process.start(); process.join()
    sys.exit(process.exitcode)"""
ORDERS = {
    "by torch alone": "",
    "the package first": "import hf_lowrank",
    "the package after torch": "import torch, hf_lowrank",
    "the package after the configs": "import transformers.configuration_utils, hf_lowrank",
    "the package after all": f"{EVERYTHING}\nimport hf_lowrank",
    "all without torch's entry points, then the package": "import transformers.modeling_utils, hf_lowrank",
    "the quantizers before torch": "import transformers.quantizers.auto",
    "asked where the quantizers are": ASKED_BEFORE,
    "finders wrapped by others": WRAPPED,
    "the list of finders copied": COPIED,
    "eight threads": THREADS,
    "the first import of the quantizers fails": FIRST_FAILS,
    "a fork": FORK,
}
"""What a program does before it imports everything."""


@pytest.mark.parametrize("order", ORDERS)
def test_in_whatever_order_things_are_imported_each_hook_comes_once(working_site: Path, order: str) -> None:
    quantizers = working_site / "transformers/quantizers/auto.py"
    failing = "import transformers\nif getattr(transformers, 'fails', False): raise RuntimeError\n"
    quantizers.write_text(failing + quantizers.read_text())
    check = (
        "import hf_lowrank, hf_lowrank.registration as registration\n"
        "assert all(name.startswith('hf_lowrank.') for name in registration._WAITING)\n"
        "for name in ('transformers.quantizers.auto', 'peft.tuners.tuners_utils', 'hf_lowrank.runtime.quantizer'):\n"
        "    loader = sys.modules[name].__spec__.loader\n"
        "    assert type(loader).__name__ == 'SourceFileLoader' and sys.modules[name].__loader__ is loader"
    )
    finished = run_program(f"{ORDERS[order]}\n{EVERYTHING}\n{check}", working_site)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(finished.stdout.split()) == HOOKS


def test_a_spawned_process_hooks_for_itself(working_site: Path) -> None:
    finished = run_program(SPAWN, working_site)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(finished.stdout.split()) == HOOKS


@pytest.mark.parametrize("options", [("-I",), ("-E",), ("-B",), ("-O",), ("-OO",)], ids=str)
def test_the_options_of_python_make_no_difference(working_site: Path, options: tuple[str, ...]) -> None:
    finished = run_program(EVERYTHING, working_site, options=options)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(finished.stdout.split()) == HOOKS


@pytest.mark.parametrize("packed", ["hf_lowrank", "transformers"])
def test_packages_in_a_zip_are_found(working_site: Path, packed: str) -> None:
    """All modules of a folder of a zip share one loader, so no other module may set off the actions of one."""
    shutil.make_archive(str(working_site / packed), "zip", working_site, packed)
    shutil.rmtree(working_site / packed)
    write(working_site, {"more.py": "import transformers.quantizers"})
    finished = run_program(f"sys.path.append({str(working_site / packed)!r} + '.zip')\n{EVERYTHING}", working_site)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(finished.stdout.split()) == HOOKS


ODD = {
    "our finder taken out": "import torch\nsys.meta_path[:] = sys.meta_path[1:]",
    "a stub of a module that is waited for": "import types\n"
    "sys.modules['transformers.quantizers.auto'] = types.ModuleType('transformers.quantizers.auto')\n"
    "sys.modules['transformers.quantizers.auto'].__spec__ = None",
    "a stub of transformers": "import types\nsys.modules['transformers'] = stub = types.ModuleType('transformers')\n"
    "stub.__path__ = [sys.path[0] + '/transformers']",
    "the package forbidden": "sys.modules['hf_lowrank'] = None",
    "everything reloaded": f"{EVERYTHING}\nimport importlib, hf_lowrank.registration, hf_lowrank_autoload\n"
    "for module in (hf_lowrank_autoload, sys.modules['torch'], hf_lowrank.registration, hf_lowrank,\n"
    "    sys.modules['transformers.quantizers.auto'], sys.modules['transformers.configuration_utils']):\n"
    "    importlib.reload(module)",
    "called twice": "import torch, hf_lowrank_autoload\nhf_lowrank_autoload.register()",
    "no standard error": "sys.stderr = None",
    "an old finder": "class Old:\n    def find_module(self, name, path=None): return None\n"
    "import torch\nsys.meta_path.append(Old())",
    "a loader of its own kind": "import importlib.machinery, torch, types\n"
    "class Loader:\n"
    "    def load_module(self, name):\n"
    "        module = sys.modules[name] = types.ModuleType(name)\n"
    "        return module\n"
    "class Finder:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'transformers.quantizers.auto':\n"
    "            return importlib.machinery.ModuleSpec(name, Loader())\n"
    "sys.meta_path.insert(1, Finder())",
}  # fmt: skip
"""What others may do to Python's imports. Our hooks may then be lost, and nothing else."""


@pytest.mark.parametrize("odd", ODD)
def test_nothing_that_others_do_makes_us_raise(working_site: Path, odd: str) -> None:
    finished = run_program(f"{ODD[odd]}\n{EVERYTHING}\nprint('done')", working_site)
    assert finished.returncode == 0 and finished.stdout.endswith("done\n"), finished.stderr
    assert "Traceback" not in finished.stderr and len(warnings_in(finished.stderr)) <= 1


def test_a_folder_that_cannot_be_written_is_enough(working_site: Path) -> None:
    for path in [working_site, *working_site.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    finished = run_program(EVERYTHING, working_site)
    for path in [working_site, *working_site.rglob("*")]:
        path.chmod(0o755)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert sorted(finished.stdout.split()) == HOOKS


def test_a_damaged_package_lets_other_models_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of transformers that are wrapped import what they need when they are called."""
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    assert hasattr(PreTrainedConfig.get_config_dict.__func__, HOOKED)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hf_lowrank.runtime.config_checks", None)
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 64
    with pytest.raises((OSError, ValueError), match="tokenizer"):
        AutoTokenizer.from_pretrained(tmp_path)
