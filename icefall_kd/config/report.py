"""Options of the report of a training."""

from dataclasses import dataclass, field
from pathlib import Path

from icefall_kd.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which training is reported on, and where the report goes."""

    exp_dir: Path
    """exp_dir of the training."""
    out: Path | None = None
    """The page; None: report.html in exp-dir."""
    compare_with: list[Path] = field(default_factory=list)
    """exp_dirs of other trainings that get rows in the table of results."""
    part: str | None = None
    """Where utterances are drawn (--system hkd): a name in manifest-dir, a cut set's path, or a folder of audio with
    *.trans.txt; None: the first validation part of the training."""
    manifest_dir: Path | None = None
    """Folder of cuts_<part>.jsonl.gz; None: the training's."""
    utterances: int = 3
    """Utterances of that part that are drawn; 0: none."""

    def __post_init__(self) -> None:
        at_least(self, utterances=0)
