"""Logging to stderr and to a file of the experiment, and progress with rate and time left."""

import logging
import sys
import time
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_HANDLER_MARK = "icefall_kd"


def setup_logging(exp_dir: str | Path | None = None, name: str = "", rank: int = 0) -> Path | None:
    """Send log records to stderr and, with an ``exp_dir``, to ``exp_dir/log/log-<name>-<time>-<rank>``.

    Calling it again replaces the handlers of the earlier call.

    Args:
        exp_dir: Folder of the experiment; None: stderr alone.
        name: What is running, for the file name ("train", "decode", ...).
        rank: Distributed rank; ranks above 0 write only warnings to stderr, but everything to their file.

    Returns:
        The log file, or None.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if handler.get_name() == _HANDLER_MARK:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(logging.INFO)
    where = "" if rank == 0 else f" [rank {rank}]"
    formatter = logging.Formatter(
        f"%(asctime)s %(levelname)s{where} [%(name)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )

    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    log_file = None
    if exp_dir is not None:
        parts = ["log", name, datetime.now().strftime("%Y-%m-%d-%H-%M-%S"), str(rank)]
        log_file = Path(exp_dir) / "log" / "-".join(part for part in parts if part)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.set_name(_HANDLER_MARK)
        handler.setFormatter(formatter)
        root.addHandler(handler)
    return log_file


def format_seconds(seconds: float) -> str:
    """Format a duration for people: ``"7.3 s"``, ``"4 min 12 s"``, ``"3 h 05 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Log how far a long loop is, its rate and the time left, at most every ``interval`` seconds.

    Args:
        total: Units in all; None when unknown (then no time left is given).
        unit: What is counted, in the plural ("utterances", "steps").
        interval: Seconds between two log lines; the first and the last update of a known total always log.
        name: What the loop does, put in front of each line.
    """

    def __init__(self, total: int | None, unit: str, interval: float = 10.0, name: str = "") -> None:
        self.total = total
        self.unit = unit
        self.interval = interval
        self.prefix = f"{name}: " if name else ""
        self.count = 0
        self.start = time.monotonic()
        self._last_log: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the construction."""
        return time.monotonic() - self.start

    @property
    def eta(self) -> float | None:
        """Seconds left at the mean rate so far, or None when unknown."""
        if self.total is None or self.count == 0:
            return None
        return self.elapsed / self.count * max(0, self.total - self.count)

    def update(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more units; the fields appear on the line, floats with 4 significant digits."""
        self.count += n
        now = time.monotonic()
        done = self.total is not None and self.count >= self.total
        if done or self._last_log is None or now - self._last_log >= self.interval:
            self._last_log = now
            logger.info("%s", self._line(fields))

    def _line(self, fields: dict[str, object]) -> str:
        total = "" if self.total is None else f"/{self.total}"
        rate = self.count / max(self.elapsed, 1e-9)
        parts = [f"{self.prefix}{self.count}{total} {self.unit}", f"{rate:.4g} {self.unit}/s"]
        if self.eta is not None:
            parts.append(f"{format_seconds(self.eta)} left")
        for key, value in fields.items():
            parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
        return ", ".join(parts)
