"""Hot words: bonuses against counting, in the automaton and in the beam search."""

import itertools
import random

import pytest
from toy_search import Model, ragged, total_log_prob

from icefall_kd.decode.fusion import Fusion, HotwordScorer
from icefall_kd.decode.hotwords import HotwordGraph, read_hotwords
from icefall_kd.decode.transducer import ModifiedBeamSearch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.text.tokenizer import Tokenizer


def bonus(phrases, tokens) -> float:
    """Return the scores of all phrases wherever they occur in ``tokens``, by looking at every place."""
    return sum(
        len(phrase) * score
        for phrase, score in phrases
        for i in range(len(tokens) - len(phrase) + 1)
        if list(tokens[i : i + len(phrase)]) == list(phrase)
    )


def walk(graph, tokens):
    state, gains = 0, []
    for token in tokens:
        gain, state = graph.extend(state, token)
        gains.append(gain)
    return gains, graph.final(state)


FIXED = [
    [([3, 4, 5], 1.0)],
    [([3, 4], 2.0), ([3, 4, 5], 0.5)],  # one begins with the other
    [([3, 3, 3], 1.0), ([3, 4, 3], 0.7), ([4], 0.2)],  # overlaps with itself; a phrase of one token
    [([3, 4, 5, 3], 1.0), ([4, 5], 3.0), ([5, 3, 4], 0.1)],  # inside and across others
]


@pytest.mark.parametrize("phrases", FIXED)
def test_the_gains_of_every_sequence_add_up_to_its_complete_matches(phrases):
    graph = HotwordGraph(phrases)
    for length in range(7):
        for tokens in itertools.product([3, 4, 5], repeat=length):
            gains, final = walk(graph, tokens)
            assert sum(gains) + final == pytest.approx(bonus(phrases, tokens), abs=1e-9), tokens
            # What the beam sees is never less than what is earned for good.
            assert sum(gains) >= bonus(phrases, tokens) - 1e-9


def test_random_phrases_and_sequences():
    rng = random.Random(0)
    for _ in range(300):
        found = {tuple(rng.choices([3, 4, 5], k=rng.randint(1, 4))) for _ in range(rng.randint(1, 6))}
        phrases = [(p, rng.choice([0.5, 1.0, 2.5])) for p in sorted(found)]
        tokens = rng.choices([3, 4, 5, 6], k=30)
        gains, final = walk(HotwordGraph(phrases), tokens)
        assert sum(gains) + final == pytest.approx(bonus(phrases, tokens), abs=1e-9)


def test_a_partial_match_is_rewarded_at_once_and_nets_zero_when_it_breaks():
    graph = HotwordGraph([([3, 4, 5], 1.5)])
    assert walk(graph, [3, 4, 6]) == ([1.5, 1.5, -3.0], 0.0)
    assert walk(graph, [3, 4]) == ([1.5, 1.5], -3.0)
    assert walk(graph, [3, 4, 5]) == ([1.5, 1.5, 1.5], 0.0)
    assert walk(graph, [3, 3, 4]) == ([1.5, 0.0, 1.5], -3.0)


def test_of_the_same_phrase_twice_the_higher_score_counts():
    assert walk(HotwordGraph([([3, 4], 1.0), ([3, 4], 2.0)]), [3, 4]) == ([2.0, 2.0], 0.0)


def test_a_beam_that_drops_nothing_adds_the_bonus_to_every_sequence():
    model, phrases = Model(seed=3), [([3, 4], 1.0), ([4, 5, 6], 0.8), ([7], 0.3)]
    x, lens = ragged(3, n=2, longest=4)
    lens[:] = 4
    fusion = Fusion([HotwordScorer(HotwordGraph(phrases))])
    hyps = ModifiedBeamSearch(model, beam_size=9**4, nbest=9**4, fusion=fusion).decode(x[:1, :4], lens[:1])[0]
    by_tokens = {tuple(h.tokens): h.score for h in hyps}
    plain = ModifiedBeamSearch(model, beam_size=9**4, nbest=9**4).decode(x[:1, :4], lens[:1])[0]
    assert by_tokens == {
        tuple(h.tokens): pytest.approx(h.score + bonus(phrases, h.tokens), abs=1e-9) for h in plain
    }
    for tokens in ([3, 4], [4, 5, 6], [3, 4, 5], [7, 7], []):
        expected = total_log_prob(model, x[0, :4], tokens) + bonus(phrases, tokens)
        assert by_tokens[tuple(tokens)] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_large_score_brings_the_phrase_and_partial_results_hold_no_loan():
    x, lens = ragged(2, longest=15)
    phrase = [3, 5, 4]
    search = ModifiedBeamSearch(Model(seed=2), fusion=Fusion([HotwordScorer(HotwordGraph([(phrase, 9.0)]))]))
    plain = ModifiedBeamSearch(Model(seed=2))
    assert bonus([(phrase, 1.0)], plain.decode(x[:1], lens[:1])[0][0].tokens) == 0
    assert bonus([(phrase, 1.0)], search.decode(x[:1], lens[:1])[0][0].tokens) > 0
    state = search.start(1)
    for t in range(15):
        search.advance(state, x[:1, t : t + 1], lens[:1].clamp(max=1))
        assert search.result(state) == search.decode(x[:1], lens[:1].clamp(max=t + 1))


@pytest.fixture
def tokenizer():
    return Tokenizer.train_char(["NEW YORK CITY 7"])


def test_a_file_gives_phrases_in_tokens_with_scores(tokenizer, tmp_path):
    file = tmp_path / "hot.txt"
    file.write_text("NEW YORK\n\ncity :2.5\n new york, 7  :3\n")
    assert read_hotwords(file, tokenizer, 1.5) == [
        (tokenizer.encode("NEW YORK"), 1.5),
        (tokenizer.encode("CITY"), 2.5),
        (tokenizer.encode("NEW YORK 7"), 3.0),
    ]


@pytest.mark.parametrize(
    "content, error, message",
    [
        ("\n", DataError, "holds no phrase"),
        ("NEW\nBERLIN\n", ConfigError, "hot.txt:2: 'BERLIN' cannot be written"),
        ("NEW :0\n", ConfigError, "hot.txt:1: the score 0 is no number above 0"),
        ("NEW :inf\n", ConfigError, "the score inf is no number above 0"),
        ("NEW :x\n", ConfigError, "the score x is no number above 0"),
        ("... :2\n", ConfigError, r"'\.\.\.' cannot be written"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tokenizer, tmp_path, content, error, message):
    (tmp_path / "hot.txt").write_text(content)
    with pytest.raises(error, match=message):
        read_hotwords(tmp_path / "hot.txt", tokenizer, 1.5)
