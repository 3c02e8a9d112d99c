"""Compares folders by the contents of their files."""

import hashlib
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder and below it, by the file's path inside the folder."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sums[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return sums
