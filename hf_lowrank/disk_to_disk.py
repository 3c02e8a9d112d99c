"""From a dense checkpoint to a compressed one: block by block from disk where that can be, else with the whole model in memory."""

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from .architectures import find_blocks
from .distributed import present_team
from .forecast import forecast
from .methods import make_method
from .methods.soco import SoCo
from .models import check_free, load_config, load_model, new_folder, skeleton
from .offloading import return_memory, shard_size
from .pipeline import compress
from .runtime.configuration import CompressionConfig
from .runtime.saving import CompleteSave
from .work_folder import WorkFolder

logger = logging.getLogger(__name__)


def whole_model_reason(config: CompressionConfig, dense: PreTrainedModel, device: str) -> str | None:
    """Why the whole model must be in memory; None if one block at a time is enough.

    Args:
        dense: the model's skeleton.
    """
    method = make_method(config.method, config.options)
    if isinstance(method, SoCo):
        return "soco trains through the whole model"
    if method.needs_gradients or method.needs_output_gram:
        return f"{method.name} needs gradients through the whole model"
    if config.refinement_steps:
        return "refining compares the blocks with those of the dense model"
    if config.calibration == "self":
        return "the calibration text is sampled from the model; name a text or a dataset to go block by block"
    if len({name.rpartition(".")[0] for name in find_blocks(dense)}) > 1:
        return f"{type(dense).__name__} has more than one list of blocks"
    if device != "cpu":
        return f"the device is {device}"
    return None


def compress_checkpoint(
    source: str,
    output: Path,
    config: CompressionConfig,
    tokenizer: Any,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    work_dir: Path | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> None:
    """Compress a checkpoint into a folder, which appears when it is complete.

    Args:
        source: a folder or a name on the Hub.
        work_dir: records what is finished, so that a killed run goes on from there; emptied at the end.
        command: recorded in the report.

    Raises:
        CompressionError: as `compress`, and if the output folder cannot be written.
    """
    team = present_team()
    team.told(lambda: check_free(output, overwrite))
    dense = skeleton(load_config(source))
    reason = whole_model_reason(config, dense, device)
    with ExitStack() as stack:
        work = work_dir
        if reason is None:
            logger.info("one block at a time is in memory")
            if work is None:
                output.absolute().parent.mkdir(parents=True, exist_ok=True)
                work = Path(stack.enter_context(TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.work-")))
            model = load_model(source, dtype, offload_folder=work / f"offloaded-{team.rank}")
        else:
            logger.info("the whole model is in memory: %s", reason)
            model = load_model(source, dtype, device)
        compressed = compress(model, config, tokenizer, work_dir=work)
        shards = {"max_shard_size": shard_size(dense)} if reason is None else {}
        if reason is None:
            return_memory()
        team.told(lambda: _write(compressed, output, overwrite, command, shards))
        if work_dir is not None:
            shutil.rmtree(work_dir / f"offloaded-{team.rank}", ignore_errors=True)
            team.gather(None)  # all have removed theirs
            if team.leads:
                with WorkFolder(work_dir) as finished:
                    finished.clear()


def _write(model: PreTrainedModel, output: Path, overwrite: bool, command: str | None, shards: dict[str, Any]) -> None:
    save = CompleteSave.attach(model)
    if command is not None:
        assert save.report is not None
        save.report["command"] = command
    with new_folder(output, overwrite) as folder:
        save(folder, name=output.absolute().name, **shards)


def describe(source: str, config: CompressionConfig, device: str = "cpu") -> str:
    """What compressing a checkpoint would take, by formula."""
    dense = skeleton(load_config(source))
    reason = whole_model_reason(config, dense, device)
    if reason is not None:
        size = sum(parameter.numel() * parameter.itemsize for parameter in dense.parameters())
        return f"the whole model must be in memory, {_gigabytes(size)}, and statistics and working space beside it: {reason}"
    found = forecast(dense, config)
    parts = {"embeddings, norms and libraries": found.resident, "the largest block": found.block, "activations": found.activations,
             "statistics and working space": found.working}  # fmt: skip
    return "\n".join(
        [
            f"memory above torch's own, at most: {_gigabytes(found.peak)}",
            *(f"  {what}: {_gigabytes(size)}" for what, size in parts.items()),
            f"disk: {_gigabytes(found.output)} for the result, and until it is done {_gigabytes(found.work_folder)} in the work folder",
        ]
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
