"""The encoder: lengths, masks, taps, sizes."""

import pytest
import torch
import torch.nn.functional as F

from icefall_kd.config import ENCODER_SIZES, ModelConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import conv2d_subsampled_len
from icefall_kd.models.attention import RelativePositions, RelativeSelfAttention, relative_shift
from icefall_kd.models.conformer import Conformer, ConvolutionModule, parameter_counts
from icefall_kd.models.masks import make_attention_mask, make_pad_mask
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks
from icefall_kd.models.subsampling import Conv2dSubsampling

SMALL = {"num_encoder_layers": 3, "encoder_dim": 32, "num_heads": 4, "feedforward_dim": 64, "cnn_kernel": 7}


def log_mel(*shape):
    return torch.randn(*shape) * 4 - 8


@pytest.fixture
def encoder():
    model = Conformer(ModelConfig(**SMALL)).eval()
    for parameter in model.parameters():  # fresh biases and norms hide what they would do later
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_an_utterance_alone_equals_the_same_in_a_padded_batch(encoder):
    x_lens = torch.tensor([83, 46, 45, 44, 43, 7])
    features = log_mel(6, 90, 80)
    for n, length in enumerate(x_lens):
        features[n, length:] = (-23.0, 1e4, 0.0, -50.0, 7.0, 3.0)[n]  # whatever padding holds
    batch = encoder(features, x_lens, taps=(1, 2))
    assert batch.encoder_out.shape == (6, conv2d_subsampled_len(90), 32)
    for n, length in enumerate(x_lens.tolist()):
        alone = encoder(features[n : n + 1, :length], x_lens[n : n + 1], taps=(1, 2))
        frames = conv2d_subsampled_len(length)
        assert alone.encoder_out.shape[1] == frames == batch.encoder_out_lens[n] == encoder.output_lens(length)
        torch.testing.assert_close(batch.encoder_out[n, :frames], alone.encoder_out[0], atol=1e-5, rtol=1e-5)
        for tap in (1, 2):
            torch.testing.assert_close(batch.taps[tap][n, :frames], alone.taps[tap][0], atol=1e-5, rtol=1e-5)


def test_padding_gets_no_gradient_and_every_parameter_does(encoder):
    features = log_mel(2, 60, 80).requires_grad_()
    out = encoder(features, torch.tensor([60, 30]))
    valid = ~make_pad_mask(out.encoder_out_lens, out.encoder_out.shape[1])
    out.encoder_out[valid].square().sum().backward()
    assert not features.grad[1, 30:].any() and features.grad[1, :27].abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_taps_are_the_layers_outputs_by_number(encoder):
    features, x_lens = log_mel(2, 40, 80), torch.tensor([40, 33])
    out = encoder(features, x_lens, taps=(3, 1))
    assert set(out.taps) == {1, 3} and torch.equal(out.taps[3], out.encoder_out)
    seen = []
    handle = encoder.layers[0].register_forward_hook(lambda module, args, y: seen.append(y[0]))
    again = encoder(features, x_lens)
    handle.remove()
    assert torch.equal(seen[0], out.taps[1]) and again.taps == {}


@pytest.mark.parametrize("tap", [0, 4, -1])
def test_a_tap_that_is_no_layer_is_refused(encoder, tap):
    with pytest.raises(ConfigError, match="layers 1 to 3"):
        encoder(log_mel(1, 40, 80), torch.tensor([40]), taps=(tap,))


def test_a_batch_too_short_for_one_frame_is_refused(encoder):
    assert encoder(log_mel(1, 7, 80), torch.tensor([7])).encoder_out.shape[1] == 1
    with pytest.raises(DataError, match="6 frames"):
        encoder(log_mel(1, 6, 80), torch.tensor([6]))


@pytest.mark.parametrize(
    "size, parameters", [("tiny", 3_415_776), ("small", 6_469_152), ("medium", 19_727_600), ("large", 77_164_528)]
)
def test_named_sizes(size, parameters):
    with torch.device("meta"):
        encoder = Conformer(ModelConfig(encoder_size=size))
    assert parameter_counts(encoder)["total"] == parameters
    assert (encoder.num_layers, encoder.dim) == ENCODER_SIZES[size][:2]


def test_the_large_size_is_the_recipes():
    assert ENCODER_SIZES["large"] == (12, 512, 8, 2048, 31)


def test_overrides_and_their_checks():
    assert Conformer(ModelConfig(encoder_size="tiny", num_encoder_layers=2)).num_layers == 2
    with pytest.raises(ConfigError, match="odd"):
        Conformer(ModelConfig(cnn_kernel=8))
    with pytest.raises(ConfigError, match="multiple"):
        Conformer(ModelConfig(encoder_dim=30, num_heads=4))
    with pytest.raises(ConfigError, match="num_layers is 0"):
        Conformer(ModelConfig(num_encoder_layers=0))


def test_layer_dropout_bypasses_but_keeps_gradients():
    encoder = Conformer(ModelConfig(**SMALL, dropout=0.0, layer_dropout=0.999999)).train()
    features, x_lens = log_mel(1, 40, 80), torch.tensor([40])
    bypassed = encoder(features, x_lens).encoder_out
    bypassed.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    x, _ = encoder.subsampling(features, x_lens)
    full = encoder.eval()(features, x_lens).encoder_out
    assert (bypassed - x).norm() < 0.5 * (full - x).norm()


