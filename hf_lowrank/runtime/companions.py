"""The files beside the weights: what a save carries over from the model's origin, and what it leaves to the user.

A file that lies in the target folder and that no earlier save of ours has put there is the user's, and stays. What
earlier saves have put there is known by its sha256, which is recorded in the config (`companions`).
"""

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import transformers

from .checksums import CONFIG, LOADING_CODE, file_checksum
from .errors import logger
from .origin import Origin
from .privacy import public_values
from .staging import move, staged

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_CONFIG = "processor_config.json"
VOCABULARY = (
    "tokenizer.json",
    "tokenizer.*.json",
    "*vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "*.model",
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "*.codes",
    "dict*.txt",
    "tekken.json",
    "normalizer.json",
    "byte_maps.json",
    "emoji.json",
    "word_*.json",
)
"""Files that hold the tokens, by the names of all tokenizers of transformers."""
TOKENIZER_STATE = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja", "chat_template.json")
PROCESSOR = (
    PROCESSOR_CONFIG,
    "*preprocessor_config.json",
    "audio_tokenizer_config.json",
    "speaker_embeddings_path.json",
    "speaker_embeddings/*",
)
OTHERS = (
    "[Ll][Ii][Cc][Ee][NnSs][SsCc][Ee]*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "[Cc][Oo][Pp][Yy][Ii][Nn][Gg]*",
    "USE_POLICY*",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
"""Terms of use, and what sentence-transformers adds to a model."""
CARRIED = (*VOCABULARY, *TOKENIZER_STATE, *TEMPLATES, *PROCESSOR, *OTHERS)
NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl", ".py")
"""Endings of weights and code, whatever their names begin with."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a file, by its path in the folder of a model, has a name of one of these patterns."""
    if name.startswith(".") or "/." in name or name.endswith(NOT_CARRIED):
        return False
    # `*` of fnmatch would reach into folders.
    return any(pattern.count("/") == name.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def files_of(folder: Path, patterns: Sequence[str] = CARRIED) -> list[str]:
    """Return the files of a model's folder that have these names, in alphabetical order."""
    folders = {str(PurePosixPath(pattern).parent) for pattern in patterns}
    found = []
    for place in sorted(folders):
        if (folder / place).is_dir():
            found += [f"{place}/{entry.name}" for entry in (folder / place).iterdir() if entry.is_file()]
    names = sorted(name.removeprefix("./") for name in found)
    return [name for name in names if matches(name, patterns)]


class Companions:
    """The files beside the weights in one save.

    Args:
        origin: where the model came from.
        base: the folder on this machine with the origin's files, if there is one.
        target: the folder that the model is saved to.

    Attributes:
        in_place: whether the model is saved to where it came from.
        own: the sha256, by name, of files in the target that an earlier save of ours has put there and nobody has
            changed.
    """

    def __init__(self, origin: Origin, base: Path | None, target: Path) -> None:
        self.origin = origin
        self.base = base
        self.target = target
        self.in_place = base is not None and target.is_dir() and os.path.samefile(base, target)
        self.own = {}
        for name, checksum in recorded_companions(target).items():
            if (target / name).is_file() and file_checksum(target / name) == checksum:
                self.own[name] = checksum

    def write(self, folder: Path, tokenizer: Any) -> None:
        """Write to an empty folder what belongs beside the weights and is not the user's already.

        Args:
            tokenizer: the tokenizer or processor that was given with the model. None to take the origin's.
        """
        if not self.in_place:
            self._write_tokenizer(folder, tokenizer)
            self._write_processor(folder)
            self._copy(files_of(self.base, OTHERS) if self.base else [], folder)
            self._copy_code(folder)
            self._copy_modules(folder)
        elif hasattr(tokenizer, "save_pretrained"):
            # Everything lies there already, but a tokenizer in memory may be newer.
            tokenizer.save_pretrained(folder)
        for name in files_in(folder):
            if self.keeps(name):
                (folder / name).unlink()
            elif name.endswith("config.json"):
                clear_paths(folder / name)

    def keeps(self, name: str) -> bool:
        """Return whether the target has a file of this name that is the user's and stays."""
        return not self.in_place and name not in self.own and (self.target / name).is_file()

    def _keeps_any(self, patterns: Sequence[str]) -> bool:
        return any(self.keeps(name) for name in files_of(self.target, patterns))

    def _leave(self, patterns: Sequence[str]) -> None:
        """Take files of the target for the user's, as some are: the others belong to these, whoever wrote them."""
        self.own = {name: checksum for name, checksum in self.own.items() if not matches(name, patterns)}

    def _write_tokenizer(self, folder: Path, tokenizer: Any) -> None:
        """Write the tokenizer, unless the user has put one there: then none of its parts is mixed with another's."""
        names = files_of(self.base, (*VOCABULARY, *TOKENIZER_STATE, *TEMPLATES)) if self.base else []
        if self._keeps_any((*VOCABULARY, TOKENIZER_CONFIG)) and files_of(self.target, VOCABULARY):
            self._leave((*VOCABULARY, *TOKENIZER_STATE, *TEMPLATES))
            self._copy([name for name in names if name == TOKENIZER_CONFIG], folder)
            return
        places = (self.origin.source, str(self.base))
        if not hasattr(tokenizer, "save_pretrained"):
            tokenizer = open_tokenizer(self.base) if names and self.base else None
        if tokenizer is None:
            self._copy(names, folder)
            return
        tokenizer.save_pretrained(folder)
        named = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
        if str(getattr(named, "name_or_path", "")) in places:
            # A tokenizer of today is one file. Other programs read the files that it was made from.
            self._copy([name for name in names if matches(name, VOCABULARY)], folder)

    def _write_processor(self, folder: Path) -> None:
        """Copy what belongs to the processor, unless the user has put it there."""
        if self.base is None or self.keeps(PROCESSOR_CONFIG) or (folder / PROCESSOR_CONFIG).is_file():
            return
        names = files_of(self.base, PROCESSOR)
        if self._keeps_any(PROCESSOR):
            self._leave(PROCESSOR)
            # Parts that are nested in a processor's config would be read in place of the user's.
            nested = read_values(self.base / PROCESSOR_CONFIG).values()
            if any(isinstance(value, dict) for value in nested):
                names.remove(PROCESSOR_CONFIG)
        # The older form of a template is read in place of any other.
        if not self._keeps_any((*TEMPLATES, *VOCABULARY)):
            names += files_of(self.base, ("chat_template.json",))
        self._copy(names, folder)

    def _copy(self, names: Iterable[str], folder: Path) -> None:
        """Copy files of the origin that the folder does not have yet, without the paths that configs may hold."""
        for name in names:
            assert self.base is not None, "where the names come from"
            source, copy = self.base / name, folder / name
            if copy.exists() or self.keeps(name):
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)

    def _copy_code(self, folder: Path) -> None:
        """Copy the code of a tokenizer or a processor that `auto_map` names, and what that imports beside it."""
        modules = [module for file in folder.glob("*config.json") for module in code_modules(read_values(file))]
        if not modules or self.base is None:
            return
        base = self.origin.fetch(("*.py",)) or self.base
        seen: set[str] = set()
        while modules:
            name = f"{modules.pop()}.py"
            # The loading code is not displaced.
            if name in seen or name == LOADING_CODE or not (base / name).is_file():
                continue
            seen.add(name)
            shutil.copyfile(base / name, folder / name)
            text = (base / name).read_text(encoding="utf-8", errors="replace")
            modules += re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.MULTILINE)

    def _copy_modules(self, folder: Path) -> None:
        """Copy the folders of sentence-transformers' modules, such as `1_Pooling`, which `modules.json` names."""
        if self.base is None or not (folder / "modules.json").is_file():
            return
        try:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            places = [str(module["path"]) for module in modules if module["path"]]
        except (ValueError, KeyError, TypeError):
            return
        places = [place for place in places if re.fullmatch(r"\w[\w.-]*", place)]
        base = self.origin.fetch([f"{place}/*" for place in places]) or self.base
        for place in places:
            files = [file for file in (base / place).rglob("[!.]*") if file.is_file()]
            self._copy([file.relative_to(base).as_posix() for file in files], folder)


