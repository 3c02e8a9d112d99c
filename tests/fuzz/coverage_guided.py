"""Fuzzes what reads bytes from strangers, guided by coverage.

Run it as `python tests/fuzz/coverage_guided.py -max_total_time=600`, with the options of libFuzzer. It needs
`pip install atheris`. An input is a JSON config or a safetensors file. Anything but a result or a CheckpointError is a
crash, which libFuzzer writes to a file.
"""

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hf_lowrank", "json"]):
    from hf_lowrank import CheckpointError
    from hf_lowrank.runtime.config_checks import is_compressed
    from hf_lowrank.runtime.safetensors_headers import read_header, weight_files
    from hf_lowrank.runtime.validation import validate_checkpoint

FOLDER = Path(tempfile.mkdtemp(prefix="hf-lowrank-fuzz-"))


def read(content: bytes) -> None:
    """Treat bytes as weights, as an index, and as a config."""
    (FOLDER / "model.safetensors.index.json").write_bytes(content)
    (FOLDER / "one.safetensors").write_bytes(content)
    for parse in (
        lambda: read_header(str(FOLDER / "one.safetensors")),
        lambda: weight_files(str(FOLDER)),
        lambda: _config(content),
    ):
        try:
            parse()
        except CheckpointError as error:
            assert "\n" not in str(error)


def _config(content: bytes) -> None:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):  # transformers reads the file first and raises this itself
        return
    if is_compressed(values):
        validate_checkpoint(values)


def seeds(folder: Path) -> None:
    """Write the files of small valid checkpoints into a folder, for the fuzzer to start from."""
    from tests.fuzz.checkpoints import save_checkpoints

    for source in save_checkpoints(folder / "sources"):
        for file in [source / "config.json", *source.glob("*.safetensors*")]:
            (folder / f"{source.name}-{file.name}").write_bytes(file.read_bytes())


def main() -> None:
    """Make the corpus and hand over to libFuzzer."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    seeds(corpus)
    atheris.Setup([*sys.argv, "-max_len=60000", "-timeout=10", "-rss_limit_mb=4096", str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
