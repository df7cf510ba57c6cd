"""Error counts against a textbook edit distance, golden files, units, round trips."""

import random

import numpy as np
import pytest

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.scoring import read_recogs, score, split_units, write_errs, write_recogs, write_summary

REFS = ["THE CAT SAT ON THE MAT", "HELLO WORLD", "", "A B C D"]
HYPS = ["THE CAT SAT IN THE RED MAT", "HELLO", "UM", "A X Y D"]
IDS = ["d", "a", "c", "b"]

ERRS = """\
%WER = 50.00
Errors: 2 insertions, 1 deletions, 3 substitutions, over 12 reference words (8 correct)
Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, PER-WORD STATS:
Unit: word; text normalisation: none; split at white space

PER-UTT DETAILS: corr or (ref->hyp)
a:\tHELLO (WORLD->*)
b:\tA (B C->X Y) D
c:\t(*->UM)
d:\tTHE CAT SAT (ON->IN) THE (*->RED) MAT

SUBSTITUTIONS: count ref -> hyp
1   B -> X
1   C -> Y
1   ON -> IN

DELETIONS: count ref
1   WORLD

INSERTIONS: count hyp
1   RED
1   UM

PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp
B   0 1 1 0
C   0 1 1 0
IN   0 1 0 1
ON   0 1 1 0
RED   0 1 0 1
UM   0 1 0 1
WORLD   0 1 1 0
X   0 1 0 1
Y   0 1 0 1
A   1 0 1 1
CAT   1 0 1 1
D   1 0 1 1
HELLO   1 0 1 1
MAT   1 0 1 1
SAT   1 0 1 1
THE   2 0 2 2
"""


def distance(ref, hyp):
    """Return the Levenshtein distance, the textbook way."""
    row = list(range(len(hyp) + 1))
    for i, r in enumerate(ref, start=1):
        above, row = row, [i]
        for j, h in enumerate(hyp, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (r != h)))
    return row[-1]


def test_errors_are_the_edit_distance_and_balance_the_lengths():
    rng = random.Random(0)
    refs = [[rng.choice("abc*") for _ in range(rng.randrange(9))] for _ in range(200)]
    hyps = [[rng.choice("abc*") for _ in range(rng.randrange(9))] for _ in range(200)]
    result = score(refs, hyps, [f"{i:03d}" for i in range(200)])
    assert result.errors.tolist() == [distance(r, h) for r, h in zip(refs, hyps, strict=True)]
    hyp_lens = np.array([len(h) for h in hyps])
    assert (result.ref_lens + result.ins - result.dels == hyp_lens).all()


def test_the_errs_file_is_as_icefall_users_know_it(tmp_path):
    write_errs(tmp_path / "errs.txt", score(REFS, HYPS, IDS))
    assert (tmp_path / "errs.txt").read_text() == ERRS


def test_the_log_line_has_icefalls_form():
    result = score(REFS, HYPS, IDS)
    assert result.line("test") == "[test] %WER 50.00% [6 / 12, 2 ins, 1 del, 3 sub ]"
    assert score(["你好"], ["你号"], ["u"], "char").line("dev") == "[dev] %CER 50.00% [1 / 2, 0 ins, 0 del, 1 sub ]"


def test_recogs_are_sorted_by_id_and_read_back(tmp_path):
    result = score([["it's", "b"], ["字"]], [["[c]"], []], ["z:1", "a"])
    write_recogs(tmp_path / "r.txt", result)
    assert (tmp_path / "r.txt").read_text() == (
        "a:\tref=['字']\na:\thyp=[]\nz:1:\tref=[\"it's\", 'b']\nz:1:\thyp=['[c]']\n"
    )
    assert read_recogs(tmp_path / "r.txt") == (["a", "z:1"], [["字"], ["it's", "b"]], [[], ["[c]"]])


def test_a_recogs_file_that_is_none_is_refused_with_its_line(tmp_path):
    file = tmp_path / "r.txt"
    file.write_text("a:\tref=['b']\nnonsense\n")
    with pytest.raises(DataError, match=r"r\.txt:2 is no line"):
        read_recogs(file)
    file.write_text("a:\tref=['b']\n")
    with pytest.raises(DataError, match="lack ref or hyp"):
        read_recogs(file)
    file.write_text("a:\tref=[__import__('os')]\na:\thyp=[]\n")
    with pytest.raises(DataError, match=":1 holds no list"):
        read_recogs(file)


@pytest.mark.parametrize(
    ("text", "unit", "units"),
    [
        ("  A  BC ", "word", ["A", "BC"]),
        ("我 爱ab c", "char", ["我", "爱", "a", "b", "c"]),
        ("我爱deep learning吗 8点", "mixed", ["我", "爱", "deep", "learning", "吗", "8", "点"]),
        ("n i3 h ao3", "token", ["n", "i3", "h", "ao3"]),
        ("", "char", []),
        (["AB", "C"], "char", ["A", "B", "C"]),
    ],
)
def test_units(text, unit, units):
    assert split_units(text, unit) == units


def test_character_errors_may_exceed_one_hundred_per_cent():
    assert score(["我"], ["你们好"], ["u"], "char").error_rate == 300.0


def test_no_reference_means_no_rate_but_counted_insertions():
    result = score([""], ["A B"], ["u"])
    assert np.isnan(result.error_rate)
    assert result.num_errors == 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"more than once.*'u'"):
        score(["A", "B"], ["A", "B"], ["u", "u"])
    with pytest.raises(DataError, match="1 references, 2 hypotheses"):
        score(["A"], ["A", "B"], ["u"])
    with pytest.raises(ConfigError, match="unknown scoring unit 'phone'"):
        score(["A"], ["A"], ["u"], "phone")


def test_the_summary_is_sorted_by_error_rate(tmp_path):
    write_summary(tmp_path / "s.txt", {"beam_4": 5.126, "greedy": 5.5, "beam_8": 5.0})
    assert (tmp_path / "s.txt").read_text() == "settings\tWER\nbeam_8\t5.00\nbeam_4\t5.13\ngreedy\t5.50\n"
