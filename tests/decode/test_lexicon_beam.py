"""CTC beam search over a lexicon against all paths of short utterances."""

import itertools
import math
import sys

import pytest
import torch

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.lexicon_beam import LexiconBeam, LexiconBeamSearch
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.optional import probe_import
from icefall_kd.text.lexicon import Lexicon
from icefall_kd.text.ngram import estimate
from icefall_kd.text.tokenizer import SPACE, Tokenizer

WIDE = {"beam_size": 5000, "beam_tokens": 100, "beam_threshold": 1000.0}
SPACED = Tokenizer("char", ["<blk>", "<sos/eos>", "<unk>", "A", "B", SPACE, "<mask>"], "word")
PLAIN = Tokenizer("char", ["<blk>", "<sos/eos>", "<unk>", "A", "B", "C", "<mask>"], "char")


class Model:
    ctc_output = torch.nn.Identity()


def lexicon(*words):
    return Lexicon([(word, tuple(word)) for word in sorted(words)])


def segmentations(text, lengths, words):
    """Yield all ways to write a text as words of the lexicon, the last token of each in one frame."""
    if not text:
        yield ()
    for word in words:
        if text.startswith(word) and lengths[len(word) - 1] == 1:
            yield from ((word, *rest) for rest in segmentations(text[len(word) :], lengths[len(word) :], words))


def best_scores(logits, tokenizer, words, lm, weight, bonus):
    """Return the score of every word sequence: its best path, the n-gram and the words."""
    log_probs = logits.log_softmax(-1)
    log_probs[:, 0] = torch.logaddexp(log_probs[:, 0], log_probs[:, 2])
    found = {}
    for path in itertools.product([0, 3, 4, 5], repeat=len(logits)):
        acoustic = sum(float(log_probs[t, k]) for t, k in enumerate(path))
        runs = [(k, len(list(group))) for k, group in itertools.groupby(path) if k]
        text = "".join(tokenizer.tokens[k] for k, _ in runs)
        if tokenizer.word_separator:
            spoken = [tuple(word for word in text.split(SPACE) if word)]
            spoken = [s for s in spoken if all(word in words for word in s)]
        else:
            spoken = list(segmentations(text, [length for _, length in runs], words))
        for sequence in spoken:
            state, total = lm.start, acoustic
            for word in (*sequence, "</s>"):
                log_prob, state = lm.score(state, word)
                total += weight * log_prob / math.log(10) + (bonus if word != "</s>" else 0.0)
            found[sequence] = max(found.get(sequence, -math.inf), total)
    return found


@pytest.mark.parametrize("tokenizer", [SPACED, PLAIN], ids=["letters", "without-spaces"])
def test_it_finds_the_best_words_of_all_paths(tokenizer):
    pytest.importorskip("flashlight.lib.text")
    words = ["A", "AB", "BB"] if tokenizer is SPACED else ["A", "AB", "C"]
    lm = estimate([words[:2], words[1:], [words[0], words[2]], words], 2)
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor([5, 3, 1, 0])
    seen = set()
    for weight, bonus in ((2.0, -1.0), (0.5, 2.0), (0.0, 0.5)):
        options = LexiconBeam(lm_weight=weight, word_score=bonus, nbest=2, **WIDE)
        search = LexiconBeamSearch(Model(), lexicon(*words), tokenizer, lm, options)
        for _ in range(4):
            x = 3 * torch.randn(4, 5, 7, generator=generator)
            found = search.decode(x, lens)
            assert found[3][0].tokens == [] and found[3][0].text == ""
            for hyps, row, length in zip(found[:3], x, lens.tolist(), strict=False):
                wanted = best_scores(row[:length].clone(), tokenizer, words, lm, weight, bonus)
                best = max(wanted, key=wanted.get)
                assert hyps[0].text == (" " if tokenizer is SPACED else "").join(best)
                assert hyps[0].score == pytest.approx(wanted[best], abs=1e-3)
                assert tokenizer.decode(hyps[0].tokens).replace(" ", "") == "".join(best)
                times = hyps[0].timestamps
                assert len(times) == len(hyps[0].tokens) and sorted(times) == times
                seen.add(best)
    assert len(seen) > 4  # more than the empty text


def test_a_language_model_decides_between_words_that_sound_alike():
    pytest.importorskip("flashlight.lib.text")
    tokens = [3, 5, 4]  # A, a space, B
    x = 20.0 * torch.nn.functional.one_hot(torch.tensor([tokens]), 7).float()
    x[0, 2, 3] = 19.0  # nearly an A
    for text, spoken in ((["A", "B"], "A B"), (["A", "A"], "A A")):
        lm = estimate([text] * 9 + [["B", "A"]], 2)
        (hyps,) = LexiconBeamSearch(Model(), lexicon("A", "B"), SPACED, lm).decode(x, torch.tensor([3]))
        assert hyps[0].text == spoken and hyps[0].timestamps == [0, 1, 2]
    nothing = LexiconBeamSearch(Model(), lexicon("A", "B"), SPACED)
    assert nothing.decode(x, torch.tensor([3]))[0][0].text == "A B"


def test_what_cannot_be_searched_is_refused(monkeypatch, tmp_path):
    class Bare:
        ctc_output = None

    with pytest.raises(ConfigError, match="no CTC head"):
        LexiconBeamSearch(Bare(), lexicon("A"), SPACED)
    with pytest.raises(ConfigError, match="needs --lang-dir"):
        LexiconBeamSearch.from_config(Model(), DecodeConfig(decoding_method="ctc_lexicon_beam"))
    with pytest.raises(ConfigError, match=r"--word-lm .*is an option of ctc_lexicon_beam"):
        DecodeConfig(word_lm=tmp_path / "lm.arpa")
    for name in [name for name in sys.modules if name.split(".")[0] == "flashlight"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashlight", None)
    probe_import.cache_clear()
    with pytest.raises(ConfigError, match=r"ctc_lexicon_beam needs flashlight.*pip install -e '\.\[beam\]'"):
        LexiconBeamSearch(Model(), lexicon("A"), SPACED)
    probe_import.cache_clear()


def test_a_word_lm_of_other_words_is_refused():
    pytest.importorskip("flashlight.lib.text")
    with pytest.raises(ConfigError, match="no word of --word-lm is in the lexicon"):
        LexiconBeamSearch(Model(), lexicon("A"), SPACED, estimate([["x", "y"]], 2))


def test_the_suffix_says_what_was_searched(tmp_path):
    files = {"lang_dir": tmp_path / "lang_char", "word_lm": tmp_path / "lm.arpa"}
    suffix = decode_suffix(DecodeConfig(decoding_method="ctc_lexicon_beam", **files))
    assert "ctc_lexicon_beam_beam-size-50_tokens-32_threshold-32.0_word-score--1.0" in suffix
    assert "lang-lang_char_lm-lm-weight-2.0" in suffix
