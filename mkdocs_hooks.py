"""Take the Markdown files beside `docs/` into the site, so that links between them work there, too."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

BESIDE_DOCS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/*.md", "benchmarks/papers/*.md")
LINK = re.compile(r"\]\(((?:\.\./)*[\w./-]+\.md)(#[\w-]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for pattern in BESIDE_DOCS:
        for path in sorted(root.glob(pattern)):
            files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that are relative to the file in the repository to be relative to the page of the site."""
    root, source = Path(config.config_file_path).parent, Path(page.file.abs_src_path)

    def rewritten(link: re.Match[str]) -> str:
        target = os.path.relpath(source.parent / link[1], root).replace(os.sep, "/").removeprefix("docs/")
        return f"]({os.path.relpath(target, os.path.dirname(page.file.src_uri) or '.')}{link[2] or ''})"

    return LINK.sub(rewritten, markdown)
