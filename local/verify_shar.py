#!/usr/bin/env python3
"""Read every byte of Shars (local/export_shar.py), say what they hold and name what is damaged or missing.

    local/verify_shar.py data/shar/train
"""

import argparse
from pathlib import Path

from icefall_kd.errors import DataError, run_main
from icefall_kd.runtime.log import setup_logging


def main() -> None:
    setup_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", type=Path, nargs="+", help="folders of Shars")
    args = parser.parse_args()
    from icefall_kd.data.shar import Shar

    problems = []
    for path in args.dirs:
        shar = Shar(path)
        found = shar.verify()
        problems += found
        size = sum(file["bytes"] for row in shar.rows for file in row.files.values())
        print(
            f"{path}: {shar.num_cuts} cuts, {shar.seconds / 3600:.3f} h, {' and '.join(shar.info.fields)} in "
            f"{len(shar.rows)} shards of {size / len(shar.rows):,.0f} bytes, {len(found) or 'no'} problems"
        )
        for field in shar.labels:
            print(f"  {field} {shar.labels[field].fingerprint}: {shar.coverage(field)}")
    if problems:
        raise DataError(f"{len(problems)} problems:\n" + "\n".join(problems))


if __name__ == "__main__":
    run_main(main)
