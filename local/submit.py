#!/usr/bin/env python3
"""Run a command, or an array of tasks, on this machine or as Slurm jobs, with a log for each task.

    local/submit.py -- COMMAND [ARGUMENT ...]
    local/submit.py --array 0-31%8 --log log/extract.JOB.log -- local/extract_labels.py --shard JOB --num-shards 32 ...
    local/submit.py --backend slurm --ranks --nodes 2 --gpus 8 --until exp/mvq/train_summary.json -- ./train.py ...

It waits, names each failed task and its log, and leaves with 0, with the exit code of the failed tasks, or with 1 where
these differ.  Recipes call it through run_cmd of local/stages.sh.  Standard library only: it starts in a few
hundredths of a second.
"""

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from icefall_kd.errors import DISK_FULL, KdError, exit_code_of, no_room  # noqa: E402
from icefall_kd.runtime import jobs, slurm  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options in front of --."""
    p = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--backend", choices=("local", "slurm"), default="local", help="where (default: local)")
    p.add_argument("--array", metavar="FIRST-LAST[%N]", help="one task a number, N at the same time; the word JOB in "
                   "command and log becomes the number")  # fmt: skip
    p.add_argument("--log", metavar="FILE", help="stdout and stderr go there; without it, to the terminal")
    p.add_argument("--dry-run", action="store_true", help="print the commands, or the script that sbatch would get")
    p.add_argument("--name", default="job", help="of the job (default: job)")
    p.add_argument("--state", metavar="DIR", type=Path, help="remembers what finished and what was submitted: "
                   "the same work does only what is missing, and waits for jobs that are still there")  # fmt: skip
    p.add_argument("--ranks", action="store_true", help="one process a GPU (one a node without GPUs), as the ranks of "
                   "one training: by torchrun here, by srun there")  # fmt: skip
    p.add_argument("--gpus", type=int, default=0, help="GPUs on each node (default: 0)")
    p.add_argument("--until", metavar="FILE", type=Path, help="the command writes it when it is complete; until then "
                   "it is told to stop before its time ends, and its job is requeued")  # fmt: skip
    only = p.add_argument_group("Slurm only (the local backend does without)")
    only.add_argument("--nodes", type=int, default=1, help="with --ranks (default: 1)")
    only.add_argument("--cpus", type=int, default=1, help="cores on each node (default: 1)")
    only.add_argument("--mem", help="memory on each node, as in 16G")
    only.add_argument("--time", help="limit, as in 24:00:00 or 2-00:00:00")
    only.add_argument("--partition", help="where to queue")
    only.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other option, as in "
                      "--sbatch=--account=asr; may be repeated")  # fmt: skip
    only.add_argument("--warning", type=int, default=120, metavar="SECONDS", help="how long before its time ends a "
                      "command with --until is told to stop (default: 120)")  # fmt: skip
    only.add_argument("--log-dir", type=Path, default=Path("log"), help="of jobs without --log (default: log)")
    return p


def work_of(arguments: list[str]) -> tuple[jobs.Work, argparse.Namespace]:
    """Read the command line; what is wrong with it ends the process with exit code 2."""
    if "--" in arguments:
        split = arguments.index("--")
        arguments, command = arguments[:split], arguments[split + 1 :]
    else:
        command = []
    options = parser().parse_args(arguments)
    work = jobs.Work(
        command=tuple(command),
        array=None if options.array is None else jobs.Array.parse(options.array),
        log=options.log,
        name=options.name,
        log_dir=options.log_dir,
        state=options.state,
        until=options.until,
        ranks=options.ranks,
        nodes=options.nodes,
        gpus=options.gpus,
        cpus=options.cpus,
        mem=options.mem,
        time=options.time,
        partition=options.partition,
        sbatch=tuple(options.sbatch),
        warning=options.warning,
    )
    return work, options


def print_commands(work: jobs.Work) -> None:
    """Print what would run here, one line a task."""
    for number in work.numbers:
        log = work.log_of(number)
        print(shlex.join(jobs.words_here(work, number)) + (f" > {shlex.quote(str(log))} 2>&1" if log else ""))


def main(arguments: list[str]) -> int:
    """Run the work and return the exit code."""
    try:
        work, options = work_of(arguments)
        if options.backend == "slurm":
            return slurm.run(work, dry_run=options.dry_run)
        if options.dry_run:
            print_commands(work)
            return 0
        return jobs.run_here(work)
    except KdError as error:
        jobs.say(f"error: {error}")
        return exit_code_of(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        jobs.say(f"error: {no_room(error)}")
        return exit_code_of(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
