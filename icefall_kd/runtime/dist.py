"""Distributed training under torchrun or srun: environment, collectives, and a clean end of all ranks.

Without such an environment everything here works as a single rank, so callers need no special case.
"""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, RankError, exit_code_of

logger = logging.getLogger(__name__)

# Seconds that the other ranks get to end by themselves after one rank has failed.
FAILURE_GRACE = 5.0
# Seconds for them to see that it failed, or to answer a call; a dead one never does.
ANSWER_TIME = 5.0
_FAILURE_KEY, _SEEN_KEY, _CALL_KEY, _ANSWER_KEY = "failure", "seen", "call", "answer"
# What gloo, NCCL and the store say when another process is late or has gone.
_LATE, _GONE = ("timed out", "timeout"), ("closed", "connection re", "broken pipe", "remote process exited")


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among those of the training."""

    rank: int
    """Global rank, 0 writes."""
    world_size: int
    """Processes of all nodes."""
    local_rank: int
    """Rank on this node: the GPU to use."""


_info = RankInfo(0, 1, 0)
_watch: "_FailureWatch | None" = None
_collectives = 0  # those of the functions below that this rank has come to


def rank_info(env: Mapping[str, str] = os.environ) -> RankInfo:
    """Read rank, world size and local rank as torchrun or srun set them; a single rank otherwise.

    Raises:
        ConfigError: the variables contradict each other.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        info = RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        info = RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)))
    else:
        return RankInfo(0, 1, 0)
    if not 0 <= info.rank < info.world_size:
        raise ConfigError(f"rank {info.rank} does not fit world size {info.world_size}; check RANK and WORLD_SIZE")
    return info


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: ``gpu[03-05,7],login1`` -> ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ConfigError(f"SLURM_JOB_NODELIST is {nodelist!r}; set MASTER_ADDR to the host of rank 0")
    return match.group(1) + (match.group(2) or "") + (match.group(3) or "")


def _slurm_rendezvous(env: Mapping[str, str]) -> tuple[str, str]:
    """Return host and port on which the ranks of a Slurm step meet."""
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    host = first_host(nodelist)
    if "[" in nodelist:
        try:
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True, timeout=30
            )
            host = listed.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            logger.info("scontrol is not available, taking %s as the host of rank 0", host)
    # Derived from the job so that two jobs on one node do not meet.
    return host, str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)


