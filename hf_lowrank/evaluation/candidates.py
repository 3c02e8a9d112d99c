"""The candidates of a comparison: methods with their options, at ratios, bits per weight or sizes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..methods import make_method
from ..runtime.configuration import CompressionConfig, size_in_bytes
from ..runtime.errors import CompressionError, quoted

REFINEMENT = "refinement_steps"
"""Setting of the compression, not of a method, that `--methods` accepts beside the options of the method."""


@dataclass(frozen=True)
class Candidate:
    """One method at one ratio, number of bits or size, with its options as a command line gives them.

    Without any of the three the options decide, as for `hf-lowrank compress`.
    """

    method: str
    ratio: float | None
    options: dict[str, str] = field(default_factory=dict)
    bits: float | None = None
    size: int | None = None

    @property
    def target(self) -> dict[str, float]:
        """The ratio, the bits or the size, by its name in a recipe."""
        given = {name: getattr(self, name) for name in ("ratio", "bits", "size")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def label(self) -> str:
        """The name in tables, which `parse_method` reads back: `name` or `name[option=value,...]`."""
        if not self.options:
            return self.method
        settings = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.method}[{settings}]"

    @property
    def file_name(self) -> str:
        """The label and the ratio, bits or size as a file name without extension."""
        name = re.sub(r"[^\w.=,-]+", "_", self.label).rstrip("_")
        units = {"ratio": "", "bits": "bits", "size": "bytes"}
        for target, asked in self.target.items():
            name += f"-{asked}{units[target]}"
        return name


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options of a method from `name` or `name[option=value,...]`.

    `refinement_steps` is accepted beside the method's own options.

    Raises:
        CompressionError: if the text has neither form, or the method does not know the option or the value.
    """
    malformed = CompressionError(f"--methods: found {quoted(text)}, expected name or name[option=value,...]")
    match = re.fullmatch(r"([\w-]+)(?:\[([^\[\]]+)\])?", text)
    if match is None:
        raise malformed
    name, settings = match.groups()
    options: dict[str, str] = {}
    if settings is not None:
        for setting in settings.split(","):
            if not re.fullmatch(r"\w+=.+", setting):
                raise malformed
            option, value = setting.split("=", 1)
            options[option] = value
    # The number is checked here, because the method below does not know this option.
    steps = options.get(REFINEMENT, "0")
    if not steps.isdecimal():
        raise CompressionError(f"--methods: {REFINEMENT}: found {quoted(steps)}, expected a whole number")
    make_method(name, {option: value for option, value in options.items() if option != REFINEMENT})
    return name, options


def candidates(
    methods: Sequence[str], ratios: Sequence[float], bits: Sequence[float] = (), sizes: Sequence[str] = ()
) -> list[Candidate]:
    """Return every method at every ratio, number of bits and size, without duplicates.

    Without any of these the options of each method decide.

    Raises:
        CompressionError: if a method, an option, a ratio, a number of bits or a size is not valid.
    """
    targets: list[dict[str, Any]] = [{"ratio": ratio} for ratio in ratios]
    targets += [{"ratio": None, "bits": value} for value in bits]
    targets += [{"ratio": None, "size": size_in_bytes(size)} for size in sizes]
    for target in targets:
        given = {name: value for name, value in target.items() if value is not None}
        CompressionConfig(**given)  # raises if no compression can be so small
    by_file_name: dict[str, Candidate] = {}
    for text in methods:
        method, options = parse_method(text)
        for target in targets or [{"ratio": None}]:
            candidate = Candidate(method, options=options, **target)
            by_file_name[candidate.file_name] = candidate
    return list(by_file_name.values())
