"""How much memory one call takes, for the other benchmarks."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch


def peak_gib(build: Callable[..., Callable], *args, device: torch.device, num_threads: int) -> float:
    """Return by how many GiB one call of ``build(*args, device)`` raises the peak of memory.

    On a CPU it is called in a process of its own, so ``build`` and its arguments must be picklable.
    """
    if device.type != "cpu":
        torch.cuda.empty_cache()
        run = build(*args, device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_process, (build, args, num_threads))


def _peak_of_process(build: Callable[..., Callable], args: tuple, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    run = build(*args, torch.device("cpu"))
    # The largest size of the process is inherited from its parent: it has to be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = _size("VmRSS")
    run()
    return (_size("VmHWM") - before) / 2**20


def _size(name: str) -> int:
    """Return a size of this process in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
