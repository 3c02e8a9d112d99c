"""Makes the golden checkpoints of the current format: `python -m tests.golden.make`.

A format that has its checkpoints already is never written again.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_lowrank.runtime.configuration import FORMAT_VERSION
from tests.fuzz.checkpoints import save_checkpoints
from tests.support.fresh_process import INPUT_IDS

HERE = Path(__file__).parent


def main() -> None:
    """Write the config, the weights and the logits of one checkpoint of every layout."""
    target = HERE / f"format_{FORMAT_VERSION}"
    if target.exists():
        sys.exit(f"{target} is there already; a released format does not change")
    input_ids = torch.tensor(INPUT_IDS[:1])
    with tempfile.TemporaryDirectory() as place:
        for source in save_checkpoints(Path(place)):
            folder = target / source.name
            folder.mkdir(parents=True)
            for file in [source / "config.json", *source.glob("*.safetensors*")]:
                shutil.copyfile(file, folder / file.name)
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(source)(input_ids).logits
            save_file({"input_ids": input_ids, "logits": logits.contiguous()}, folder / "golden_logits")


if __name__ == "__main__":
    main()
