"""What may be published of the author's machine: the names of models and files, without the folders they lie in.

Checkpoints, cards and reports travel. A path in them would tell strangers the author's name and what lies where, and
would lead nowhere on their machines.
"""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HUB_ID = re.compile(r"(?!\.{1,2}/)[\w.-]+(?:/[\w.-]+)?")
CACHED_REPO = re.compile(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots(?:[/\\]|$)")
"""Part of a path in the Hub's cache. The group is the id of the repo, with `--` for the slash."""
PATH = re.compile(r"file:[^\n]+|~[^/\\\n]*[/\\][^\n]*|/(?:[^/\n]+/+)+[^/\n]*|(?:[A-Za-z]:)?\\[^\n]+|[A-Za-z]:/[^\n]*")
"""A value that can only be a path: absolute, in a home folder, or a URL of a file."""
_PART = r"[^\s'\"`:;,()<>/\\]+"
PATH_IN_TEXT = re.compile(
    rf"(?<![\w/\\~.])(?:(?:file://|~\w*|[A-Za-z]:)[/\\](?:{_PART}[/\\])*|[/\\](?:{_PART}[/\\])+)(?:{_PART})?"
)
"""The same in the middle of a text, where white space and punctuation end it."""
ARGUMENT = re.compile(r"(-{1,2}[\w-]+=|-\w(?=[/\\~.])|\w+=)?(.*)", re.DOTALL)
"""An argument of a command: an option or a key in front, if there is one, and a value."""
NAMES = ("name_or_path", "_name_or_path", "base_model_name_or_path")
"""Keys under which transformers and PEFT keep what `from_pretrained` was given, a relative path too."""
LABELS = ("id2label", "label2id")
"""Keys of values that may look like paths and are not: names of classes."""


def public_name(source: str | os.PathLike[str]) -> str:
    """Return the name of a model, a text or a folder without the folders that it lies in.

    An id on the Hub, such as `org/name`, stays as it is, unless it is a path on this machine. A folder in the Hub's
    cache is named by the id of its repo. Home folders have no name, as it would be the user's.
    """
    path = os.fspath(source)
    cached = CACHED_REPO.search(path)
    if cached:
        return cached[1].replace("--", "/", 1)
    if HUB_ID.fullmatch(path) and not os.path.exists(path):
        return path
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    if name in ("", ".", ".."):
        name = Path(path).resolve().name if path else ""
    is_home = name.startswith("~") or os.path.realpath(path) == os.path.realpath(Path.home())
    return "" if is_home or name.endswith(":") else name


def public_names(sources: Iterable[str]) -> list[str]:
    """Return the names of several files. Those of the same name are numbered, so that they can be told apart."""
    names: list[str] = []
    for source in sources:
        name = public_name(source)
        earlier = sum(re.fullmatch(re.escape(name) + r"( \(\d+\))?", other) is not None for other in names)
        names.append(f"{name} ({earlier + 1})" if earlier else name)
    return names


def public_values(values: Any) -> Any:
    """Return plain JSON values with the names of models and files in place of their paths."""
    if isinstance(values, dict):
        return {key: value if key in LABELS else _public_value(key, value) for key, value in values.items()}
    if isinstance(values, list):
        return [public_values(value) for value in values]
    if isinstance(values, str) and PATH.fullmatch(values):
        return public_name(values)
    return values


def _public_value(key: str, value: Any) -> Any:
    if key in NAMES and isinstance(value, str):
        return public_name(value)
    return public_values(value)


def public_command(arguments: Sequence[str]) -> str:
    """Return a command as one line to paste into a shell, with names in place of paths."""
    public = []
    for argument in arguments:
        match = ARGUMENT.fullmatch(argument)
        assert match is not None, "it matches everything"
        option, value = match[1] or "", match[2]
        if re.search(r"[/\\]|^~", value):
            value = public_name(value)
        public.append(option + value)
    return shlex.join(public)


def public_text(text: str, known: Iterable[str] = ()) -> str:
    """Return a text, such as an error, with names in place of the paths in it.

    Args:
        known: paths that may occur in it, which are found even if they are relative or have blanks.
    """
    forms = {form for path in known for form in (path, os.path.abspath(path)) if re.search(r"[/\\]", form)}
    for form in sorted(forms, key=len, reverse=True):  # a path before the folders above it
        text = text.replace(form, public_name(form))
    return PATH_IN_TEXT.sub(lambda match: public_name(match[0]), text)
