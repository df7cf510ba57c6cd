"""How helping processes take what ends the one that they help: signals of a scheduler, and its sudden end."""

import multiprocessing
import os
import signal
import threading


def outlive_sigterm(grace: int = 30) -> None:
    """Let this process go on for ``grace`` seconds after SIGTERM, and ignore SIGUSR1 and SIGUSR2.

    It is for loader processes.  A scheduler sends its warning to every process of a job.  A loader that ended at once
    would fail the training process in the middle of a step, instead of letting it finish the step and save.  The alarm
    keeps a loader whose training process has gone from living on.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(grace))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """Let this process end when the one that started it has ended, however that was.

    It is for the processes of a pool: each of them holds the pipe open at which the others wait for work, so that after
    a SIGKILL of their parent all of them would wait for ever.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
