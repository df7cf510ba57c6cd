"""Streaming encoders: nothing leaks from the future, and chunk by chunk equals the whole utterance under its mask."""

import dataclasses

import pytest
import torch
from streaming_toys import CONFIG, KINDS, by_chunks, encoder, speech

from icefall_kd.errors import ConfigError
from icefall_kd.frames import algorithmic_latency, chunk_num_frames, conv2d_subsampled_len
from icefall_kd.models.conformer import ConformerLayer
from icefall_kd.models.convolution import ConvolutionModule
from icefall_kd.models.masks import chunk_mask
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks, choose_chunks, default_chunks, draw_chunks

torch.set_num_threads(1)


@pytest.mark.parametrize("chunk_size, left", [(1, 0), (3, 2), (4, 6), (4, 8), (5, -1), (-1, 3), (100, 5)])
def test_chunk_mask_is_its_definition(chunk_size, left):
    queries, keys = torch.arange(4, 17), torch.arange(-3, 20)
    mask = chunk_mask(queries, keys, chunk_size, left)
    for i, q in enumerate(queries.tolist()):
        for j, k in enumerate(keys.tolist()):
            if chunk_size < 0:
                wanted = k >= 0
            else:
                first = q - q % chunk_size
                wanted = 0 <= k < first + chunk_size and (left < 0 or k >= first - left)
            assert mask[i, j] == wanted, (q, k)


def test_chunk_mask_takes_positions_of_every_stream():
    queries, keys = torch.tensor([[0, 1], [4, 5]]), torch.tensor([[-1, 0, 1], [3, 4, 5]])
    both = chunk_mask(queries, keys, 2, 1)
    assert torch.equal(both[0], chunk_mask(queries[0], keys[0], 2, 1))
    assert torch.equal(both[1], chunk_mask(queries[1], keys[1], 2, 1))


@pytest.mark.parametrize("convolution", KINDS)
@pytest.mark.parametrize("chunks", [Chunks(4, 8), Chunks(3, 5), Chunks(1, 2), Chunks(8, -1)])
def test_nothing_leaks_from_behind_a_chunk(convolution, chunks):
    model = encoder(convolution)
    model.chunks = chunks
    features, x_lens = speech(131)
    layers = range(1, 4)
    before = model(features, x_lens, taps=layers)
    num_frames = int(before.encoder_out_lens[0])
    for end in range(chunks.chunk_size, num_frames, chunks.chunk_size):
        changed = features.clone()
        # Encoder frame t hears Fbank frames up to 4t + 8.
        changed[:, 4 * (end - 1) + 9 :] = torch.randn_like(changed[:, 4 * (end - 1) + 9 :])
        after = model(changed, x_lens, taps=layers)
        for layer in layers:
            assert torch.equal(before.taps[layer][:, :end], after.taps[layer][:, :end]), (end, layer)
            assert not torch.allclose(before.taps[layer][:, end:num_frames], after.taps[layer][:, end:num_frames])


@pytest.mark.parametrize("convolution", KINDS)
def test_each_module_keeps_to_its_chunk(convolution):
    torch.manual_seed(1)
    chunk_size, x = 4, torch.randn(1, 16, 32)
    no_padding = torch.zeros(1, 16, 1, dtype=torch.bool)
    module = ConvolutionModule(32, 7, 0.0, convolution).eval()
    layer = ConformerLayer(encoder().shape, 0.0, convolution).eval()
    frames = torch.arange(16)
    mask = ~chunk_mask(frames, frames, chunk_size, 4)[None, None]
    positions = torch.randn(31, 32)
    runs = {
        "convolution": lambda x: module(x, no_padding, chunk_size)[0],
        "attention": lambda x: layer.attention(x, positions, mask),
        "layer": lambda x: layer(x, positions, mask, no_padding, chunk_size)[0],
        "feed forward": layer.feed_forward1,
    }
    for name, run in runs.items():
        before = run(x)
        for end in (4, 8, 12):
            changed = torch.cat([x[:, :end], torch.randn(1, 16 - end, 32)], dim=1)
            assert torch.equal(run(changed)[:, :end], before[:, :end]), (name, end)


