"""A small random CIF recogniser that fires now and then and says something."""

import torch

from icefall_kd.config import AttentionDecoderConfig, CifConfig, ModelConfig
from icefall_kd.models.cif_model import CifModel

DIM, V = 16, 6  # blank, end, unknown, two tokens, mask


@torch.no_grad()
def cif_model(seed: int = 0, vocab_size: int = V, rate: float = 0.4) -> CifModel:
    """Return a random model that says something, with about ``rate`` tokens a frame."""
    torch.manual_seed(seed)
    shape = ModelConfig(
        encoder_size="tiny", num_encoder_layers=2, encoder_dim=DIM, num_heads=2, feedforward_dim=16, cnn_kernel=3
    )
    decoder = AttentionDecoderConfig(num_decoder_layers=2, decoder_feedforward_dim=24, decoder_heads=2)
    model = CifModel(shape, decoder, CifConfig(front_channels=4, cif_initial_rate=rate), vocab_size)
    model.decoder.output.weight.mul_(4)
    model.cif.output.weight.mul_(8)
    model.ctc_output.weight.mul_(8)
    return model.double().eval()


def ragged_batch(seed: int, n: int = 4, longest: int = 9):
    g = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, longest + 1, (n,), generator=g)
    lens[0] = longest
    x = torch.randn(n, longest, DIM, generator=g, dtype=torch.float64)
    for i, length in enumerate(lens.tolist()):  # padding is garbage that must never be read
        x[i, length:] = 1e3
    return x, lens
