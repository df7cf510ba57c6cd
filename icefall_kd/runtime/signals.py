"""How loader processes take the signal by which a scheduler announces the end of a job."""

import signal


def outlive_sigterm(grace: int = 30) -> None:
    """Let this process go on for ``grace`` seconds after SIGTERM, and ignore SIGUSR1 and SIGUSR2.

    It is for loader processes.  A scheduler sends its warning to every process of a job.  A loader that ended at once
    would fail the training process in the middle of a step, instead of letting it finish the step and save.  The alarm
    keeps a loader whose training process has gone from living on.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(grace))
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