def test_dropout_acts_in_training_only_and_follows_the_seed():
    encoder = Conformer(ModelConfig(**SMALL, dropout=0.3))
    features, x_lens = log_mel(1, 40, 80), torch.tensor([40])
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(encoder(features, x_lens).encoder_out)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert torch.equal(encoder.eval()(features, x_lens).encoder_out, encoder(features, x_lens).encoder_out)


def test_bf16_autocast_stays_near_float32(encoder):
    features, x_lens = log_mel(2, 60, 80), torch.tensor([60, 41])
    expected = encoder(features, x_lens).encoder_out
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(features, x_lens).encoder_out
    assert (out.float() - expected).norm() / expected.norm() < 0.05


def test_attention_equals_its_definition():
    attention = RelativeSelfAttention(16, 2).eval()
    torch.nn.init.normal_(attention.position_bias)
    x, heads, size = torch.randn(1, 6, 16), 2, 8
    y = attention(x, RelativePositions(16)(x), make_attention_mask(torch.zeros(1, 6, dtype=torch.bool)))
    q, k, v = attention.qkv(x)[0].unflatten(1, (3, heads, size)).unbind(1)  # (T, H, D)
    distances = RelativePositions(16)(torch.zeros(1, 6, 1))
    expected = torch.zeros(6, heads, size)
    for i in range(6):
        for h in range(heads):
            position = attention.position(distances).unflatten(1, (heads, size))[:, h]
            query = q[i, h] * size**-0.5
            scores = [query @ k[j, h] + (query + attention.position_bias[h, 0]) @ position[5 - i + j] for j in range(6)]
            expected[i, h] = torch.stack(scores).softmax(0) @ v[:, h]
    torch.testing.assert_close(y[0], attention.out(expected.flatten(1)), atol=1e-5, rtol=1e-4)


def test_the_cpu_path_of_attention_equals_torchs():
    from icefall_kd.models import attention

    q, k, v = torch.randn(3, 2, 3, 7, 4).unbind(0)
    bias = torch.randn(2, 3, 7, 7)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    torch.testing.assert_close(attention._attend(q, k, v, bias), expected)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_relative_shift(num_frames):
    scores = torch.randn(2, 3, num_frames, 2 * num_frames - 1)
    shifted = relative_shift(scores)
    for i in range(num_frames):
        for j in range(num_frames):
            assert torch.equal(shifted[:, :, i, j], scores[:, :, i, num_frames - 1 - i + j])


def test_positions_do_not_depend_on_earlier_lengths():
    positions = RelativePositions(8)
    short = positions(torch.zeros(1, 3, 8)).clone()
    positions(torch.zeros(1, 50, 8))
    assert torch.equal(positions(torch.zeros(1, 3, 8)), short) and short.shape == (5, 8)
    assert torch.equal(short[2], torch.tensor([0.0, 1.0] * 4))  # distance zero


def test_training_works_after_inference_mode(encoder):
    features, x_lens = log_mel(1, 40, 80), torch.tensor([40])
    with torch.inference_mode():
        encoder(features, x_lens)
    encoder.train()(features, x_lens).encoder_out.sum().backward()
    assert "positions.table" not in dict(encoder.named_buffers())


def test_depthwise_convolution_equals_conv1d():
    module = ConvolutionModule(8, 5, 0.0).eval()
    x, padding = torch.randn(2, 9, 8), make_pad_mask(torch.tensor([9, 6]), 9).unsqueeze(-1)
    gated = F.glu(module.gate(module.norm(x)), dim=-1).masked_fill(padding, 0)
    convolved = module.depthwise(gated.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(module(x, padding)[0], module.out(F.silu(module.inner_norm(convolved))))


def test_chunk_masks_fit_beside_padding():
    pad_mask = make_pad_mask(torch.tensor([4, 2]))
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = make_attention_mask(pad_mask, allowed)
    assert mask.shape == (2, 1, 4, 4)
    assert (~mask[1, 0]).tolist() == (allowed & ~pad_mask[1]).tolist()


def test_subsampling_takes_other_bins():
    out, lens = Conv2dSubsampling(40, 16)(log_mel(2, 31, 40), torch.tensor([31, 20]))
    assert out.shape == (2, 7, 16) and lens.tolist() == [7, 4]
    with pytest.raises(ConfigError, match="7 bins"):
        Conv2dSubsampling(6, 16)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_two_halves_of_forward_are_forward(streaming):
    model = Conformer(ModelConfig(encoder_size="tiny", streaming=streaming, layer_dropout=0.3)).train()
    features, x_lens = log_mel(2, 150, 80), torch.tensor([150, 97])
    torch.manual_seed(5)
    whole = model(features, x_lens, taps=(2,))
    torch.manual_seed(5)
    chunks = model.chunks_of_batch()
    parts = model.forward_embedded(*model.embed(features, x_lens), (2,), chunks)
    assert torch.equal(whole.encoder_out, parts.encoder_out)
    assert torch.equal(whole.taps[2], parts.taps[2])
    assert torch.equal(whole.encoder_out_lens, parts.encoder_out_lens)


def test_given_chunks_are_obeyed_in_training():
    cfg = ModelConfig(encoder_size="tiny", streaming=True, dropout=0.0, chunk_size=[4], left_context_frames=[8])
    model = Conformer(cfg).train()
    x, lens = model.embed(log_mel(1, 150, 80), torch.tensor([150]))
    later = x.clone()
    later[:, 8:] += 1.0
    for chunks, same in ((Chunks(4, 8), True), (WHOLE_UTTERANCE, False)):
        first, second = (model.forward_embedded(y, lens, chunks=chunks).encoder_out[:, :8] for y in (x, later))
        assert torch.equal(first, second) is same
