"""HuBERT's structures: sizes, frames, names of transformers, and that an utterance does not see its batch."""

import pytest
import torch

from icefall_kd.config import ModelConfig
from icefall_kd.config.hubert import HubertConfig
from icefall_kd.config.ssl import SslConfig
from icefall_kd.errors import ConfigError
from icefall_kd.frames import FBANK_GLU, SSL_CONV
from icefall_kd.models.hubert import THIN_CONV, HubertEncoder, own_states

TINY = {"num_encoder_layers": 2, "encoder_dim": 32, "num_heads": 4, "feedforward_dim": 48, "dropout": 0.0}
SMALL_POSITIONS = {"conv_pos": 8, "conv_pos_groups": 4}


def tiny(front_end="waveform", structure="deep_thin", model=(), **ssl) -> HubertEncoder:
    torch.manual_seed(0)
    options = {"extractor_norm": "default", "extractor_channels": 16, **ssl}
    return HubertEncoder(
        ModelConfig(**{**TINY, **dict(model)}),
        HubertConfig(structure=structure, **SMALL_POSITIONS),
        SslConfig(front_end=front_end, **options),
    ).eval()


@pytest.mark.parametrize(
    ("structure", "front_end", "parameters"),
    [
        ("shallow_wide", "waveform", 23_491_200),
        ("deep_thin", "waveform", 22_937_856),
        ("shallow_wide", "fbank", 20_103_296),
        ("deep_thin", "fbank", 19_107_008),
        ("base", "waveform", 94_370_944),
    ],
)
def test_sizes_are_the_published_ones(structure, front_end, parameters):
    with torch.device("meta"):
        encoder = HubertEncoder(
            ModelConfig(), HubertConfig(structure=structure), SslConfig(front_end=front_end, extractor_norm="default")
        )
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_fithubert_has_the_published_size():
    with torch.device("meta"):
        encoder = HubertEncoder(
            ModelConfig(),
            HubertConfig(structure="fithubert"),
            SslConfig(front_end="waveform", extractor_norm="default"),
        )
    encoder_size = sum(p.numel() for p in encoder.parameters())
    assert encoder_size == 21_200_096
    # The published 22.49 M are met with the last head, ConvTranspose1d(480, 480, 2) and Linear(480, 768), and the
    # up-sampler counted once more: that it is counted twice is inferred.
    up_sampler, head = 480 * 480 * 2 + 480, 480 * 768 + 768
    assert round((encoder_size + 2 * up_sampler + head) / 1e6, 2) == 22.49


def test_all_front_ends_give_equal_numbers_of_frames():
    for samples in range(400, 50_001):
        assert SSL_CONV.num_frames(samples) == FBANK_GLU.num_frames(samples) == THIN_CONV.num_frames(samples)


@pytest.mark.parametrize("samples", [400, 719, 720, 1039, 1040, 5000, 16001])
@pytest.mark.parametrize(
    ("front_end", "structure"), [("waveform", "base"), ("fbank", "base"), ("waveform", "fithubert")]
)
def test_frames_that_come_out_are_those_of_the_formula(front_end, structure, samples):
    encoder = tiny(front_end, structure)
    out = encoder(torch.randn(1, samples), torch.tensor([samples]))
    due = SSL_CONV.num_frames(samples)
    due = (due + 1) // 2 if structure == "fithubert" else due
    assert out.encoder_out.shape[1] == due == int(out.encoder_out_lens[0]) == encoder.output_lens(samples)


@pytest.mark.parametrize(
    ("front_end", "structure"), [("waveform", "base"), ("fbank", "base"), ("waveform", "fithubert")]
)
def test_an_utterance_does_not_see_its_batch(front_end, structure):
    encoder = tiny(front_end, structure)
    torch.manual_seed(1)
    lens = torch.tensor([9000, 16000, 4321])
    audio = torch.randn(3, 16000) * 0.1
    for row, n in enumerate(lens.tolist()):
        audio[row, n:] = 0
    together = encoder(audio, lens, taps=(0, 1, 2))
    for row, n in enumerate(lens.tolist()):
        alone = encoder(audio[row : row + 1, :n], lens[row : row + 1], taps=(0, 1, 2))
        frames = int(alone.encoder_out_lens[0])
        assert int(together.encoder_out_lens[row]) == frames
        torch.testing.assert_close(together.encoder_out[row, :frames], alone.encoder_out[0], rtol=1e-4, atol=1e-5)
        for tap in (1, 2):
            torch.testing.assert_close(together.taps[tap][row, :frames], alone.taps[tap][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["default", "layer_norm"])
def test_it_computes_what_transformers_computes(norm):
    transformers = pytest.importorskip("transformers")
    encoder = tiny(structure="base", extractor_norm=norm)
    config = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, conv_dim=(16,) * 7, feat_extract_norm={"default": "group"}.get(norm, "layer"),
        mask_time_prob=0.0,
    )  # fmt: skip
    theirs = transformers.HubertModel(config).eval()
    own = own_states(theirs.state_dict())
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    encoder.load_state_dict(own)
    audio = torch.randn(2, 8000)
    with torch.no_grad():
        expected = theirs(audio, output_hidden_states=True).hidden_states
        out = encoder(audio, torch.tensor([8000, 8000]), taps=(0, 1, 2))
    for i in range(3):
        torch.testing.assert_close(out.taps[i], expected[i], rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="--encoder-dim 32 is no multiple of --num-heads 5"):
        tiny(model={"num_heads": 5})