def init(timeout: float = 1800.0, backend: str | None = None) -> RankInfo:
    """Join the process group that torchrun or srun describes; calling it again changes nothing.

    Args:
        timeout: seconds that a collective waits for the other ranks.
        backend: "nccl" or "gloo"; None: nccl where there is a GPU for every local rank.
    Raises:
        RankError: not all ranks came in time.
    """
    global _info, _watch
    if dist.is_initialized():
        return _info
    info = rank_info()
    if info.world_size == 1:
        _info = info
        return info
    if "RANK" not in os.environ:
        host, port = _slurm_rendezvous(os.environ)
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", port)
        os.environ.update(
            RANK=str(info.rank), WORLD_SIZE=str(info.world_size), LOCAL_RANK=str(info.local_rank)
        )
    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        # srun may show each task its own GPU alone.
        torch.cuda.set_device(info.local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group(
            backend, rank=info.rank, world_size=info.world_size, timeout=timedelta(seconds=timeout)
        )
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise RankError(
            f"the {info.world_size} ranks did not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within --dist-timeout {timeout:g} s ({_first_line(error)}); is each of them started, and can this host "
            "reach that one?"
        ) from error
    _info = info
    _watch = _FailureWatch(info, timeout)
    logger.info("rank %d of %d, backend %s", info.rank, info.world_size, backend)
    return info


def shutdown(error: BaseException | None = None) -> None:
    """Leave the process group; after an error the other ranks are told, and end within a bound.

    Args:
        error: what ends this rank; None: the exception being handled (in a ``finally``), if there is one.
    Raises:
        RankError, SystemExit: in the place of an error that another rank caused (:func:`report_failure`).
    """
    global _info, _watch
    if not dist.is_initialized():
        return
    error = error if error is not None else sys.exception()
    cause = report_failure(error) if error is not None else None
    if _watch is not None:
        _watch.stop()
        _watch = None
    if error is None:
        dist.destroy_process_group()
    _info = RankInfo(0, 1, 0)
    if cause is not error:
        raise cause from error


def report_failure(error: BaseException) -> BaseException:
    """Tell the other ranks that this one fails with ``error``: they end with the same exit code within a bound.

    Returns:
        What this rank is to raise.  Its own error, when it is the first to fail; a RankError, when a collective failed
        since another rank is late or has gone without a word; SystemExit with the exit code of the rank that failed
        before, which has told the cause.
    """
    return error if _watch is None else _watch.report(error)


def _is_lost(error: BaseException) -> bool:
    """Return whether ``error`` says that another process is late or has gone."""
    text = str(error).lower()
    ours = isinstance(error, getattr(dist, "DistError", ())) or "gloo" in text or "nccl" in text
    return isinstance(error, RuntimeError) and ours and any(words in text for words in _LATE + _GONE)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class _FailureWatch:
    """A thread that ends this rank when another one has failed.

    A rank that waits in a collective for a dead one would wait for the whole timeout.  The store of the
    rendezvous outlives the collectives, so a failing rank leaves a note there and the others look for it.  The cause
    is printed once: by the rank that left its note first.
    """

    def __init__(self, info: RankInfo, timeout: float, interval: float = 0.5) -> None:
        self.info = info
        self.timeout = timeout
        self.interval = interval
        # One connection a thread: a request of one must not wait for a request of the other.
        self.writer, self.reader = self._connect(), self._connect()
        self.stopped = threading.Event()
        self.reported = self.said = False
        self.note: str | None = None  # what another rank left
        self.thread = threading.Thread(target=self._run, name="failure-watch", daemon=True)
        self.thread.start()

    @staticmethod
    def _connect() -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        # torchrun keeps its store when it starts the ranks again.
        return dist.PrefixStore(f"icefall_kd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def report(self, error: BaseException) -> BaseException:
        """Leave the failure of this rank in the store, once; return what to raise (:func:`report_failure`)."""
        if self.reported:
            return error
        self.reported = True
        if self.note is not None:
            self._leave()
            return self._end_as(self.note)
        lost = _is_lost(error)
        try:
            if getattr(error, "elsewhere", False):
                self._wait_for(lambda: self.writer.check([_FAILURE_KEY]), FAILURE_GRACE)
            elif lost and not self.writer.check([_FAILURE_KEY]):
                error = self._named_loss(error)
            # The first failure stays: what follows on other ranks are its consequences.
            note = f"{exit_code_of(error)}|{self.info.rank}|{type(error).__name__}"
            first = self.writer.compare_set(_FAILURE_KEY, "", note).decode()
            if first != note:
                self.note = first
            self._leave()
            if first != note:
                return self._end_as(first)
        except RuntimeError as failure:
            if self.note is not None:
                return self._end_as(self.note)
            if not lost:
                logger.warning("could not tell the other ranks about the failure: %s", _first_line(failure))
            elif not isinstance(error, RankError):
                error = self._loss(error, "rank 0, or what started the ranks, is gone")
        return error

    def _leave(self) -> None:
        """Say that this rank has seen the failure; wait until all have, since the store may end with this process."""
        try:
            self.writer.set(f"{_SEEN_KEY}/{self.info.rank}", "1")
            if self.note is None or self.info.rank == 0:
                self._wait_for(lambda: self.writer.check(list(self._others(_SEEN_KEY).values())), ANSWER_TIME)
        except RuntimeError as error:
            logger.info("the store of the rendezvous is gone: %s", _first_line(error))

    def _end_as(self, note: str) -> SystemExit:
        """Say whose failure ends this rank, and return what does."""
        code, rank, name = note.split("|")
        if not self.said:
            self.said = True
            logger.warning("rank %s failed with %s and says why; rank %d ends too", rank, name, self.info.rank)
        return SystemExit(int(code))

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(self.interval / 5)

    def _others(self, key: str) -> dict[int, str]:
        return {r: f"{key}/{r}" for r in range(self.info.world_size) if r != self.info.rank}

    def _named_loss(self, error: BaseException) -> RankError:
        """Call the ranks: each answers with the number of collectives it has come to, unless it is dead or stuck."""
        keys = self._others(_ANSWER_KEY)
        self.writer.set(_CALL_KEY, "1")
        self._wait_for(lambda: self.writer.check(list(keys.values())), ANSWER_TIME)
        answers = {r: int(self.writer.get(key)) for r, key in keys.items() if self.writer.check([key])}
        silent = [r for r in keys if r not in answers]
        late = [r for r, count in answers.items() if count < _collectives]
        said = [f"{_named(silent)} gave no sign of life"] if silent else []
        if late:
            said.append(f"{_named(late)} did not come to a collective operation")
        return self._loss(error, " and ".join(said) or "the ranks lost each other in a collective operation")

    def _loss(self, error: BaseException, what: str) -> RankError:
        within = f" within --dist-timeout {self.timeout:g} s" if any(w in str(error).lower() for w in _LATE) else ""
        return RankError(
            f"{what}{within} ({_first_line(error)}); the log of that rank may say more. Run the same command again to "
            "go on from the newest checkpoint, with a longer --dist-timeout where a rank is only slow"
        )

    def stop(self) -> None:
        """End the thread."""
        self.stopped.set()
        self.thread.join(timeout=5)

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                if self.reader.check([_CALL_KEY]):
                    self.reader.set(f"{_ANSWER_KEY}/{self.info.rank}", str(_collectives))
                if not self.reader.check([_FAILURE_KEY]):
                    continue
                note = self.reader.get(_FAILURE_KEY).decode()
                if int(note.split("|")[1]) == self.info.rank:
                    return
                self.note = note
                self.reader.set(f"{_SEEN_KEY}/{self.info.rank}", "1")
            except RuntimeError:
                return  # the store is gone: rank 0 has left, collectives will say so
            end = self._end_as(note)
            if not self.stopped.wait(FAILURE_GRACE):
                os._exit(end.code)
            return


def count_collective() -> None:
    """Count a collective that this rank comes to, as those below do: a rank that others wait for has fewer of them."""
    global _collectives
    _collectives += 1


def get_rank() -> int:
    """Return the global rank (0 without a process group)."""
    return _info.rank


def get_local_rank() -> int:
    """Return the rank on this node (0 without a process group)."""
    return _info.local_rank


def get_world_size() -> int:
    """Return the number of ranks (1 without a process group)."""
    return _info.world_size


def collective_device() -> torch.device:
    """Return where the backend can reduce: a GPU for nccl, else the CPU."""
    if get_world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks."""
    if get_world_size() > 1:
        count_collective()
        dist.barrier()


def all_reduce_sum(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Return the element-wise sum over ranks, in float64.

    Args:
        values: numbers, equally many on all ranks.
        device: where the backend can reduce (a GPU for nccl).
    """
    if get_world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    count_collective()
    dist.all_reduce(tensor)
    return tensor.tolist()


def broadcast_from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on all ranks; it is overwritten on the others."""
    if get_world_size() > 1:
        count_collective()
        dist.broadcast(tensor, src=0)
    return tensor


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Return whether ``flag`` is true on at least one rank."""
    return all_reduce_sum([float(flag)], device)[0] > 0


def gather_objects(value: object) -> list:
    """Return the plain values of all ranks in rank order."""
    if get_world_size() == 1:
        return [value]
    gathered: list = [None] * get_world_size()
    count_collective()
    dist.all_gather_object(gathered, value)
    return gathered


def zero_of(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """Return a scalar 0 that depends on parameters.

    Added to a loss it gives them a gradient of 0 where it has none of them: an optimizer then has the same parameters
    in each step, and ranks have all of them to exchange.
    """
    sums = [p.sum() for p in parameters]
    return 0.0 * torch.stack(sums).sum() if sums else 0.0
