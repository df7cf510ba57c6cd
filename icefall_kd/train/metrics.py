"""Loss values per frame or token: trackers, the log line, TensorBoard and metrics.jsonl."""

import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icefall_kd.runtime import dist
from icefall_kd.runtime.files import write_text
from icefall_kd.systems.base import LossTerms

logger = logging.getLogger(__name__)

# Steps that the running values of the log remember (exponentially).
RESET_INTERVAL = 200


def read_terms(terms: LossTerms) -> dict[str, list[float]]:
    """Return name -> [sum, count] of the total ("loss"), every term and every metric, in one device transfer.

    A metric may carry a third number, the bound shown beside it; it is kept as a third entry.
    """
    names, tensors, counts = ["loss"], [terms.total.detach()], [[float(terms.frames)]]
    for name, term in terms.terms.items():
        names.append(name)
        tensors.append(term.value.detach())
        counts.append([float(term.count)])
    for name, (value, *rest) in (terms.metrics or {}).items():
        names.append(name)
        tensors.append(value.detach() if isinstance(value, Tensor) else torch.tensor(float(value)))
        counts.append([float(x) for x in rest])
    device = tensors[0].device
    sums = torch.stack([t.to(device, torch.float64).reshape(()) for t in tensors]).tolist()
    return {name: [value, *rest] for name, value, rest in zip(names, sums, counts, strict=True)}


class Tracker:
    """Sums of losses and of what they are divided by.

    Args:
        decay: factor on what is there before each addition: 1 for plain sums, ``1 - 1/200`` for running values.
    """

    def __init__(self, decay: float = 1.0) -> None:
        self.decay = decay
        self.sums: dict[str, list[float]] = {}
        self.bounds: dict[str, float] = {}
        self.units: dict[str, str] = {}
        """What the losses are divided by where it is not frames."""

    def add_terms(self, terms: LossTerms) -> None:
        """Add the losses of a batch."""
        self.add(read_terms(terms))
        units = {"loss": terms.unit} | {name: term.unit for name, term in terms.terms.items()}
        self.units |= {name: unit for name, unit in units.items() if unit != "frame"}

    def add(self, values: dict[str, list[float]]) -> None:
        """Add what :func:`read_terms` returned."""
        for name, (value, count, *bound) in values.items():
            old = self.sums.get(name, [0.0, 0.0])
            self.sums[name] = [old[0] * self.decay + value, old[1] * self.decay + count]
            if bound:
                self.bounds[name] = bound[0]

    def add_tracker(self, other: "Tracker") -> None:
        """Add the sums of another tracker."""
        self.add(other.sums)
        self.bounds |= other.bounds
        self.units |= other.units

    def means(self) -> dict[str, float]:
        """Return every sum divided by its count (frames, tokens, ...)."""
        return {name: value / count if count else math.nan for name, (value, count) in self.sums.items()}

    @property
    def frames(self) -> float:
        """Encoder frames, or what else ``units`` says, that the total was summed over."""
        return self.sums.get("loss", [0.0, 0.0])[1]

    def reduced(self) -> "Tracker":
        """Return the sums over all ranks (every rank must call it)."""
        if dist.get_world_size() == 1:
            return self
        merged = Tracker()
        for sums, bounds, units in dist.gather_objects((self.sums, self.bounds, self.units)):
            merged.add(sums)
            merged.bounds |= bounds
            merged.units |= units
        return merged

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums, for a checkpoint."""
        return {name: list(pair) for name, pair in self.sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore the sums."""
        self.sums = {name: list(pair) for name, pair in state.items()}

    def __str__(self) -> str:
        values, unit = format_values(self.means(), self.bounds, self.units), self.units.get("loss", "frame")
        return f"{values}, over {self.frames:.0f} {unit}s"


