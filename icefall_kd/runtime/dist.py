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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, KdError

logger = logging.getLogger(__name__)

# Seconds that the other ranks get to end by themselves after one rank has failed.
FAILURE_GRACE = 5.0
_FAILURE_KEY = "icefall_kd/failure"


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
    dist.init_process_group(
        backend, rank=info.rank, world_size=info.world_size, timeout=timedelta(seconds=timeout)
    )
    _info = info
    _watch = _FailureWatch(info)
    logger.info("rank %d of %d, backend %s", info.rank, info.world_size, backend)
    return info


def shutdown(error: BaseException | None = None) -> None:
    """Leave the process group; after an error the other ranks are told, and end within a bound.

    Args:
        error: what ends this rank; None: the exception being handled (in a ``finally``), if there is one.
    """
    global _info, _watch
    if not dist.is_initialized():
        return
    error = error if error is not None else sys.exception()
    if error is not None and _watch is not None:
        _watch.report(error)
    if _watch is not None:
        _watch.stop()
        _watch = None
    if error is None:
        dist.destroy_process_group()
    _info = RankInfo(0, 1, 0)


def report_failure(error: BaseException) -> None:
    """Tell the other ranks that this one fails with ``error``: they end with the same exit code within a bound."""
    if _watch is not None:
        _watch.report(error)


class _FailureWatch:
    """A thread that ends this rank when another one has failed.

    A rank that waits in a collective for a dead one would wait for the whole timeout.  The store of the
    rendezvous outlives the collectives, so a failing rank leaves its message there and the others look for it.
    """

    def __init__(self, info: RankInfo, interval: float = 0.5) -> None:
        self.info = info
        self.interval = interval
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # One connection a thread: a request of one must not wait for a request of the other.
        self.writer, self.reader = (
            dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
            for _ in range(2)
        )
        self.stopped = threading.Event()
        self.reported = False
        self.thread = threading.Thread(target=self._run, name="failure-watch", daemon=True)
        self.thread.start()

    def report(self, error: BaseException) -> None:
        """Leave the failure of this rank in the store, once."""
        if self.reported:
            return
        self.reported = True
        code = error.exit_code if isinstance(error, KdError) else 1
        try:
            # The first failure stays: what follows on other ranks are its consequences.
            self.writer.compare_set(_FAILURE_KEY, "", f"{code}|{self.info.rank}|{type(error).__name__}: {error}")
            # The store may end with this process, so give the others the time to look.
            time.sleep(3 * self.interval)
        except RuntimeError as failure:
            logger.warning("could not tell the other ranks about the failure: %s", failure)

    def stop(self) -> None:
        """End the thread."""
        self.stopped.set()
        self.thread.join(timeout=5)

    def _run(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                if not self.reader.check([_FAILURE_KEY]):
                    continue
                code, rank, message = self.reader.get(_FAILURE_KEY).decode().split("|", 2)
            except RuntimeError:
                return  # the store is gone: rank 0 has left, collectives will say so
            if int(rank) == self.info.rank:
                return
            logger.error("rank %s failed (%s); rank %d ends too", rank, message, self.info.rank)
            if not self.stopped.wait(FAILURE_GRACE):
                os._exit(int(code))
            return


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
    dist.all_reduce(tensor)
    return tensor.tolist()


def broadcast_from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on all ranks; it is overwritten on the others."""
    if get_world_size() > 1:
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
    dist.all_gather_object(gathered, value)
    return gathered


def zero_of(parameters: Iterable[nn.Parameter]) -> Tensor | float:
    """Return a scalar 0 that depends on parameters.

    Added to a loss it gives them a gradient of 0 where it has none of them: an optimizer then has the same parameters
    in each step, and ranks have all of them to exchange.
    """
    sums = [p.sum() for p in parameters]
    return 0.0 * torch.stack(sums).sum() if sums else 0.0