def carry_over(model: Any, folder: Path) -> None:
    """Write to the folder that a model was just saved to what lies beside the weights of the one it came from."""
    origin = Origin.of(model)
    companions = Companions(origin, origin.fetch(CARRIED), folder)
    with staged(folder) as partial:
        companions.write(partial, tokenizer=None)
        move(partial, folder)
    clear_paths(folder / CONFIG)
    clear_paths(folder / GENERATION_CONFIG)


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, None if it cannot be opened here: its files are then copied as they are."""
    try:
        # Without code of the checkpoint, and without the question whether that may run.
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers may raise anything for what a file holds or a library that is missing
        logger.info("%s: the tokenizer cannot be opened (%s); its files are copied", folder, error)
        return None


def recorded_companions(folder: Path) -> dict[str, str]:
    """Return the sha256 of the files that the last save of ours put into a folder, by name."""
    recorded = read_values(folder / CONFIG).get("quantization_config")
    companions = recorded.get("companions") if isinstance(recorded, dict) else None
    if not isinstance(companions, dict):
        return {}
    # A config may come from a stranger, and shall not name files of other folders.
    inside = [name for name in companions if ".." not in name and not os.path.isabs(name)]
    return {name: str(companions[name]) for name in inside}


def files_in(folder: Path) -> list[str]:
    """Return the paths of all files in a folder and below it, relative to it, in alphabetical order."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def code_modules(values: dict[str, Any]) -> list[str]:
    """Return the modules beside a config that its `auto_map` names. Those of other repos (`org/name--…`) are not."""
    entries = values.get("auto_map")
    if isinstance(entries, dict):
        entries = list(entries.values())
    modules = []
    for entry in entries if isinstance(entries, list) else []:
        for name in entry if isinstance(entry, list) else [entry]:
            if isinstance(name, str) and re.fullmatch(r"\w+\.\w+", name):
                modules.append(name.partition(".")[0])
    return modules


def read_values(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file, {} if it cannot be read or is no dictionary."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def clear_paths(file: Path) -> None:
    """Put names in place of the paths in a config, if it has any. Its bytes stay as they are otherwise."""
    values = read_values(file)
    public = public_values(values)
    if public != values:
        file.write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
