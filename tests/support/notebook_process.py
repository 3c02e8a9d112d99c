"""Runs the cells of a notebook as Jupyter would, and answers with their outputs. It needs nothing but matplotlib.

As a script, this file reads a list of sources from standard input as JSON, and writes a list of lists of outputs in
the form of notebook files (nbformat 4.5). Standard error is left out of the outputs, as progress and warnings differ
from machine to machine.
"""

import ast
import base64
import io
import json
import os
import pprint
import sys
from contextlib import redirect_stdout
from typing import Any

Output = dict[str, Any]

DPI = 72
"""Dots per inch of the pictures, which keeps notebooks small."""


def run_cell(source: str, names: dict[str, Any], number: int) -> list[Output]:
    """Run a cell among the names that earlier cells defined.

    Returns:
        What the cell prints, its last value, and what it draws.
    """
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs: list[Output] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": _lines(pprint.pformat(value, width=100))}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs + _pictures()


def _pictures() -> list[Output]:
    """Return every figure that a cell has left open as a picture, and close them all."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    outputs: list[Output] = []
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=DPI, metadata={"Software": None})
        data = {"image/png": base64.b64encode(file.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _main() -> None:
    # The answer goes to what was standard output. What C code prints there goes to standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path[0] = ""  # imports come from the working directory, as in a notebook, not from the folder of this file
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = [run_cell(source, names, number) for number, source in enumerate(json.load(sys.stdin), 1)]
    json.dump(outputs, answers)
    answers.flush()


if __name__ == "__main__":
    _main()
