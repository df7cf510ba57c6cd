"""What a beam search adds to the score of a token sequence beside the model: language models and hot words.

Shallow fusion (Gulcehre et al. 2015): each emitted token v after the tokens ys adds scale * log p_lm(v | ys).  LODR
(Zheng et al. 2022, "Low-order density ratio") subtracts a low-order n-gram of the training text, as an estimate of
what the transducer knows of language already: the same with a negative scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icefall_kd.config import DecodeConfig
from icefall_kd.decode.base import PrefixScorer
from icefall_kd.decode.hotwords import HotwordGraph, read_hotwords
from icefall_kd.errors import ConfigError
from icefall_kd.models.lm import LmState, TokenLm, load_lm
from icefall_kd.runtime.files import read_json
from icefall_kd.text.ngram import BOS, EOS, UNK, NgramLm, read_arpa
from icefall_kd.text.tokenizer import Tokenizer


class NgramScorer:
    """An n-gram model over tokens.  The end of a sentence adds nothing, as in icefall's searches."""

    def __init__(self, lm: NgramLm, tokens: Sequence[str], scale: float) -> None:
        self.lm, self.tokens, self.scale = lm, tokens, scale

    def start(self) -> tuple[str, ...]:
        """Return the state of the begin of a sentence."""
        return self.lm.start

    def extend(self, states, tokens):
        """Score each token by its n-gram, with back-off."""
        found = [self.lm.score(state, self.tokens[token]) for state, token in zip(states, tokens, strict=True)]
        return [self.scale * log_prob for log_prob, _ in found], [state for _, state in found]

    def final(self, state) -> float:
        """Return 0."""
        return 0.0


@dataclass(eq=False)
class _NeuralState:
    """A token sequence in the eyes of the neural model, which looks at its last token when it is extended."""

    token: int
    before: LmState
    after: LmState | None = None
    log_probs: Tensor | None = None


class NeuralScorer:
    """The neural model over tokens, run once for each token sequence that is extended, all of a frame together."""

    def __init__(self, lm: TokenLm, scale: float) -> None:
        self.lm, self.scale = lm, scale

    def start(self) -> _NeuralState:
        """Return the state of the begin of a sentence."""
        zero = self.lm.output.weight.new_zeros(self.lm.config.lm_layers, self.lm.config.lm_hidden_dim)
        return _NeuralState(self.lm.sos_id, (zero, zero))

    @torch.no_grad()
    def extend(self, states, tokens):
        """Score each token by the model's distribution behind its state."""
        new = [s for s in dict.fromkeys(states) if s.log_probs is None]
        if new:
            y = torch.tensor([[s.token] for s in new], device=self.lm.output.weight.device)
            before = tuple(torch.stack([s.before[k] for s in new], dim=1) for k in (0, 1))  # (layers, N, H)
            logits, (h, c) = self.lm(y, before)
            for k, (state, log_probs) in enumerate(zip(new, logits[:, 0].float().log_softmax(-1).cpu(), strict=True)):
                state.after, state.log_probs = (h[:, k], c[:, k]), log_probs
        pairs = list(zip(states, tokens, strict=True))
        gains = [self.scale * s.log_probs[token].item() for s, token in pairs]
        return gains, [_NeuralState(token, s.after) for s, token in pairs]

    def final(self, state) -> float:
        """Return 0."""
        return 0.0


class HotwordScorer:
    """Hot words; what a match that did not become complete has earned goes back at the latest at the end."""

    def __init__(self, graph: HotwordGraph) -> None:
        self.graph = graph

    def start(self) -> int:
        """Return the state of no match."""
        return 0

    def extend(self, states, tokens):
        """Score each token by the matches it continues, completes and breaks."""
        found = [self.graph.extend(state, token) for state, token in zip(states, tokens, strict=True)]
        return [gain for gain, _ in found], [state for _, state in found]

    def final(self, state) -> float:
        """Take back what the unfinished match has earned."""
        return self.graph.final(state)


class Fusion:
    """The sum of several scorers."""

    def __init__(self, scorers: Sequence[PrefixScorer]) -> None:
        self.scorers = list(scorers)

    def start(self) -> tuple:
        """Return the states of all scorers."""
        return tuple(scorer.start() for scorer in self.scorers)

    def extend(self, states, tokens):
        """Return the sums of all gains, and the states."""
        gains, columns = [0.0] * len(tokens), []
        for k, scorer in enumerate(self.scorers):
            added, column = scorer.extend([state[k] for state in states], tokens)
            gains = [a + b for a, b in zip(gains, added, strict=True)]
            columns.append(column)
        return gains, list(zip(*columns, strict=True))

    def final(self, state) -> float:
        """Return the sum of what the end adds."""
        return sum(scorer.final(s) for scorer, s in zip(self.scorers, state, strict=True))


def load_ngram(file: Path, tokenizer: Tokenizer, scale: float) -> NgramScorer:
    """Read a token n-gram.

    Raises:
        ConfigError: its words are no tokens of ``tokenizer``, or the record beside it names another one.
    """
    remedy = "make one with local/make_ngram.py --lang-dir of this training (exp_dir/tokenizer)"
    record_file = file.with_name(file.name + ".json")
    made_for = read_json(record_file).get("tokenizer_hash") if record_file.exists() else tokenizer.hash
    if made_for != tokenizer.hash:
        what = "words" if made_for is None else f"tokens of tokenizer {made_for}"
        raise ConfigError(f"{file} is an n-gram model of {what}, the model has tokenizer {tokenizer.hash}; {remedy}")
    lm = read_arpa(file)
    foreign = sorted(set(lm.words) - {BOS, EOS, UNK, *tokenizer.tokens})
    if foreign:
        raise ConfigError(
            f"{file} holds {len(foreign)} words that are no tokens of this model, the first are {foreign[:3]}; {remedy}"
        )
    return NgramScorer(lm, tokenizer.tokens, scale)


def build_fusion(config: DecodeConfig, tokenizer: Tokenizer, device: torch.device) -> Fusion | None:
    """Return what the options of decode.py add to the scores of modified beam search; None: nothing.

    Raises:
        ConfigError: a language model is of another tokenizer, or a hot word cannot be written in tokens.
        DataError: a file is missing or damaged.
    """
    scorers: list[PrefixScorer] = []
    if config.lm is not None:
        file = config.lm / "lm.safetensors" if config.lm.is_dir() else config.lm
        if file.suffix == ".safetensors":
            scorers.append(NeuralScorer(load_lm(file, tokenizer.hash).to(device), config.lm_scale))
        else:
            scorers.append(load_ngram(file, tokenizer, config.lm_scale))
    if config.lodr_arpa is not None:
        scorers.append(load_ngram(config.lodr_arpa, tokenizer, config.lodr_scale))
    if config.hotwords is not None:
        scorers.append(HotwordScorer(HotwordGraph(read_hotwords(config.hotwords, tokenizer, config.hotwords_score))))
    return Fusion(scorers) if scorers else None
