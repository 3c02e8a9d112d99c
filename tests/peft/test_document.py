"""What docs/peft.md tells people to run, runs."""

from pathlib import Path

from tests.test_documents import ROOT, python_blocks, run


def test_the_code_of_the_document_runs(tmp_path: Path) -> None:
    run(python_blocks(ROOT / "docs" / "peft.md"), tmp_path)
