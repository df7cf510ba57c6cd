"""A random decoder and joiner, encoder output for it, and plain loops over one utterance."""

import math

import torch

from icefall_kd.models.transducer import Joiner, StatelessDecoder

DIM, VOCAB = 16, 9


class Model(torch.nn.Module):
    """Decoder and joiner alone, sharp enough that symbols and blanks alternate."""

    def __init__(self, context_size: int = 2, seed: int = 0, blank_bias: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.decoder = StatelessDecoder(VOCAB, 8, context_size=context_size)
        self.joiner = Joiner(DIM, 8, 12, VOCAB)
        self.ctc_output = None
        with torch.no_grad():
            self.joiner.encoder_proj.weight.mul_(8)
            self.joiner.decoder_proj.weight.mul_(8)
            self.joiner.output_linear.weight.mul_(6)
            self.joiner.output_linear.bias[0] += blank_bias
        self.double().eval()


def log_probs(model, frame, context, blank_penalty=0.0, temperature=1.0):
    """Return the log-probabilities (V,) of one frame (C,) after ``context``, the plain way."""
    logits = model.joiner(frame, model.decoder(torch.tensor([context]))[0, -1])
    logits[0] -= blank_penalty
    return (logits / temperature).float().log_softmax(-1).tolist()


def ragged(seed: int, n: int = 6, longest: int = 17):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, longest + 1, (n,), generator=g)
    lens[0] = longest
    lens[-1] = 0
    # Padding holds large garbage: it must never be read.
    x = torch.randn(n, longest, DIM, generator=g, dtype=torch.float64)
    for i, length in enumerate(lens.tolist()):
        x[i, length:] = 1e3
    return x, lens


@torch.no_grad()
def total_log_prob(model, frames, tokens, unk_id=2):
    """Return the log-probability of ``tokens`` summed over every alignment with one symbol a frame at most."""
    c = model.decoder.context_size
    history = [-1] * (c - 1) + [0, *tokens]
    alpha = [0.0] + [-math.inf] * len(tokens)
    for frame in frames:
        new = [-math.inf] * len(alpha)
        for u, a in enumerate(alpha):
            row = log_probs(model, frame, history[u : u + c])
            stay = torch.logsumexp(torch.tensor([row[0], row[unk_id]]).double(), 0).item()
            new[u] = torch.logaddexp(torch.tensor(new[u]), torch.tensor(a + stay)).item()
            if u < len(tokens):
                new[u + 1] = a + row[tokens[u]]
        alpha = new
    return alpha[-1]
