"""Damages a checkpoint's folder as disks, downloads, editors and enemies do, at random.

Every change is drawn from a random number generator, so a seed gives the same damage again.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CANARY = "HF_LOWRANK_CANARY"
"""Environment variable with the path of a file that code from a checkpoint would create, if it ran."""

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 63, 65, 2**31, 2**63, 10**12, 10**30,
    0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "a", "é\n\x1b[31m", "\ud800", "../../etc/passwd", "/etc/passwd", "float64", "float16", "U8",
    [], [[]], {}, {"": {}}, [1, 2, 3], "x" * 5000,
    "model.layers.0", "model.embed_tokens", "lm_head", "LlamaModel", "GPT2LMHeadModel", "gpt2",
    "bitmask", "full", "rows",
)  # fmt: skip
"""Values that are put in the place of those in JSON files."""

NEW_KEYS = ("new", "quantization_config", "num_hidden_layers", "transformers_weights", "rope_scaling")
"""Keys that are added to JSON objects."""

NOTHING_TO_CHANGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors of a mutation where an earlier one has left nothing that it could change."""

Mutation = Callable[[random.Random, Path], None]


def mutate(rng: random.Random, folder: Path) -> str:
    """Change a folder in one to three ways and return their names, joined by "+"."""
    applied = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if any(_is_special(file) for file in folder.iterdir()):
            break  # a further change would wait for a pipe, or reach through a link out of the folder
        mutation = rng.choice(MUTATIONS)
        try:
            mutation(rng, folder)
        except NOTHING_TO_CHANGE:
            continue
        applied.append(mutation.__name__)
    return "+".join(applied)


def change_json(rng: random.Random, value: Any) -> Any:
    """Change one place inside a JSON value, and return the value."""
    places = list(_places(value))
    parent, key = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):  # a key gets another name
        parent[rng.choice(("", "extra", str(key) + "x", "layers", "dtype", "auto_map"))] = parent.pop(key)
    elif kind == 2:  # two places change their values
        other_parent, other_key = rng.choice(places)
        parent[key], other_parent[other_key] = other_parent[other_key], parent[key]
    elif kind == 3 and isinstance(parent[key], (int, float)):
        parent[key] += rng.choice((-1, 1, 10, -0.5, 10**6))
    elif kind == 4:
        parent[key] = [parent[key]]
    elif kind == 5 and isinstance(parent, dict):
        # The right-hand side is drawn first: the order of draws decides what a seed does.
        value_of_new_key = rng.choice(ODD_VALUES)
        parent[rng.choice(NEW_KEYS)] = value_of_new_key
    else:
        parent[key] = rng.choice(ODD_VALUES)
    return value


def config_value(rng: random.Random, folder: Path) -> None:
    _edit(folder / "config.json", lambda value: change_json(rng, value))


def compression_value(rng: random.Random, folder: Path) -> None:
    def change(config: Any) -> Any:
        change_json(rng, config["quantization_config"])
        return config

    _edit(folder / "config.json", change)


def layer_value(rng: random.Random, folder: Path) -> None:
    def change(config: Any) -> Any:
        change_json(rng, config["quantization_config"]["layers"])
        return config

    _edit(folder / "config.json", change)


def key_twice(rng: random.Random, folder: Path) -> None:
    """Repeat a line of the config, so that a key may stand twice."""
    file = folder / "config.json"
    lines = file.read_text().splitlines()
    line = rng.randrange(len(lines))
    file.write_text("\n".join([*lines[: line + 1], lines[line].rstrip(",") + ",", *lines[line + 1 :]]))


def other_json(rng: random.Random, folder: Path) -> None:
    files = [file for file in sorted(folder.glob("*.json")) if file.name != "config.json"]
    _edit(rng.choice(files), lambda value: change_json(rng, value))


