#!/usr/bin/env python3
"""Find (or download) teachers ahead of time, for machines whose compute nodes have no network.

    local/fetch_teachers.py whisper-tiny.en facebook/hubert-base-ls960
"""

import argparse

from icefall_kd.errors import run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teachers", nargs="+", help="folders, hub ids or short names")
    names = parser.parse_args().teachers
    setup_logging()
    # Imported late, so that --help answers at once.
    from icefall_kd.teachers.locate import locate

    for name in names:
        found = locate(name)
        print(f"{name}\t{found.source}\t{found.weights_sha256}\t{found.folder}")


if __name__ == "__main__":
    run_main(main)
