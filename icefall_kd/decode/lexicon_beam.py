"""CTC beam search over a lexicon with a word n-gram, by flashlight-text (Kahn et al. 2022, arXiv 2201.12465).

A hypothesis is a sequence of words of the lexicon; its score is that of its best alignment, plus a weight times the
n-gram's log10 p(words), plus a score a word.  The base is 10, as in the decoder of the public recipes of wav2vec 2.0
and HuBERT, whose weights then mean the same here.  The only module that imports flashlight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import UNK_ID, Hypothesis
from icefall_kd.decode.ctc_string import unknown_as_blank
from icefall_kd.errors import ConfigError
from icefall_kd.runtime.optional import require
from icefall_kd.text.lexicon import Lexicon
from icefall_kd.text.ngram import EOS, NgramLm, read_arpa
from icefall_kd.text.tokenizer import Tokenizer

# Log-probability of what an utterance's closing frame does not hold: far below every threshold.
_NEVER = -1e5


@dataclass(frozen=True, kw_only=True)
class LexiconBeam:
    """Options of the search; defaults are those of the co-author's code (docs/hubert.md)."""

    beam_size: int = 50
    """Hypotheses a frame."""
    beam_tokens: int = 32
    """Likeliest tokens of a frame that continue a hypothesis."""
    beam_threshold: float = 32.0
    """Score behind the best hypothesis at which one is dropped."""
    lm_weight: float = 2.0
    """Of the n-gram's log10-probability."""
    word_score: float = -1.0
    """Added a word."""
    silence_score: float = 0.0
    """Added a frame of the token between words."""
    nbest: int = 1
    """Hypotheses returned."""


