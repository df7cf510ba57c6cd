"""Ten thousand damaged files: each ends in an error that names it, or is read correctly (tests/faults/fuzz.py)."""

import time
from collections import Counter
from pathlib import Path

import pytest

from icefall_kd.errors import DataError
from tests.faults.fuzz import Kind, fuzz, make_case
from tests.faults.fuzz_kinds import COUNTS, make_kinds

pytestmark = pytest.mark.timeout(1800)


def test_damaged_files_of_every_kind(tmp_path, capsys):
    kinds = make_kinds(tmp_path)
    assert COUNTS.keys() == kinds.keys() and sum(COUNTS.values()) == 10_000
    report = fuzz(kinds, [(name, seed) for name, count in COUNTS.items() for seed in range(count)])
    with capsys.disabled():
        count = sum(map(Counter.total, report.outcomes.values()))
        print(f"\n{count} damaged files, {report.seconds:.0f} s of one core")
    again = "repeat one with: PYTHONPATH=.:tests python -m tests.faults.fuzz KIND SEED"
    assert report.failures == [], f"{len(report.failures)} failures; {again}"
    assert {name: found.total() for name, found in report.outcomes.items()} == COUNTS
    # Damage is damage: of every kind most cases are refused, and not because the sound file is.
    assert {name for name, found in report.outcomes.items() if found["refused"] < 0.3 * found.total()} == set()


def test_a_case_is_the_same_again(tmp_path):
    content = bytes(range(256)) * 8
    kinds = {"x": Kind({"f": content}, {"f": ("bytes",)}, Path.read_bytes)}
    cases = [make_case(kinds, "x", seed) for seed in range(50)]
    assert cases == [make_case(kinds, "x", seed) for seed in range(50)]
    assert len({case.content for case in cases}) > 40


def crash(_):
    import ctypes

    ctypes.string_at(0)


def grow(_):
    bytearray(600 << 20)


def hang(_):
    while True:
        pass


def swallow(folder):
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise DataError(f"{folder} is damaged") from error


def wait(_):
    time.sleep(1000)


def foreign(_):
    raise KeyError("model")


def nameless(_):
    raise DataError("something is damaged")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (crash, "the process ended with -11"),
        (grow, "MemoryError"),
        (hang, "TooLong"),
        (swallow, "it asked for huge memory"),
        (wait, "hung"),
        (foreign, "KeyError: 'model'"),
        (nameless, "does not name the file"),
        (None, "as if nothing had happened"),
    ],
)
def test_what_a_reader_must_not_do_is_found(fault, told):
    """A reader with a fault for one content: that case is named, and all others are run."""
    sound = b"sound content of a file that is long enough"

    def read(folder):
        content = (folder / "f").read_bytes()
        if content == bad and fault:
            fault(folder)
        elif content not in (sound, bad):
            raise DataError(f"{folder}/f is damaged")
        return content

    kinds = {"x": Kind({"f": sound}, {"f": ("bytes",)}, read, ("bytes",))}
    number = next(seed for seed in range(3, 20) if make_case(kinds, "x", seed).content not in (sound, b""))
    bad = make_case(kinds, "x", number).content
    report = fuzz(kinds, [("x", seed) for seed in range(number + 3)], silent=20.0)
    same = [seed for seed in range(number + 3) if make_case(kinds, "x", seed).content == bad]
    assert len(report.failures) == len(same), report.failures
    assert f"x {number}: f (" in report.failures[same.index(number)] and told in report.failures[0]
