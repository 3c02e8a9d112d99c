"""The findings of a survey about each block, kept until the block is built."""

from typing import Any

from torch import Tensor

from ..calibration import CachedTensor
from ..execution.work_folder import Record
from .resume import recorded_findings
from .session import BlockVisit, Session


class KeptFindings:
    """The findings of a stage: in its records if there is a work folder, else in the session's cache.

    Args:
        session: the run.
        stage: the name of the stage.
    """

    def __init__(self, session: Session, stage: str) -> None:
        self.session = session
        self.stage = stage
        self._tensors: dict[str, dict[str, CachedTensor]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def put(self, visit: BlockVisit) -> None:
        """Keep the findings of a visit."""
        assert visit.findings is not None
        if self.session.work is not None:
            return
        cache = self.session.waiting
        self._tensors[visit.name] = {name: cache.put(tensor) for name, tensor in visit.findings.tensors.items()}
        self._facts[visit.name] = visit.findings.facts

    def of(self, visit: BlockVisit) -> Record:
        """Return the findings about a block."""
        if self.session.work is not None:
            return recorded_findings(self.session, self.stage, visit)
        tensors: dict[str, Tensor] = {name: kept.tensor for name, kept in self._tensors[visit.name].items()}
        return Record(tensors, self._facts[visit.name])
