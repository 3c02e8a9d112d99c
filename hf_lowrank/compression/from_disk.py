"""From a dense checkpoint to a compressed one: block by block from disk where that can be, else with the whole model in memory."""

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from ..execution.files import human_bytes, system_message
from ..execution.output_folder import check_free, new_folder
from ..execution.process_group import current_process_group
from ..execution.work_folder import WorkFolder
from ..methods.soco import SoCo
from ..models.loading import load_config, load_model, skeleton
from ..models.offloading import return_memory, shard_size
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError
from ..runtime.saving import CompleteSave
from .duration import duration
from .estimate import curvature, forecast
from .pipeline import compress, whole_model_reason

logger = logging.getLogger(__name__)


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
    group = current_process_group()
    group.broadcast(lambda: check_free(output, overwrite))
    dense = skeleton(load_config(source))
    reason = whole_model_reason(config, dense, device)
    with ExitStack() as stack:
        work = work_dir
        if reason is None:
            logger.info("one block at a time is in memory")
            try:
                if work is None:
                    output.absolute().parent.mkdir(parents=True, exist_ok=True)
                    work = Path(
                        stack.enter_context(
                            TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.work-")
                        )
                    )
                offloaded = work / f"offloaded-{group.rank}"
                offloaded.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CompressionError(
                    f"{work or output}: cannot be written ({system_message(error)}); name another folder"
                ) from error
            model = load_model(source, dtype, offload_folder=offloaded)
        else:
            logger.info("the whole model is in memory: %s", reason)
            model = load_model(source, dtype, device)
        compressed = compress(model, config, tokenizer, work_dir=work)
        shards = {"max_shard_size": shard_size(dense)} if reason is None else {}
        if reason is None:
            return_memory()
        group.broadcast(lambda: _write(compressed, output, overwrite, command, shards))
        if work_dir is not None:
            shutil.rmtree(work_dir / f"offloaded-{group.rank}", ignore_errors=True)
            group.gather(None)  # all have removed theirs
            if group.is_main:
                with WorkFolder(work_dir) as finished:
                    finished.clear()


def _write(model: PreTrainedModel, output: Path, overwrite: bool, command: str | None, shards: dict[str, Any]) -> None:
    save = CompleteSave.attach(model)
    if command is not None:
        assert save.report is not None
        save.report["command"] = command
    with new_folder(output, overwrite) as folder:
        save(folder, name=output.absolute().name, **shards)


def describe(source: str, config: CompressionConfig, device: str = "cpu", dtype: str = "auto") -> str:
    """What compressing a checkpoint would take, by formula."""
    dense = skeleton(load_config(source), dtype)
    reason = whole_model_reason(config, dense, device)
    if reason is not None:
        size = sum(parameter.numel() * parameter.itemsize for parameter in dense.parameters())
        more = f", {_gigabytes(bent)} for the curvature of all outputs" if (bent := curvature(dense, config)) else ""
        memory = f"the whole model must be in memory, {_gigabytes(size)}{more}, and statistics and working space beside it: {reason}"
        return f"{memory}\n{_time(dense, config, device)}"
    found = forecast(dense, config)
    parts = {"embeddings, norms and libraries": found.resident, "the largest block": found.block, "activations": found.activations,
             "statistics and working space": found.working}  # fmt: skip
    return "\n".join(
        [
            f"memory above torch's own, at most: {_gigabytes(found.peak)}",
            *(f"  {what}: {_gigabytes(size)}" for what, size in parts.items()),
            f"disk: {_gigabytes(found.output)} for the result, and until it is done {_gigabytes(found.work_folder)} in the work folder",
            _time(dense, config, device),
        ]
    )


def _time(dense: PreTrainedModel, config: CompressionConfig, device: str) -> str:
    """What can be said of the time; training is not among what is."""
    if device != "cpu":
        return f"time: not known for {device}"
    if config.method == SoCo.name or config.refinement_steps:
        return "time: not known for what trains"
    found = duration(dense, config)
    parts = {
        "start": found.start,
        "calibration": found.calibration,
        "solving": found.solving,
        "checksums": found.files,
    }
    spans = ", ".join(f"{what} {_span(seconds)}" for what, seconds in parts.items())
    sampling = "; the sampling of the calibration text comes on top" if config.calibration == "self" else ""
    return f"time if this machine has nothing else to do: {_span(found.total)} ({spans}); runs took 0.7 to 2.2 times that{sampling}"


def _span(seconds: float) -> str:
    """Whole seconds, or two digits of a larger unit."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{seconds:.0f} s"


def _gigabytes(size: int) -> str:
    return human_bytes(size, smallest_unit="GB")