class LexiconBeamSearch:
    """Search for the words of a lexicon.

    Where a token stands between words (characters), it ends every word; transcripts have none behind the last one, so
    that every utterance gets one more frame, which holds this token alone.  Without such a token, alignments have the
    last token of a word in one frame: the library's search counts further frames of it as blanks.

    Args:
        model: with a CTC head, in evaluation mode.
        lexicon: words with their tokens.
        tokenizer: of the model.
        lm: n-gram of the words; None: all are equally likely.
        options: of the search.
        unk_id: its probability is the blank's.
    Raises:
        ConfigError: the model has no CTC head, flashlight-text is missing, or the n-gram knows no word of the lexicon.
    """

    def __init__(
        self,
        model,
        lexicon: Lexicon,
        tokenizer: Tokenizer,
        lm: NgramLm | None = None,
        options: LexiconBeam = LexiconBeam(),
        unk_id: int | None = UNK_ID,
    ) -> None:
        if model.ctc_output is None:
            raise ConfigError("the model has no CTC head (it was trained with --ctc-scale 0): no ctc_lexicon_beam")
        decoder = _flashlight()
        self.model, self.options, self.unk_id, self.blank_id = model, options, unk_id, tokenizer.blank_id
        self.words = sorted({word for word, _ in lexicon.entries})
        if lm is not None and not set(lm.words) & set(self.words):
            raise ConfigError("no word of --word-lm is in the lexicon; is it a model of other words, or of tokens?")
        ids = {token: i for i, token in enumerate(tokenizer.tokens)}
        separator = tokenizer.word_separator
        self.separator = None if separator is None else ids[separator]
        self.gap = " " if tokenizer.unit == "word" else ""
        # Without separators "silence" is the blank, which adds nothing to what a blank does anyway.
        silence = self.blank_id if self.separator is None else self.separator
        self._lm = _word_lm(decoder, lm, self.words) if lm is not None else decoder.ZeroLM()
        numbers, end = {word: i for i, word in enumerate(self.words)}, [] if separator is None else [self.separator]
        trie, start = decoder.Trie(tokenizer.vocab_size, silence), self._lm.start(False)
        for word, pieces in lexicon.entries:
            number = numbers[word]
            trie.insert([*(ids[piece] for piece in pieces), *end], number, self._lm.score(start, number)[1])
        trie.smear(decoder.SmearingMode.MAX)
        chosen = decoder.LexiconDecoderOptions(
            beam_size=options.beam_size,
            beam_size_token=min(options.beam_tokens, tokenizer.vocab_size),
            beam_threshold=options.beam_threshold,
            lm_weight=options.lm_weight,
            word_score=options.word_score,
            unk_score=-math.inf,
            sil_score=options.silence_score,
            log_add=False,
            criterion_type=decoder.CriterionType.CTC,
        )
        self._search = decoder.LexiconDecoder(chosen, trie, self._lm, silence, self.blank_id, -1, [], False)

    @classmethod
    def from_config(cls, model, config: DecodeConfig) -> "LexiconBeamSearch":
        """Return the search that the options of decode.py describe.

        Raises:
            ConfigError: no --lang-dir, or see the class.
            DataError: lexicon or n-gram are missing or damaged.
        """
        if config.lang_dir is None:
            raise ConfigError("--decoding-method ctc_lexicon_beam needs --lang-dir, the folder of lexicon.txt")
        _flashlight()
        tokenizer = Tokenizer.load(config.exp_dir / "tokenizer")
        options = LexiconBeam(
            beam_size=config.lexicon_beam_size,
            beam_tokens=config.lexicon_beam_tokens,
            beam_threshold=config.lexicon_beam_threshold,
            lm_weight=config.word_lm_weight,
            word_score=config.word_score,
            silence_score=config.silence_score,
            nbest=config.nbest,
        )
        lm = read_arpa(config.word_lm) if config.word_lm is not None else None
        return cls(model, Lexicon.read(config.lang_dir / "lexicon.txt", tokenizer), tokenizer, lm, options)

    @torch.no_grad()
    def decode(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> list[list[Hypothesis]]:
        """Return the hypotheses of every utterance, best first, with their words as ``text``.

        Args:
            encoder_out: (N, T', C).
            encoder_out_lens: (N,).
        Returns:
            N lists of :class:`Hypothesis` of different words; the timestamp of a token is the first frame of its run.
        """
        log_probs = self.model.ctc_output(encoder_out).float().log_softmax(dim=-1)  # (N, T', V)
        log_probs = unknown_as_blank(log_probs, self.blank_id, self.unk_id).clamp(min=_NEVER).cpu()
        return [self._one(rows[:n]) for rows, n in zip(log_probs, encoder_out_lens.tolist(), strict=True)]

    def _one(self, log_probs: Tensor) -> list[Hypothesis]:
        """Return the hypotheses of log-probabilities (T', V)."""
        if not len(log_probs):
            return [Hypothesis([], 0.0, [], "")]
        if self.separator is not None:
            closing = torch.full_like(log_probs[:1], _NEVER)
            closing[0, self.separator] = 0.0
            log_probs = torch.cat([log_probs, closing])
        log_probs = log_probs.contiguous()
        found: dict[tuple[int, ...], Hypothesis] = {}
        for result in self._search.decode(log_probs.data_ptr(), *log_probs.shape):
            words = tuple(word for word in result.words if word >= 0)
            if words not in found:
                # One entry in front of the frames and one behind them are not of frames.
                found[words] = self._hypothesis(words, result.tokens[1 : len(log_probs) + 1], result.score)
        return list(found.values())[: self.options.nbest]

    def _hypothesis(self, words: Sequence[int], path: Sequence[int], score: float) -> Hypothesis:
        starts = [t for t, token in enumerate(path) if token != self.blank_id and (t == 0 or token != path[t - 1])]
        while starts and path[starts[-1]] == self.separator:
            starts.pop()
        text = self.gap.join(self.words[word] for word in words)
        return Hypothesis([path[t] for t in starts], score, starts, text)


def _flashlight():
    return require(
        "flashlight.lib.text.decoder",
        "--decoding-method ctc_lexicon_beam",
        "pip install -e '.[beam]' -c constraints.txt (flashlight-text)",
    )


def _word_lm(decoder, lm: NgramLm, words: Sequence[str]):
    """Return an n-gram as the language model of flashlight's search, which is told words by number.

    Hypotheses with an equal n-gram state have one state in common, so that the search merges them.
    """

    class WordLm(decoder.LM):
        def __init__(self) -> None:
            super().__init__()
            self.known: dict = {}  # flashlight's state -> the n-gram's; it also keeps them alive
            self.of: dict = {}

        def _state(self, ngram_state):
            if ngram_state not in self.of:
                state = decoder.LMState()
                self.of[ngram_state], self.known[state] = state, ngram_state
            return self.of[ngram_state]

        def start(self, start_with_nothing: bool):
            return self._state(() if start_with_nothing else lm.start)

        def score(self, state, number: int):
            log_prob, after = lm.score(self.known[state], words[number])
            return self._state(after), log_prob / math.log(10.0)

        def finish(self, state):
            return state, lm.score(self.known[state], EOS)[0] / math.log(10.0)

    return WordLm()
