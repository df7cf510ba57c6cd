"""Viterbi alignment against all paths, delays of hypotheses that are late by a known time."""

import itertools
import json
import random

import pytest
import torch
from lhotse import MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem

from icefall_kd.decode.alignment import (
    Timed,
    ctc_align,
    cut_alignments,
    emission_delays,
    emissions,
    read_ctm,
    summarize_delays,
)
from icefall_kd.errors import DataError
from icefall_kd.frames import encoder_seconds
from icefall_kd.text.tokenizer import Tokenizer


def collapse(path):
    """Return the tokens of a CTC path and the frames of each."""
    tokens, spans, previous = [], [], 0
    for t, symbol in enumerate(path):
        if symbol and symbol != previous:
            tokens.append(symbol)
            spans.append((t, t))
        elif symbol:
            spans[-1] = (spans[-1][0], t)
        previous = symbol
    return tokens, spans


@pytest.mark.parametrize("seed", range(6))
def test_viterbi_finds_the_best_of_all_paths(seed):
    g = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(6, 4, generator=g)).log_softmax(-1)
    for tokens in ([1], [1, 2], [2, 2], [3, 1, 3], [1, 1, 2], [1, 2, 3, 1, 2, 3]):
        paths = [p for p in itertools.product(range(4), repeat=6) if collapse(p)[0] == tokens]
        best = max(paths, key=lambda p: sum(log_probs[t, s].item() for t, s in enumerate(p)))
        assert ctc_align(log_probs, tokens) == collapse(best)[1]


def test_a_text_that_does_not_fit_has_no_alignment():
    log_probs = torch.zeros(3, 4).log_softmax(-1)
    assert ctc_align(log_probs, []) == []
    assert ctc_align(log_probs, [1, 2, 3]) == [(0, 0), (1, 1), (2, 2)]
    assert ctc_align(log_probs, [1, 1, 2]) is None  # a blank must part the two
    assert ctc_align(log_probs[:0], [1]) is None


def test_a_hypothesis_that_is_late_is_late_by_exactly_that():
    rng = random.Random(0)
    times = sorted(rng.uniform(0, 9) for _ in range(12))
    reference = [Timed(rng.choice("abc"), t, t + 0.1) for t in times]
    for shift in (0.0, 0.25, -0.08):
        emitted = [(x.unit, x.end + shift) for x in reference]
        assert emission_delays(reference, emitted) == pytest.approx([shift] * 12)
        assert emission_delays(reference, emitted, "begin") == pytest.approx([shift + 0.1] * 12)
    # A word that is wrong, one too many, one missing: they have no delay, the others keep theirs.
    emitted = [(x.unit, x.end + 0.3) for x in reference]
    emitted[2] = ("x", 0.0)
    emitted.insert(6, ("y", 0.0))
    del emitted[9]
    assert emission_delays(reference, emitted) == pytest.approx([0.3] * 10)
    assert emission_delays(reference, []) == emission_delays([], emitted) == []


def test_the_summary_is_in_milliseconds():
    delays = [0.01 * k for k in range(11)]
    assert summarize_delays(delays) == {
        "count": 11, "mean_ms": pytest.approx(50), "median_ms": pytest.approx(50), "p90_ms": pytest.approx(90),
    }  # fmt: skip
    assert summarize_delays([])["count"] == 0 and summarize_delays([])["mean_ms"] is None


def test_a_ctm_file_is_read_in_order_of_time_and_damage_is_named(tmp_path):
    file = tmp_path / "x.ctm"
    file.write_text(";; a comment\nu2 1 0.50 0.20 B 0.9\nu1 A 0.1 0.2 X\nu2 1 0.00 0.40 A\n")
    assert read_ctm(file) == {"u2": [Timed("A", 0.0, 0.4), Timed("B", 0.5, 0.7)], "u1": [Timed("X", 0.1, 0.3)]}
    for line in ("u1 1 0.1 X\n", "u1 1 nan 0.1 X\n"):
        file.write_text(line)
        with pytest.raises(DataError, match=r"x\.ctm:1 is no line of a CTM file"):
            read_ctm(file)


def test_alignments_of_supervisions():
    items = [AlignmentItem("A", 0.1, 0.2), AlignmentItem("B", 0.4, 0.1)]
    cut = MonoCut("c", 0, 1, 0)
    cut.supervisions = [SupervisionSegment("c", "r", 0, 1, text="A B", alignment={"word": items})]
    bare = MonoCut("d", 0, 1, 0)
    found = cut_alignments([cut, bare])
    assert found.keys() == {"c"}
    assert [tuple(x) for x in found["c"]] == [("A", 0.1, pytest.approx(0.3)), ("B", 0.4, 0.5)]


def test_emissions_are_the_ends_of_frames_of_tokens_or_of_the_last_tokens_of_words(tmp_path):
    tokenizer = Tokenizer.train_char(["AB C"])
    tokens = tokenizer.encode("AB C")
    line = {"id": "u", "nbest": [{"tokens": tokens, "timestamps": [0, 3, 5, 9]}]}
    (tmp_path / "n.jsonl").write_text(json.dumps(line) + "\n")
    assert emissions(tmp_path / "n.jsonl", tokenizer, words=True) == {"u": [("AB", 0.16), ("C", 0.4)]}
    found = emissions(tmp_path / "n.jsonl", tokenizer, words=False)["u"]
    assert found == [("A", 0.04), ("B", 0.16), ("\u2581", 0.24), ("C", 0.4)]
    line["nbest"][0]["tokens"] = [99, *tokens[1:]]
    for content, message in (
        ("u 1 0.1\n", r"n\.jsonl is no nbest-"), ("[]\n", "is no nbest-"), (json.dumps(line), "token 99, of 8"),
    ):  # fmt: skip
        (tmp_path / "n.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            emissions(tmp_path / "n.jsonl", tokenizer, words=True)


def test_a_frame_begins_every_40_ms():
    assert [encoder_seconds(t) for t in (0, 1, 25, 1000)] == [0.0, 0.04, 1.0, 40.0]
