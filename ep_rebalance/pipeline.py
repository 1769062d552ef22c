"""Pipeline: the stages that an engine serves one after another, each with some of the model's layers.

Each has EP ranks of its own, and so its own balancer, which knows nothing of the others. A drafter, which
runs on the last stage's ranks, has one too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """The stage of pipeline-parallel rank `pp_rank`, of `pp_size` stages.

    drafter: whether it is the drafter that runs there, and not the stage itself.
    """

    pp_rank: int = 0
    pp_size: int = 1
    drafter: bool = False

    @property
    def label(self) -> str:
        """Its name in log lines and file names; "" if it is the only stage."""
        if self.drafter:
            return "drafter"
        return "" if self.pp_size == 1 else f"stage-{self.pp_rank}"

    @property
    def spoken(self) -> str:
        """What a log line begins with: two balancers of one process write there."""
        return "drafter: " if self.drafter else ""

    def folder(self, path: str) -> str:
        """Where it keeps what a server keeps in the folder `path`."""
        return str(Path(path) / self.label)

    def file(self, path: str) -> str:
        """Where it keeps what a server keeps in `path`: `state.stage-1.npz` for `state.npz`."""
        whole = Path(path)
        return str(whole.with_suffix(f".{self.label}{whole.suffix}")) if self.label else path

    @classmethod
    def every(cls, pp_size: int) -> list[PipelineStage]:
        """All stages of a pipeline."""
        return [cls(pp_rank, pp_size) for pp_rank in range(pp_size)]


ONLY_STAGE = PipelineStage()
DRAFTER = PipelineStage(drafter=True)
