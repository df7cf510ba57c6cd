#!/usr/bin/env python3
"""torchrun, with the exit code of the rank that failed first: torchrun itself makes a 1 of all of them.

    ../../local/torchrun.py --standalone --nproc-per-node 2 ./train.py --config conf/mvq.yaml --exp-dir exp/mvq ...

Takes the options of torchrun.  A rank that a signal ended counts as in a shell, 128 and the signal's number.
"""

import sys


def main() -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(None))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"rank {rank} failed first, with exit code {code}", file=sys.stderr)
        return code
    except SignalException as error:  # it has passed the signal on, and the ranks have ended
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
