"""A small random Mask-CTC model or teacher, sharp enough that its searches have something to decide."""

import itertools
import math

import torch

from icefall_kd.config import AttentionDecoderConfig, ModelConfig
from icefall_kd.models.ctc_attention import CtcAttentionModel

DIM = 16


def nar_model(seed: int = 0, vocab_size: int = 12, decoder: str = "mlm", sharpness: float = 3.0) -> CtcAttentionModel:
    torch.manual_seed(seed)
    shape = ModelConfig(
        encoder_size="tiny", num_encoder_layers=1, encoder_dim=DIM, num_heads=2, feedforward_dim=16, cnn_kernel=3
    )
    options = AttentionDecoderConfig(
        attention_decoder=decoder, num_decoder_layers=2, decoder_feedforward_dim=24, decoder_heads=2
    )
    model = CtcAttentionModel(shape, options, vocab_size)
    with torch.no_grad():
        model.ctc_output.weight.mul_(8)
        model.ctc_output.bias[[model.sos_id, model.mask_id]] -= 1e4  # CTC is never trained to emit these
        model.decoder.output.weight.mul_(sharpness)
        for layer in model.decoder.layers:  # what a position holds, and what is heard, must matter
            for part in (layer.self_qkv, layer.self_out, layer.cross_kv, layer.cross_out):
                part.weight.mul_(2)
    return model.double().eval()


def ragged_batch(seed: int, n: int = 5, longest: int = 15, shortest: int = 1):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(shortest, longest + 1, (n,), generator=g)
    lens[0] = longest
    x = torch.randn(n, longest, DIM, generator=g, dtype=torch.float64)
    for i, length in enumerate(lens.tolist()):  # padding is garbage that must never be read
        x[i, length:] = 1e3
    return x, lens


def all_strings(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Return the probability of every string, summed over all alignments of (T', V) log-probabilities with blank 0."""
    rows, found = log_probs.double().exp().tolist(), {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(rows)):
        string = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
        p = math.prod(row[symbol] for row, symbol in zip(rows, path, strict=True))
        found[string] = found.get(string, 0.0) + p
    return found
