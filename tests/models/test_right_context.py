"""Right context behind a chunk: what is seen, how far ahead, and the same from a stream's caches."""

import itertools

import pytest
import torch
from streaming_toys import CONFIG, KINDS, by_chunks, encoder, speech

from icefall_kd.config import ModelConfig
from icefall_kd.errors import ConfigError
from icefall_kd.frames import algorithmic_latency, chunk_look_ahead
from icefall_kd.models.masks import chunk_mask
from icefall_kd.models.right_context import Copies
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks

torch.set_num_threads(1)

# Chunk sizes with right contexts of one frame, two, a quarter of the chunk, and more than a chunk.
SIZES = sorted({(c, r) for c in (4, 8, 16) for r in (1, 2, c // 4)} | {(2, 5)})


@pytest.mark.parametrize("left", [-1, 0, 3, 6])
@pytest.mark.parametrize("num_frames, size, count", [(8, 3, 2), (9, 3, 1), (2, 4, 3), (7, 2, 5), (1, 1, 1)])
def test_layout_of_copies_is_its_definition(num_frames, size, count, left):
    copies = Copies(num_frames, Chunks(size, left), count)
    # (frame of the utterance, chunk, a copy?), one by one.
    rows = [(i, i // size, False) for i in range(num_frames)]
    for k in range(-(-num_frames // size)):
        rows += [((k + 1) * size + r, k, True) for r in range(count)]
    assert copies.position.tolist() == [place for place, _, _ in rows]
    assert copies.chunk.tolist() == [k for _, k, _ in rows]
    assert copies.source.tolist() == [min(place, num_frames - 1) for place, _, _ in rows]
    lens = torch.tensor([num_frames, max(num_frames - 2, 0)])
    assert copies.padding(lens).tolist() == [[place >= n for place, _, _ in rows] for n in lens.tolist()]
    allowed = copies.allowed()
    for (q, query), (k, key) in itertools.product(enumerate(rows), enumerate(rows)):
        first = query[1] * size
        if key[2]:
            wanted = key[1] == query[1]
        else:
            wanted = key[0] < first + size and (left < 0 or key[0] >= first - left)
        assert allowed[q, k] == wanted, (query, key)
        if max(query[0], key[0]) < num_frames:  # row m of the embeddings of T frames holds the distance T - 1 - m
            assert num_frames - 1 - copies.columns[q, k] == query[0] - key[0]


def test_the_example_of_the_layout():
    copies = Copies(8, Chunks(3, 3), 2)
    assert copies.position.tolist()[8:] == [3, 4, 6, 7, 9, 10]
    allowed = copies.allowed()
    seen = {row: allowed[row].nonzero().flatten().tolist() for row in (0, 4, 7, 9, 10)}
    assert seen[0] == [0, 1, 2, 8, 9] == seen[9]
    assert seen[4] == [0, 1, 2, 3, 4, 5, 10, 11] == seen[10]
    assert seen[7] == [3, 4, 5, 6, 7, 12, 13]  # which do not exist: padding


def test_the_mask_with_right_context_is_its_definition():
    for size, left, right in ((3, 2, 1), (4, -1, 6), (2, 0, 2)):
        mask = chunk_mask(torch.arange(11), torch.arange(-2, 14), size, left, right)
        for q, k in itertools.product(range(11), range(-2, 14)):
            first = q - q % size
            wanted = max(0, 0 if left < 0 else first - left) <= k < first + size + right
            assert mask[q, k + 2] == wanted, (q, k)


def frames_seen(model, features, x_lens, frame):
    """Return the last encoder frame of the input that changes the output's ``frame``."""
    embedded, lens = model.embed(features, x_lens)
    embedded = embedded.detach().requires_grad_()
    model.forward_embedded(embedded, lens).encoder_out[0, frame].sum().backward()
    return int(embedded.grad[0].abs().sum(1).nonzero().max())


@pytest.mark.parametrize("convolution", KINDS)
@pytest.mark.parametrize("kind", ["copy", "mask"])
@pytest.mark.parametrize("size, right", [(4, 1), (4, 3), (3, 5), (8, 2)])
def test_nothing_leaks_from_behind_the_right_context(convolution, kind, size, right):
    model = encoder(convolution, right_context=right, right_context_kind=kind)
    model.chunks = Chunks(size, 4)
    features, x_lens = speech(203)
    before = model(features, x_lens, taps=[1])
    num_frames = int(before.encoder_out_lens[0])
    ahead = {"copy": right, "mask": right + 2 * size * (-(-right // size))}[kind]  # three layers
    assert model.look_ahead(model.chunks) == ahead
    for layer, reach in ((3, ahead), (1, right)):
        for end in range(size, num_frames - reach, size):
            changed = features.clone()
            first = 4 * (end + reach - 1) + 9  # encoder frame t hears Fbank frames up to 4t + 8
            changed[:, first:] = torch.randn_like(changed[:, first:])
            after = model(changed, x_lens, taps=[1])
            pair = (before.encoder_out, after.encoder_out) if layer == 3 else (before.taps[1], after.taps[1])
            assert torch.equal(pair[0][:, :end], pair[1][:, :end]), (end, layer)
    # And not less: the chunk's first frame depends on the last frame of what it waits for.
    for begin in range(0, num_frames - size - ahead, size):
        assert frames_seen(model, features, x_lens, begin) == begin + size + ahead - 1


@pytest.mark.parametrize("convolution", KINDS)
@pytest.mark.parametrize("kind", ["copy", "mask"])
@pytest.mark.parametrize("size, right", SIZES)
def test_chunk_by_chunk_equals_the_whole(convolution, kind, size, right):
    model = encoder(convolution, right_context=right, right_context_kind=kind)
    features, x_lens = speech(173, 7, 50, 64, 21, 6)  # odd lengths, less than a chunk, no frame at all
    for chunks in (Chunks(size, 2 * size), Chunks(size, 3)):
        model.chunks = chunks
        whole = model(features, x_lens)
        outs, lens = zip(*by_chunks(model, features, x_lens, chunks), strict=True)
        assert {out.shape[1] for out in outs} == {size}
        out, total = torch.cat(outs, dim=1), torch.stack(lens).sum(0)
        assert torch.equal(total, whole.encoder_out_lens)
        for i, length in enumerate(total.tolist()):
            torch.testing.assert_close(out[i, :length], whole.encoder_out[i, :length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["copy", "mask"])
def test_a_batch_is_its_utterances(kind):
    model = encoder("chunk", right_context=2, right_context_kind=kind)
    features, x_lens = speech(90, 33, 61)
    both = model(features, x_lens, taps=[2])
    for i in (1, 2):
        length = int(x_lens[i])
        alone = model(features[i : i + 1, :length], x_lens[i : i + 1], taps=[2])
        frames = int(alone.encoder_out_lens[0])
        for a, b in ((both.encoder_out, alone.encoder_out), (both.taps[2], alone.taps[2])):
            torch.testing.assert_close(a[i, :frames], b[0, :frames], rtol=0, atol=1e-5)


@pytest.mark.parametrize("convolution", KINDS)
def test_copies_are_the_frames_encoded_with_their_chunk(convolution):
    """The first chunk with R copies is a chunk of C + R frames, without those outputs; later ones are not."""
    model, wider = encoder(convolution, right_context=2), encoder(convolution)
    model.chunks, wider.chunks = Chunks(4, 8), Chunks(6, 8)
    features, x_lens = speech(120)
    a, b = model(features, x_lens).encoder_out[0], wider(features, x_lens).encoder_out[0]
    torch.testing.assert_close(a[:4], b[:4], rtol=0, atol=1e-5)
    assert not torch.allclose(a[4:8], b[4:8], atol=1e-3)


@pytest.mark.parametrize("kind", ["copy", "mask"])
def test_whole_utterances_and_one_chunk_have_nothing_behind_them(kind):
    model, plain = encoder("chunk", right_context=3, right_context_kind=kind), encoder("chunk")
    features, x_lens = speech(90)
    for chunks in (WHOLE_UTTERANCE, Chunks(30, 8)):
        model.chunks = plain.chunks = chunks
        torch.testing.assert_close(
            model(features, x_lens).encoder_out, plain(features, x_lens).encoder_out, rtol=0, atol=1e-5
        )
    assert model.look_ahead(WHOLE_UTTERANCE) == 0


@pytest.mark.parametrize("kind", ["copy", "mask"])
def test_a_training_step_reaches_every_parameter(kind):
    model = encoder("chunk", right_context=2, right_context_kind=kind, chunk_size=[4], dropout=0.1).train()
    model(*speech(60, 41)).encoder_out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_latency_counts_what_lies_ahead():
    assert algorithmic_latency(16, 4) == pytest.approx(0.64 + 0.16 + 0.0575)
    assert chunk_look_ahead(16, 4) == 4
    assert chunk_look_ahead(16, 4, num_layers=3) == 4 + 2 * 16
    assert chunk_look_ahead(4, 4, num_layers=3) == 3 * 4
    assert chunk_look_ahead(-1, 4, 3) == chunk_look_ahead(16, 0, 3) == 0


def test_wrong_windows_and_options_are_refused():
    model = encoder(right_context=2)
    states = model.init_states(1, Chunks(4, 8))
    for frames, size in ((21, None), (21, 4), (33, 4)):
        with pytest.raises(ConfigError, match="--right-context 2 needs"):
            model.forward_chunk(torch.zeros(1, frames, 80), torch.tensor([frames]), states, size)
    with pytest.raises(ConfigError, match="--right-context 2 without --streaming true"):
        ModelConfig(right_context=2)
    with pytest.raises(ConfigError, match="--right-context is -1"):
        ModelConfig(streaming=True, right_context=-1)
    assert CONFIG.right_context == 0
