"""The CIF recogniser's encoder and decoder: lengths, padding, what each token sees, steps with a cache, sizes."""

import pytest
import torch
from hkd_toys import hkd_config
from nar_toys import VOCAB

from icefall_kd.config import AttentionDecoderConfig, CifConfig, ModelConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import pooled_len, pooled_seconds
from icefall_kd.models.cif_decoder import CifDecoder
from icefall_kd.models.cif_model import CifModel
from icefall_kd.models.conformer import parameter_counts
from icefall_kd.models.pooled_conformer import PooledConformer, default_pool_layers, pool_pairs


def test_the_published_aishell_model_has_as_many_parameters():
    with torch.device("meta"):
        model = CifModel(
            ModelConfig(encoder_size="medium", num_encoder_layers=15, feedforward_dim=2048, cnn_kernel=15),
            AttentionDecoderConfig(num_decoder_layers=2, decoder_feedforward_dim=2048, decoder_dropout=0.2),
            CifConfig(),
            4234,
        )
    assert parameter_counts(model)["total"] == 47_208_587
    assert model.encoder.pool_layers == [5, 10]


@pytest.mark.parametrize("pools", [0, 1, 2, 3])
def test_lengths_count_what_convolution_and_pools_leave(pools):
    for frames in range(3, 60):
        begins = list(range(0, frames - 2, 2))  # where a kernel of 3 fits
        for _ in range(pools):
            begins = begins[::2]  # every pair, and a last one alone
        assert pooled_len(frames, pools) == len(begins) == int(pooled_len(torch.tensor(frames), pools))
        assert [pooled_seconds(t, pools) for t in range(len(begins))] == pytest.approx([0.01 * b for b in begins])
    assert [pooled_len(n, pools) for n in (0, 1, 2)] == [0, 0, 0]


def make_encoder(pool_layers=None, layers=3):
    torch.manual_seed(1)
    return PooledConformer(hkd_config(model={"num_encoder_layers": layers}).model, 6, pool_layers).eval()


@pytest.mark.parametrize("pool_layers", [None, [], [3]])
def test_an_utterance_alone_is_what_it_is_in_a_batch(pool_layers):
    encoder, lens = make_encoder(pool_layers), torch.tensor([97, 96, 70, 35, 3])
    features = torch.randn(5, 97, 80, generator=torch.Generator().manual_seed(2))
    batch = encoder(features, lens)
    for n, length in enumerate(lens.tolist()):
        alone = encoder(features[n : n + 1, :length], lens[n : n + 1])
        count = encoder.output_lens(length)
        assert alone.encoder_out.shape[1] == count == batch.encoder_out_lens[n] == alone.encoder_out_lens[0]
        torch.testing.assert_close(alone.encoder_out[0], batch.encoder_out[n, :count], rtol=1e-4, atol=1e-5)


def test_pairs_are_pooled_and_padding_is_not_seen():
    x = torch.tensor([[1.0, 5.0, -3.0, 9.0, -2.0], [1.0, 0.0, -3.0, 7.0, 7.0]]).unsqueeze(2)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    assert pool_pairs(x, padding).squeeze(2).tolist() == [[5.0, 9.0, -2.0], [1.0, -3.0, 0.0]]


def test_where_the_pools_are():
    assert [default_pool_layers(n) for n in (2, 6, 8, 12, 15)] == [[1, 2], [2, 4], [3, 5], [4, 8], [5, 10]]
    for wrong in ([4], [0], [1, 1]):
        with pytest.raises(ConfigError, match="name different layers of the encoder's 1 to 3"):
            make_encoder(wrong)
    with pytest.raises(ConfigError, match="1 to 1"):
        make_encoder(layers=1)
    with pytest.raises(ConfigError, match="--streaming"):
        PooledConformer(ModelConfig(encoder_size="tiny", streaming=True))
    with pytest.raises(DataError, match="at least 3 frames"):
        make_encoder()(torch.zeros(1, 2, 80), torch.tensor([2]))


@pytest.fixture
def decoder():
    torch.manual_seed(3)
    return CifDecoder(VOCAB, 32, 2, 2, 48, 0.0, 0.0).eval()


def inputs(n=2, u=6, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n, u), generator=generator), torch.randn(n, u, 32, generator=generator)


def test_logits_depend_on_earlier_tokens_and_on_vectors_up_to_their_own(decoder):
    y, c = inputs()
    before, _ = decoder(y, c)
    for changed in range(6):
        other = y.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB  # the token before token ``changed``
        differs = (decoder(other, c)[0] != before).any(dim=2)
        assert differs.tolist() == [[u >= changed for u in range(6)]] * 2
        other = c.clone()
        other[:, changed] += 1.0
        differs = (decoder(y, other)[0] != before).any(dim=2)
        assert differs.tolist() == [[u >= changed for u in range(6)]] * 2


def test_a_vector_enters_above_its_own_token_and_below_the_next(decoder):
    """With attention and feed-forward silent, token u sees c_u and c_{u-1} alone."""
    with torch.no_grad():
        for layer in decoder.layers:
            for part in (layer.self_out, layer.contract):
                part.weight.zero_()
                part.bias.zero_()
    y, c = inputs()
    before, _ = decoder(y, c)
    other = c.clone()
    other[:, 2] += 1.0
    assert (decoder(y, other)[0] != before).any(dim=2)[0].tolist() == [False, False, True, True, False, False]


def test_steps_with_a_cache_are_the_forward_pass(decoder):
    y, c = inputs()
    expected, states = decoder(y, c)
    assert states.shape == (2, 6, 32)
    torch.testing.assert_close(decoder.output(states), expected)
    cache, rows = decoder.start(2), torch.tensor([0, 1])
    for u in range(6):
        if u == 3:  # both rows go on from the second sequence, and from then on are it
            cache.reorder(torch.tensor([1, 1]))
            rows = torch.tensor([1, 1])
        c_prev = c[rows, u - 1] if u else torch.zeros(2, 32)
        logits = decoder.step(y[rows, u], c_prev, c[rows, u], cache)
        torch.testing.assert_close(logits, expected[rows, u], rtol=1e-4, atol=1e-5)
    assert cache.length == 6


def test_the_head_of_ctc_is_built_for_its_loss_alone():
    config = hkd_config(cif={"cif_ctc_scale": 0.0})
    model = CifModel(config.model, config.attention, config.cif, VOCAB)
    assert model.ctc_output is None and not any("ctc" in name for name, _ in model.named_parameters())