def test_chunk_convolution_sees_the_future_of_its_chunk_alone():
    module = ConvolutionModule(8, 5, 0.0, "chunk").eval()
    x, no_padding = torch.randn(1, 12, 8), torch.zeros(1, 12, 1, dtype=torch.bool)
    before = module(x, no_padding, 4)[0]
    changed = x.clone()
    changed[:, 3] = torch.randn(8)  # the last frame of the first chunk
    moved = (module(changed, no_padding, 4)[0] - before).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False, True, True, True, True, True] + 6 * [False]


def test_chunk_convolution_of_one_chunk_is_the_full_one():
    torch.manual_seed(0)
    chunk, full = ConvolutionModule(8, 5, 0.0, "chunk").eval(), ConvolutionModule(8, 5, 0.0, "full").eval()
    full.load_state_dict(chunk.state_dict())
    x, no_padding = torch.randn(2, 9, 8), torch.zeros(2, 9, 1, dtype=torch.bool)
    for size in (-1, 9, 20):
        assert torch.equal(chunk(x, no_padding, size)[0], full(x, no_padding)[0])


@pytest.mark.parametrize("convolution", KINDS)
@pytest.mark.parametrize("chunks", [Chunks(*c) for c in ((4, 8), (3, 5), (1, 1), (16, 4), (64, 8), (2, 64))])
def test_chunk_by_chunk_equals_the_masked_utterance(convolution, chunks):
    model = encoder(convolution)
    model.chunks = chunks
    features, x_lens = speech(173, 7, 50, 64, 21, 6)  # odd lengths, less than a chunk, no frame at all
    whole = model(features, x_lens)
    outs, lens = zip(*by_chunks(model, features, x_lens, chunks), strict=True)
    out, total = torch.cat(outs, dim=1), torch.stack(lens).sum(0)
    assert torch.equal(total, whole.encoder_out_lens)
    assert torch.equal(total, conv2d_subsampled_len(x_lens))
    for i, length in enumerate(total.tolist()):
        torch.testing.assert_close(out[i, :length], whole.encoder_out[i, :length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_caches_have_the_type_of_the_parameters(dtype):
    model, chunks = encoder().to(dtype), Chunks(4, 8)
    model.chunks = chunks
    features, x_lens = speech(90, 33)
    with torch.no_grad():
        whole = model(features.to(dtype), x_lens).encoder_out[0]
        out = torch.cat([out[0] for out, _ in by_chunks(model, features.to(dtype), x_lens, chunks)])[: len(whole)]
    assert out.dtype == dtype
    torch.testing.assert_close(out[:21], whole[:21], rtol=0, atol=1e-9 if dtype == torch.float64 else 0.2)


def test_streams_of_a_batch_may_stand_at_different_places():
    model, chunks = encoder(), Chunks(4, 8)
    features, _ = speech(90)
    window, hop = chunk_num_frames(4), 16
    alone, states = [], [model.init_states(1, chunks)]
    for begin in (0, hop, 2 * hop):
        out, _, state = model.forward_chunk(features[:, begin : begin + window], torch.tensor([window]), states[-1])
        alone.append(out)
        states.append(state)
    pair = [torch.cat([a, b], dim=2 if a.dim() == 4 else 0) for a, b in zip(states[0], states[2], strict=True)]
    pieces = torch.cat([features[:, :window], features[:, 2 * hop : 2 * hop + window]])
    out, _, _ = model.forward_chunk(pieces, torch.tensor([window, window]), type(states[0])(*pair))
    torch.testing.assert_close(out, torch.cat([alone[0], alone[2]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("convolution", KINDS)
def test_a_batch_is_its_utterances(convolution):
    model = encoder(convolution)
    features, x_lens = speech(90, 33)
    both = model(features, x_lens).encoder_out
    alone = model(features[1:, :33], x_lens[1:])
    length = int(alone.encoder_out_lens[0])
    torch.testing.assert_close(both[1, :length], alone.encoder_out[0, :length], rtol=0, atol=1e-5)


def test_training_draws_chunks_of_both_lists_and_seeds_decide():
    torch.manual_seed(0)
    drawn = [draw_chunks(CONFIG) for _ in range(300)]
    assert {c.chunk_size for c in drawn} == {4, 2, 8, -1}
    assert {c.left_context_frames for c in drawn if c.chunk_size > 0} == {8, 4, -1}
    torch.manual_seed(0)
    assert [draw_chunks(CONFIG) for _ in range(300)] == drawn
    state = torch.get_rng_state()
    assert draw_chunks(dataclasses.replace(CONFIG, streaming=False)) == WHOLE_UTTERANCE
    assert torch.equal(state, torch.get_rng_state())


def test_training_uses_the_drawn_chunks(monkeypatch):
    model = encoder().train()
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    features, x_lens = speech(90)
    monkeypatch.setattr("icefall_kd.models.conformer.draw_chunks", lambda cfg: Chunks(2, 4))
    trained = model(features, x_lens).encoder_out
    model.eval().chunks = Chunks(2, 4)
    assert torch.equal(trained, model(features, x_lens).encoder_out)
    model.chunks = Chunks(4, 8)
    assert not torch.allclose(trained, model(features, x_lens).encoder_out)


def test_every_parameter_of_a_streaming_encoder_learns():
    model = encoder("chunk").train()
    model(*speech(60)).encoder_out.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_chunks_come_from_the_checkpoint():
    assert default_chunks(CONFIG) == Chunks(4, 8)
    assert choose_chunks(CONFIG, None, None) == Chunks(4, 8)
    assert choose_chunks(CONFIG, 3, 6) == Chunks(3, 6)
    assert choose_chunks(CONFIG, -1, None) == WHOLE_UTTERANCE
    assert choose_chunks(CONFIG, -1, -1) == WHOLE_UTTERANCE
    assert choose_chunks(CONFIG, 500, -1) == Chunks(500, -1)
    whole = dataclasses.replace(CONFIG, streaming=False)
    assert choose_chunks(whole, None, None) == choose_chunks(whole, -1, -1) == WHOLE_UTTERANCE
    backwards = dataclasses.replace(CONFIG, chunk_size=[-1, 8, 4], left_context_frames=[-1, 16, 8])
    assert choose_chunks(backwards, None, None) == WHOLE_UTTERANCE
    assert choose_chunks(backwards, None, None, chunk_by_chunk=True) == Chunks(4, 16)


@pytest.mark.parametrize(
    "changes, arguments, words",
    [
        ({"streaming": False}, (16, None), "--decode-chunk-size 16.*whole utterances"),
        ({"streaming": False}, (None, 32), "--left-context-frames 32.*whole utterances"),
        ({"streaming": False}, (None, None, True), "--chunk-by-chunk true.*whole utterances"),
        ({}, (1, None), "--decode-chunk-size is 1.*trained with --chunk-size 4,2,8,-1"),
        ({}, (0, None), "--decode-chunk-size is 0"),
        ({"chunk_size": [4, 8]}, (9, None), "--decode-chunk-size is 9.*4,8"),
        ({"chunk_size": [4, 8]}, (-1, None), "--decode-chunk-size is -1"),
        ({}, (4, 3), "--left-context-frames is 3"),
        ({"left_context_frames": [8]}, (4, -1), "--left-context-frames is -1"),
        ({}, (-1, 4, True), "finite"),
        ({}, (4, -1, True), "finite"),
        ({}, (-1, 4), "--left-context-frames 4 counts frames before a chunk"),
        ({"chunk_size": [-1, 4]}, (None, 4), "--left-context-frames 4 counts frames before a chunk"),
    ],
)
def test_impossible_chunks_are_refused_with_the_reason(changes, arguments, words):
    with pytest.raises(ConfigError, match=words):
        choose_chunks(dataclasses.replace(CONFIG, **changes), *arguments)


@pytest.mark.parametrize("name, value", [("chunk_size", []), ("chunk_size", [0]), ("left_context_frames", [-2])])
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        dataclasses.replace(CONFIG, **{name: value})


def test_latency_counts_the_chunk_and_the_front_end():
    # The last encoder frame of a chunk ends at 40 ms * C and hears 17.5 ms behind the start of Fbank frame 4C + 4.
    assert algorithmic_latency(16) == pytest.approx(0.640 + 0.040 + 0.0175)