def format_values(
    values: dict[str, float], bounds: dict[str, float] | None = None, units: dict[str, str] | None = None
) -> str:
    """Return ``a=1.23, b=2.1/token, c=0.5 (bound 5.55)``; numbered names (``ce00 ce01 ...``) share one entry.

    Args:
        values: by name, per frame but for those in ``units``.
        bounds: shown beside the values of these names.
        units: other units than frames.
    """
    bounds, units = bounds or {}, units or {}
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(re.sub(r"\d+$", "", name) or name, []).append(name)
    parts = []
    for stem, names in groups.items():
        shown = {bounds[name] for name in names if name in bounds}
        bound = f" (bound {max(shown):.4g})" if shown else ""
        if len(names) == 1:
            unit = f"/{units[names[0]]}" if names[0] in units else ""
            parts.append(f"{names[0]}={values[names[0]]:.4g}{unit}{bound}")
        else:
            parts.append(f"{stem}=[{' '.join(f'{values[name]:.3g}' for name in names)}]{bound}")
    return ", ".join(parts)


class MetricsWriter:
    """TensorBoard under ``exp_dir/tensorboard`` and one JSON object a line in ``exp_dir/log/metrics.jsonl``.

    Args:
        exp_dir: folder of the training.
        resumed_step: what was logged after this step is dropped, since it will be logged again.  So may be what was
            logged at it: a kill between the validation of an epoch and its checkpoint leaves a record whose validation
            comes again, and the new record takes its place.
    """

    def __init__(self, exp_dir: Path, resumed_step: int = 0) -> None:
        # Imported here: reading metrics must not need TensorBoard.
        from torch.utils.tensorboard import SummaryWriter

        self.file = exp_dir / "log" / "metrics.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        truncate_metrics(self.file, resumed_step)
        self.resumed = {(r["kind"], r["step"]) for r in read_metrics(self.file) if r["step"] == resumed_step}
        self.stream = open(self.file, "a", encoding="utf-8")
        self.board = SummaryWriter(str(exp_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, values: dict[str, float], **fields: Any) -> None:
        """Write one record.

        Args:
            kind: "train" or "valid".
            step: steps done.
            values: losses and metrics per frame or token, shown as train/current_* or train/valid_*.
            **fields: further numbers (``tot``: the running values by name; lr, grad_norm, ... as train/*), and
                ``units``, what values are divided by where it is not frames, which goes into the file alone.
        """
        record = {"kind": kind, "step": step, **values, **fields}
        try:
            if (kind, step) in self.resumed:
                self.resumed.remove((kind, step))
                self.stream.close()
                _rewrite(self.file, [r for r in read_metrics(self.file) if (r["kind"], r["step"]) != (kind, step)])
                self.stream = open(self.file, "a", encoding="utf-8")
            self.stream.write(json.dumps(finite_only(record)) + "\n")
            self.stream.flush()
        except OSError as error:
            error.filename = str(self.file)  # a full disk is reported by its file
            raise
        prefix = "train/current_" if kind == "train" else "train/valid_"
        for name, value in values.items():
            self.board.add_scalar(prefix + name, value, step)
        for name, value in fields.items():
            if name == "units":
                continue
            if isinstance(value, dict):
                for key, number in value.items():
                    self.board.add_scalar(f"train/{name}_{key}", number, step)
            elif isinstance(value, int | float):
                self.board.add_scalar(f"train/{'learning_rate' if name == 'lr' else name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self.stream.close()
        self.board.close()


def finite_only(value: Any) -> Any:
    """Return ``value`` with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {name: finite_only(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(file: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; a last line that a kill cut off is left out."""
    records = []
    for line in _lines(Path(file)):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if kind is None or record.get("kind") == kind:
            records.append(record)
    return records


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the records after ``step`` from a metrics.jsonl."""
    if file.exists():
        _rewrite(file, [record for record in read_metrics(file) if record["step"] <= step])


def _rewrite(file: Path, records: list[dict[str, Any]]) -> None:
    write_text(file, "".join(json.dumps(record) + "\n" for record in records))


def _lines(file: Path) -> Iterable[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
