"""The attention decoder: what each position sees, steps with a cache, several sequences an utterance, padding."""

import math

import pytest
import torch
import torch.nn.functional as F

from icefall_kd.errors import ConfigError
from icefall_kd.models.attention_decoder import AttentionDecoder, sinusoids

V, C = 11, 16


def make(causal, **kwargs):
    torch.manual_seed(1)
    return AttentionDecoder(V, C, 2, 2, 24, 0.0, causal=causal, **kwargs).eval()


@pytest.fixture(params=[True, False], ids=["causal", "masked"])
def decoder(request):
    return make(request.param)


def toy(decoder, lens=(9, 4)):
    torch.manual_seed(2)
    encoder_out = torch.randn(len(lens), max(lens), C)
    return encoder_out, decoder.memory(encoder_out, torch.tensor(lens))


def test_a_layer_is_what_its_formula_says():
    """One head, one layer, written out in plain matrix products (Vaswani et al. 2017, pre-norm)."""
    torch.manual_seed(3)
    decoder = AttentionDecoder(V, C, 1, 1, 24, 0.0, causal=False).eval()
    encoder_out, y = torch.randn(1, 5, C), torch.tensor([[3, 4, 5]])
    layer = decoder.layers[0]

    def attend(q, k, v):
        return ((q @ k.T) / math.sqrt(C)).softmax(dim=1) @ v

    x = decoder.embedding.weight[y[0]] * math.sqrt(C) + sinusoids(torch.arange(3), C)
    q, k, v = layer.self_qkv(layer.self_norm(x)).chunk(3, dim=1)
    x = x + layer.self_out(attend(q, k, v))
    k, v = layer.cross_kv(encoder_out[0]).chunk(2, dim=1)
    x = x + layer.cross_out(attend(layer.cross_q(layer.cross_norm(x)), k, v))
    x = x + layer.contract(F.relu(layer.expand(layer.feedforward_norm(x))))
    expected = decoder.output(decoder.norm(x))
    found = decoder(y, torch.tensor([3]), decoder.memory(encoder_out, torch.tensor([5])))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_positions_are_the_papers():
    table = sinusoids(torch.tensor([0, 3]), 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    for i in range(3):
        angle = 3 / 10000 ** (2 * i / 6)
        assert table[1, 2 * i : 2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-6)


def test_which_positions_a_token_changes(decoder):
    _, memory = toy(decoder, (9,))
    y = torch.tensor([[3, 4, 5, 6, 7]])
    lens = torch.tensor([4])
    before = decoder(y, lens, memory)
    for changed in range(5):
        other = y.clone()
        other[0, changed] = 8
        differs = (decoder(other, lens, memory) != before).any(dim=2)[0, :4].tolist()
        expected = [changed < 4 and (t >= changed or not decoder.causal) for t in range(4)]
        assert differs == expected, changed


def test_frames_behind_an_utterance_are_not_seen(decoder):
    encoder_out, memory = toy(decoder)
    y, lens = torch.tensor([[3, 4], [5, 6]]), torch.tensor([2, 2])
    before = decoder(y, lens, memory)
    encoder_out[1, 4:] = 100.0
    assert torch.equal(decoder(y, lens, decoder.memory(encoder_out, torch.tensor([9, 4]))), before)
    alone = decoder(y[1:], lens[1:], decoder.memory(encoder_out[1:, :4], torch.tensor([4])))
    torch.testing.assert_close(alone[0], before[1], rtol=1e-4, atol=1e-5)


def test_several_sequences_an_utterance_equal_each_alone(decoder):
    _, memory = toy(decoder)
    y = torch.randint(3, V, (6, 4))
    lens = torch.tensor([4, 1, 3, 2, 4, 0])
    together = decoder(y, lens, memory)
    for row in range(5):
        one = memory.select(torch.tensor([row // 3]))
        alone = decoder(y[row : row + 1, : lens[row]], lens[row : row + 1], one)
        torch.testing.assert_close(together[row, : lens[row]], alone[0], rtol=1e-4, atol=1e-5)
    assert together.isfinite().all()


def test_an_utterance_without_a_frame_gives_finite_numbers(decoder):
    encoder_out = torch.randn(2, 3, C)
    memory = decoder.memory(encoder_out, torch.tensor([3, 0]))
    assert decoder(torch.tensor([[3], [4]]), torch.tensor([1, 0]), memory).isfinite().all()


def test_steps_with_a_cache_equal_the_whole():
    decoder = make(causal=True)
    _, memory = toy(decoder)
    y = torch.randint(3, V, (4, 5))
    whole = decoder(y, torch.full((4,), 5), memory)
    cache = decoder.start(memory, 4)
    for u in range(5):
        torch.testing.assert_close(decoder.step(y[:, u], cache), whole[:, u], rtol=1e-4, atol=1e-5)
    assert cache.length == 5


def test_reordered_rows_go_on_from_their_new_past():
    decoder = make(causal=True)
    _, memory = toy(decoder)
    y, rows = torch.randint(3, V, (4, 3)), torch.tensor([1, 1, 2, 2])
    cache = decoder.start(memory, 4)
    for u in range(3):
        decoder.step(y[:, u], cache)
    cache.reorder(rows)
    found = decoder.step(torch.tensor([3, 4, 5, 6]), cache)
    history = torch.cat([y[rows], torch.tensor([[3], [4], [5], [6]])], dim=1)
    torch.testing.assert_close(found, decoder(history, torch.full((4,), 4), memory)[:, 3], rtol=1e-4, atol=1e-5)


def test_tied_embeddings_are_one_matrix():
    tied, untied = make(False, tie_embeddings=True), make(False)
    count = {name: sum(p.numel() for p in d.parameters()) for name, d in (("tied", tied), ("untied", untied))}
    assert count["untied"] - count["tied"] == V * C
    _, memory = toy(tied)
    y, lens = torch.tensor([[3, 4], [5, 6]]), torch.tensor([2, 2])
    tied(y, lens, memory)[:, 0, 7].sum().backward()
    assert tied.embedding.weight.grad[7].abs().sum() > 0  # as an output: no input is token 7
    with pytest.raises(ConfigError, match="even multiple"):
        AttentionDecoder(V, 18, 1, 4, 24, causal=True)
