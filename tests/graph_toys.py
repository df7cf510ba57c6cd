"""Small models and language directories for the tests with k2."""

import math
from pathlib import Path

import torch

from icefall_kd.models.transducer import Joiner, StatelessDecoder
from icefall_kd.text.graphs import GraphConfig, make_graphs
from icefall_kd.text.lexicon import Lexicon
from icefall_kd.text.tokenizer import Tokenizer

DIM = 6
ARPA = """\\data\\
ngram 1=5
ngram 2=4

\\1-grams:
-99 <s> -0.3
-0.6 </s>
-0.5 A -0.2
-0.7 AB
-0.9 BA -0.4

\\2-grams:
-0.1 <s> AB
-0.3 A AB
-0.2 BA A
-0.4 BA </s>

\\end\\
"""
# The same model: log10 of n-grams and of backoffs.
BIGRAMS = {("<s>", "AB"): -0.1, ("A", "AB"): -0.3, ("BA", "A"): -0.2, ("BA", "</s>"): -0.4}
UNIGRAMS = {"</s>": -0.6, "A": -0.5, "AB": -0.7, "BA": -0.9}
BACKOFF = {"<s>": -0.3, "A": -0.2, "BA": -0.4}


def sentence_score(words, scale=1.0, combine=max):
    """Return the scaled log-probability (base e) of a sentence in a graph of the model.

    A word whose bigram is known has two ways, the bigram and the backoff; ``combine`` takes their scaled scores:
    max for the best path, log_sum for all paths.
    """
    total, before = 0.0, "<s>"
    for word in [*words, "</s>"]:
        ways = [BACKOFF.get(before, 0.0) + UNIGRAMS[word]]
        if (before, word) in BIGRAMS:
            ways.append(BIGRAMS[before, word])
        total += combine([scale * math.log(10) * way for way in ways])
        before = word
    return total


def log_sum(values):
    return math.log(sum(map(math.exp, values)))


class Model(torch.nn.Module):
    """Decoder, joiner and CTC head alone, sharp enough that symbols and blanks alternate."""

    def __init__(self, vocab_size: int, context_size: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size, self.rows = vocab_size, {}
        self.decoder = StatelessDecoder(vocab_size, 8, context_size=context_size)
        self.joiner = Joiner(DIM, 8, 12, vocab_size)
        self.ctc_output = torch.nn.Linear(DIM, vocab_size)
        with torch.no_grad():
            for layer in (self.joiner.encoder_proj, self.joiner.decoder_proj, self.ctc_output):
                layer.weight.mul_(6)
            self.joiner.output_linear.weight.mul_(4)
        self.eval()

    @torch.no_grad()
    def log_probs(self, frame, context):
        """Return the log-probabilities of one frame (C,) after a context; the unknown token counts as blank."""
        key = (tuple(frame.tolist()), tuple(context))
        if key not in self.rows:
            self.rows[key] = self._log_probs(frame, context)
        return self.rows[key]

    def _log_probs(self, frame, context):
        logits = self.joiner(frame, self.decoder(torch.tensor([context]))[0, -1])
        row = logits.log_softmax(-1).tolist()
        row[0] = math.log(math.exp(row[0]) + math.exp(row[2]))
        return row


def write_lang(folder: Path, texts=("AB BA", "A AB"), kind="char", arpa=ARPA, lexicon=None) -> Tokenizer:
    """Write a language directory with its graphs; return the tokenizer."""
    tokenizer = Tokenizer.train_pinyin(texts) if kind == "pinyin" else Tokenizer.train_char(texts)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    (lexicon or Lexicon.from_texts(texts, tokenizer)).write(folder)
    (folder / "lm.arpa").write_text(arpa)
    make_graphs(GraphConfig(lang_dir=folder, arpa=folder / "lm.arpa"))
    return tokenizer
