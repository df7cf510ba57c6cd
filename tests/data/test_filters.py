"""The one filter: every planted case is found, with its reason."""

import pytest

from icefall_kd.data.corpora import open_corpus
from icefall_kd.data.filters import filter_cuts, repeats, why_not
from icefall_kd.data.recordings import make_cuts
from icefall_kd.frames import conv2d_subsampled_len
from icefall_kd.text.tokenizer import Tokenizer


@pytest.fixture
def cuts(write_trans):
    """16,000 samples are 100 frames, which are 24 encoder frames."""
    texts = {"fits": "A" * 12, "long": "AB" * 13, "repeats": "A" * 13, "exact": "AB" * 12, "whole": "A"}
    rows = {utt: (16000, text) for utt, text in texts.items()} | {"brief": (3200, "ABAB")}
    cuts = make_cuts(open_corpus("trans", write_trans({"train": rows})).parts["train"], "en")[0]
    # As somebody's own cut set may hold it: preparation rejects so little audio.
    return [cut.truncate(duration=0.05).with_id("short") if cut.id == "whole" else cut for cut in cuts]


TOKENIZER = Tokenizer.train_char(["AB"])


def reasons(cuts, **options):
    kept, left_out = filter_cuts(cuts, tokenizer=TOKENIZER, **options)
    assert len(kept) + len(left_out) == len(cuts)
    return {x.id: x.reason for x in left_out}


def test_the_rule_of_each_loss(cuts):
    assert conv2d_subsampled_len(100) == 24
    both = reasons(cuts)
    assert conv2d_subsampled_len(20) == 4
    assert set(both) == {"long", "repeats", "short"}
    assert both["long"] == "26 tokens, 24 encoder frames"
    assert both["repeats"] == "13 tokens with 12 repeats, 24 encoder frames"
    assert both["short"] == "5 frames give no encoder frame"
    assert "repeats" not in reasons(cuts, ctc=False)
    assert {"long", "repeats"} <= set(reasons(cuts, transducer=False))
    assert set(reasons(cuts, transducer=False, ctc=False)) == {"short"}


def test_durations(cuts):
    assert "0.05 s" in reasons(cuts, min_duration=0.3)["short"]
    assert set(reasons(cuts, max_duration=0.5)) >= {"fits", "exact"}


def test_another_encoder_brings_its_own_lengths(cuts):
    assert "exact" in reasons(cuts, num_encoder_frames=lambda t: t // 8)
    assert "long" not in reasons(cuts, num_encoder_frames=lambda t: t // 2)


def test_kept_cuts_know_their_number_of_tokens(cuts):
    kept, _ = filter_cuts(cuts, tokenizer=TOKENIZER)
    assert {c.id: c.custom["num_tokens"] for c in kept if c.id in ("fits", "exact")} == {"fits": 12, "exact": 24}
    assert all("source" in c.custom for c in kept)


def test_a_cut_with_two_supervisions_is_left_out(cuts):
    cuts[0].supervisions = cuts[0].supervisions * 2
    assert "2 supervisions" in reasons(cuts)[cuts[0].id]


def test_repeats_are_counted_against_brute_force():
    for tokens, expected in [([], 0), ([3], 0), ([3, 3], 1), ([3, 3, 3, 4, 4], 3), ([3, 4, 3], 0)]:
        assert repeats(tokens) == expected
    assert why_not([], 100) == "no tokens"


@pytest.mark.parametrize("num_frames", range(3, 40))
def test_exactly_the_utterances_with_an_alignment_are_kept(num_frames):
    frames = conv2d_subsampled_len(num_frames)
    for tokens in ([3], [3, 4], [3, 3], [3, 3, 3], [3, 4, 4, 5]):
        needed = len(tokens) + repeats(tokens)
        assert (why_not(tokens, num_frames, transducer=False) is None) == (frames >= max(1, needed))
        assert (why_not(tokens, num_frames, ctc=False) is None) == (frames >= len(tokens))
