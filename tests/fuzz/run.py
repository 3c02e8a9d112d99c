"""Opens mutated checkpoints by the thousand: `python -m tests.fuzz.run --seeds 0 2000 [--routes plugin verify]`.

The exit code is 1 if an attempt ended as it must not.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers

from tests.fuzz.checkpoints import save_checkpoints
from tests.fuzz.mutations import copy_mutated
from tests.fuzz.routes import ROUTES, attempt, summary


def main() -> int:
    """Run every seed on every route and print what must not have happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 2000), metavar=("FIRST", "LAST"))
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=list(ROUTES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    findings = 0
    with tempfile.TemporaryDirectory() as place:
        sources = save_checkpoints(Path(place) / "sources")
        for route in ROUTES.values():  # what routes import makes the process grow, which must not count
            attempt(route, sources[0])
        counts: dict[str, Counter[str]] = {name: Counter() for name in arguments.routes}
        for seed in range(*arguments.seeds):
            target = Path(place) / f"seed-{seed}"
            mutation = copy_mutated(seed, sources, target)
            for name in arguments.routes:
                outcome = attempt(ROUTES[name], target)
                counts[name][outcome.verdict] += 1
                if not outcome.allowed:
                    findings += 1
                    print(f"seed {seed} ({mutation}), {name}: {outcome.verdict}: {outcome.detail}", flush=True)
            for left in Path(place).glob(f"seed-{seed}*"):
                shutil.rmtree(left, ignore_errors=True)
        for name, verdicts in counts.items():
            print(f"{name}: {summary(verdicts)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
