"""Options that several commands share, and their help texts."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

RECIPE_HELP = {
    "method": "compression method; `hf-lowrank methods` lists all; default: auto, or slab for a model that predicts "
    "no next tokens",
    "ratio": "fraction of stored bits removed from the linear layers of the blocks, in (0, 1); "
    "default: what the method's options lead to (as bits do), else 6 bits with auto, 0.5 with other methods",
    "bits": "in place of the ratio: stored bits per weight of the linear layers of the blocks, with scales, masks and "
    "all",
    "size": "in place of the ratio: bytes of the weight files, embeddings and all, also as '80MB' or '1.5GiB'",
    "embeddings": "bits of a value of embeddings and head, 2 to 8, or true (8), or false (not compressed); default: "
    "what a size needs, else not compressed",
    "calibration": "calibration text: 'bundled' (installed with the package), 'self' (sampled from the model), a "
    "dataset (wikitext2, c4), or a file of texts",
    "samples": "number of calibration sequences",
    "sequence_length": "tokens per calibration sequence; default: the model's context, at most 2048, or 512 of the "
    "bundled text and 256 of a sampled one",
    "seed": "seed of everything random: same seed, same bytes (exceptions: docs/promises.md)",
    "refinement_steps": "training steps per block, after compression, towards the dense block's output; 0: none",
    "accounting": "'bits' counts everything stored; 'paper' leaves bitmask bits out",
    "modules_to_not_convert": "layers to leave dense: names, suffixes of names, or shell patterns",
}
"""Help texts of `CompressionConfig`, copied because importing that class takes seconds. A test compares them."""

Json = Annotated[bool, typer.Option("--json", help="print JSON for machines instead of a table")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="device to work on, such as cpu or cuda")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output folder if it is not empty")]
Output = Annotated[Path, typer.Option("-o", "--output", help="folder to write")]


class SeveralValues(typer.core.TyperCommand):
    """A command whose options may take several values in a row: `--ratios 0.2 0.3` is `--ratios 0.2 --ratios 0.3`.

    Arguments without a name must come first. After such an option they could not be told from one more value.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable: set[str] = set()
        for parameter in self.params:
            if getattr(parameter, "multiple", False):
                repeatable.update(parameter.opts)
        spread: list[str] = []
        option = None
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in repeatable else None
            elif option is not None and spread[-1] != option and not spread[0].startswith("-"):
                spread.append(option)  # a further value of the same option
            spread.append(argument)
        return super().parse_args(ctx, spread)
