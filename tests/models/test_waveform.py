"""The convolutional front end over samples."""

import pytest
import torch

from icefall_kd.errors import DataError
from icefall_kd.frames import SSL_CONV
from icefall_kd.models.waveform import WaveformFrontEnd


def front_end(norm):
    torch.manual_seed(0)
    model = WaveformFrontEnd(8, channels=12, norm=norm).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    return model


@pytest.mark.parametrize("norm", ["layer_norm", "default"])
def test_an_utterance_alone_equals_the_same_in_a_padded_batch(norm):
    model, lens = front_end(norm), [1700, 1199, 400]
    audio = torch.randn(3, 1700)
    for n, length in enumerate(lens):
        audio[n, length:] = (0.0, 3.0, -1.0)[n]
    out, out_lens = model(audio, torch.tensor(lens))
    assert out_lens.tolist() == [SSL_CONV.num_frames(n) for n in lens] == [5, 3, 1]
    for n, length in enumerate(lens):
        alone, _ = model(audio[n : n + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(out[n, : out_lens[n]], alone[0], atol=1e-5, rtol=1e-5)


def test_only_layer_norm_keeps_the_past_from_hearing_the_future():
    audio = torch.randn(1, 4000)
    later = audio.clone()
    later[:, 2000:] += torch.randn(2000)
    frames = SSL_CONV.num_frames(2000)
    for norm, causal in (("layer_norm", True), ("default", False)):
        model = front_end(norm)
        a, b = (model(x, torch.tensor([4000]))[0][:, :frames] for x in (audio, later))
        assert ((a - b).abs().max() < 1e-5) == causal


def test_the_default_norm_is_a_group_norm_of_as_many_groups_as_channels():
    model = front_end("default")
    audio = torch.randn(2, 3000)
    x = audio.unsqueeze(1)
    for i, convolution in enumerate(model.convolutions):
        x = convolution(x)
        if i == 0:
            norm = model.inner_norms[0]
            x = torch.nn.functional.group_norm(x, 12, norm.weight, norm.bias, norm.eps)
        x = torch.nn.functional.gelu(x)
    z, _ = model.project(audio, torch.tensor([3000, 3000]))
    torch.testing.assert_close(z, x.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_less_than_a_frame_is_refused():
    with pytest.raises(DataError, match="399 samples"):
        front_end("layer_norm")(torch.randn(1, 399), torch.tensor([399]))
