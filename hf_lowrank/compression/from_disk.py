"""Compression from a dense checkpoint to a compressed one.

It goes block by block from disk where that is possible, else with the whole model in memory.
"""

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from ..execution.files import system_message
from ..execution.output_folder import check_free, new_folder
from ..execution.process_group import ProcessGroup, current_process_group
from ..execution.work_folder import WorkFolder
from ..models.loading import load_config, load_model, skeleton
from ..models.offloading import return_memory, shard_size
from ..runtime.configuration import CompressionConfig
from ..runtime.errors import CompressionError, path_in_message
from ..runtime.saving import CompleteSave
from .checks import check_reads_text, usable_device, whole_model_reason
from .defaults import with_defaults
from .loss import WholeModelNeeded
from .pipeline import compress

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
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: where the model computes: one block at a time, or the whole model where that is needed.
        work_dir: records what is finished, so that a killed run goes on from there. It is emptied at the end.
        overwrite: whether an output folder that is not empty is replaced.
        command: recorded in the report.

    Raises:
        CompressionError: as `compress`, and if the output folder cannot be written.
    """
    group = current_process_group()
    group.broadcast(lambda: check_free(output, overwrite))
    usable_device(device)
    dense = skeleton(load_config(source))
    check_reads_text(dense, config.calibration)
    config = with_defaults(dense, config)
    reason = whole_model_reason(config, dense)
    with ExitStack() as stack:
        work = work_dir
        save_options = {}
        if reason is None:
            logger.info("one block at a time is in memory")
            work, offload_folder = _make_folders(stack, output, work_dir, group)
            model = load_model(source, dtype, offload_folder=offload_folder)
            try:
                compressed = compress(model, config, tokenizer, work_dir=work, device=device)
                # Shards of the output are no larger than what a block took: no more of it is in memory at a time.
                save_options["max_shard_size"] = shard_size(dense)
                return_memory()
            except WholeModelNeeded as error:
                reason = str(error)
        if reason is not None:
            logger.info("the whole model is in memory: %s", reason)
            compressed = compress(load_model(source, dtype, device), config, tokenizer, work_dir=work)
        group.broadcast(lambda: _write(compressed, output, overwrite, command, save_options))
        if work_dir is not None:
            _empty_work_folder(work_dir, group)


def _make_folders(stack: ExitStack, output: Path, work_dir: Path | None, group: ProcessGroup) -> tuple[Path, Path]:
    """Return the work folder and the folder for converted weights in it. Without a name the work folder is temporary.

    Raises:
        CompressionError: if they cannot be written.
    """
    work = work_dir
    try:
        if work is None:
            # Folders that lead to the output appear with it, when it is complete.
            parent = next(folder for folder in output.absolute().parents if folder.is_dir())
            work = Path(stack.enter_context(TemporaryDirectory(dir=parent, prefix=f".{output.name}.work-")))
        offload_folder = _offload_folder(work, group)
        offload_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressionError(
            f"{path_in_message(work or output)}: cannot be written ({system_message(error)}); name another folder"
        ) from error
    return work, offload_folder


def _offload_folder(work: Path, group: ProcessGroup) -> Path:
    return work / f"offloaded-{group.rank}"


def _empty_work_folder(work_dir: Path, group: ProcessGroup) -> None:
    shutil.rmtree(_offload_folder(work_dir, group), ignore_errors=True)
    # The folder is unlocked and removed only when every process has removed its part of it.
    group.gather(None)
    if group.is_main:
        with WorkFolder(work_dir) as finished:
            finished.clear()


def _write(
    model: PreTrainedModel, output: Path, overwrite: bool, command: str | None, save_options: dict[str, Any]
) -> None:
    save = CompleteSave.attach(model)
    if command is not None:
        assert save.report is not None
        save.report["command"] = command
    with new_folder(output, overwrite) as folder:
        save(folder, name=output.absolute().name, **save_options)