def header(rng: random.Random, folder: Path) -> None:
    """Change one place in the header of a weight file, and its length with it."""
    file = _weights(rng, folder)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    changed = json.dumps(change_json(rng, json.loads(content[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])


HEADER_REPLACEMENTS = [
    (b"F32", b"I32"),
    (b"F32", b"BF16"),
    (b"U8", b"I8"),
    (b"weight_mask", b"sign_bits"),
    (b"layers.0", b"layers.1"),
]


def header_text(rng: random.Random, folder: Path) -> None:
    """Give tensors other types or names in the header of a weight file."""
    file = _weights(rng, folder)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    for old, new in rng.sample(HEADER_REPLACEMENTS, 2):
        text = text.replace(old, new, rng.choice((1, -1)))  # the first occurrence, or all
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def header_length(rng: random.Random, folder: Path) -> None:
    file = _weights(rng, folder)
    content = file.read_bytes()
    file.write_bytes(rng.choice((0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:])


def bits(rng: random.Random, folder: Path) -> None:
    _flip(rng, _any_file(rng, folder), rng.choice((1, 1, 8, 100)))


def weight_bits(rng: random.Random, folder: Path) -> None:
    _flip(rng, _weights(rng, folder), rng.choice((1, 1, 8, 100)))


def config_bits(rng: random.Random, folder: Path) -> None:
    _flip(rng, folder / "config.json", 1)


def truncate(rng: random.Random, folder: Path) -> None:
    file = _any_file(rng, folder)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size + 1)])


def append(rng: random.Random, folder: Path) -> None:
    with open(_any_file(rng, folder), "ab") as stream:
        stream.write(rng.choice((b"\0", b"{}", b"\n", b"x" * 1000)))


def overwrite(rng: random.Random, folder: Path) -> None:
    file = _any_file(rng, folder)
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    filler = rng.choice((b"\0", b"\xff", b"[", b"9"))
    content[start : start + 64] = filler * len(content[start : start + 64])
    file.write_bytes(content)


def bomb(rng: random.Random, folder: Path) -> None:
    """Replace a JSON file by one that is nested too deep, or has a number or a text too long."""
    text = rng.choice(
        (
            "[" * 200_000,
            '{"a":' * 100_000,
            '{"model_type": ' + "9" * 100_000 + "}",
            '"' + "a" * 3_000_000 + '"',
            "[" + "0," * 10**6 + "0]",
        )
    )
    rng.choice(sorted(folder.glob("*.json"))).write_text(text)


def remove(rng: random.Random, folder: Path) -> None:
    _any_file(rng, folder).unlink()


def swap_files(rng: random.Random, folder: Path) -> None:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def replace_file(rng: random.Random, folder: Path) -> None:
    file = _any_file(rng, folder)
    kind = rng.randrange(5)
    content = file.read_bytes()
    file.unlink()
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to(rng.choice(("/dev/zero", "/nowhere", "/etc/passwd", file.name, "/dev/tty")))
    elif kind == 3:
        file.write_bytes(b"")
    else:
        (folder / (file.name + ".bak")).write_bytes(content)


def code(rng: random.Random, folder: Path) -> None:
    """Make every Python file of the checkpoint leave a trace when it runs, and name another in the auto map."""
    trace = f"\nimport os\nopen(os.environ[{CANARY!r}], 'w').close()\n"
    for file in [*folder.glob("*.py"), folder / "evil.py"]:
        with open(file, "a") as stream:
            stream.write(trace)
    if rng.random() < 0.5:
        entries = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
        _edit(folder / "config.json", lambda config: config | {"auto_map": entries})


def pickle(rng: random.Random, folder: Path) -> None:
    """Add weights of another format, which run code when they are opened."""
    # Unpickling this calls `touch` on the canary.
    payload = f"cposix\nsystem\n(S'touch ${CANARY}'\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(payload)
    if rng.random() < 0.5:
        for file in folder.glob("*.safetensors*"):
            file.unlink()


MUTATIONS: tuple[Mutation, ...] = (
    config_value, config_value, compression_value, layer_value, layer_value, key_twice, other_json,
    header, header, header_text, header_length, bits, weight_bits, config_bits,
    truncate, append, overwrite, bomb, remove, swap_files, replace_file, code, pickle,
)  # fmt: skip
"""All mutations. Those that stand here twice are drawn twice as often."""


def copy_mutated(seed: int, sources: list[Path], target: Path) -> str:
    """Copy one of the sources to `target`, mutate the copy, and return the source's name and the mutations.

    A seed always gives the same copy.
    """
    rng = random.Random(seed)
    source = rng.choice(sources)
    shutil.copytree(source, target)
    return f"{source.name}: {mutate(rng, target)}"


def _is_special(file: Path) -> bool:
    """Return whether a path is a link, a pipe or a device."""
    return file.is_symlink() or not (file.is_file() or file.is_dir())


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the (container, key) of everything inside a JSON value."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    value = change(json.loads(file.read_text()))
    file.write_text(json.dumps(value, indent=1), errors="surrogatepass")


def _any_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(file for file in folder.iterdir() if file.is_file()))


def _weights(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _flip(rng: random.Random, file: Path, count: int) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
