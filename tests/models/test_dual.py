"""Two modes of one Conformer: isolated from each other, causal where they must be, equal with caches."""

import itertools

import pytest
import torch
from nar_toys import SIZES
from torch import nn

from icefall_kd.config import DualConfig, ModelConfig
from icefall_kd.decode.streaming import encode_chunks
from icefall_kd.errors import ConfigError
from icefall_kd.models.conformer import Conformer
from icefall_kd.models.dual import (
    DualNorm,
    encoder_mode,
    make_dual,
    no_gradient_of_norms,
    refresh_masks,
    set_mode,
    streaming_chunks,
    trial_sparsity,
)
from icefall_kd.models.pruning import prunable_layers
from icefall_kd.models.streaming import Chunks

PRUNED = {"sparsity": 0.7, "prune_end_step": 0, "mask_interval": 10}


def build(dual=(), **model):
    cfg = {**SIZES, "streaming": True, "convolution": "chunk", "dropout": 0.0, **model}
    encoder = Conformer(ModelConfig(**cfg))
    make_dual(encoder, DualConfig(**dict(dual)))
    return encoder


def sparse_encoder(**model):
    """Return a sparse encoder in evaluation mode, whose two sets of norms differ."""
    encoder = build(PRUNED, **model)
    refresh_masks(encoder, DualConfig(**PRUNED), 0)
    for norm in (m for m in encoder.modules() if isinstance(m, DualNorm)):
        for p in norm.parameters():
            nn.init.normal_(p, mean=1.0, std=0.3)
    return encoder.eval()


def features(*lens):
    return torch.randn(len(lens), max(lens), 80) * 4 - 6, torch.tensor(lens)


def run(encoder, mode, sparse, x, lens, chunks=None):
    with torch.no_grad(), encoder_mode(encoder, mode, sparse, chunks):
        return encoder(x, lens).encoder_out


def test_a_new_dual_encoder_computes_what_the_plain_one_does():
    torch.manual_seed(3)
    plain = Conformer(ModelConfig(**{**SIZES, "streaming": True, "convolution": "chunk"})).eval()
    torch.manual_seed(3)
    encoder = build(PRUNED).eval()
    x, lens = features(90, 61)
    for mode, chunks in (("full", Chunks(-1, -1)), ("streaming", Chunks(8, 16))):
        plain.chunks = chunks
        with torch.no_grad():
            assert torch.equal(run(encoder, mode, False, x, lens, chunks), plain(x, lens).encoder_out)
    assert torch.equal(run(encoder, "streaming", True, x, lens, chunks), plain(x, lens).encoder_out)  # nothing masked


def test_what_is_pruned_and_what_has_two_norms():
    encoder = build(PRUNED)
    layers = prunable_layers(encoder)
    assert len(layers) == 8 * 2 and all(name.startswith("layers.") for name in layers)
    inside = {name for name, m in encoder.layers.named_modules() if isinstance(m, nn.Linear)}
    assert {f"layers.{n}" for n in inside} - set(layers) == {f"layers.{i}.attention.position" for i in range(2)}
    norms = [name for name, m in encoder.named_modules() if isinstance(m, DualNorm)]
    assert len(norms) == 6 * 2 and isinstance(encoder.subsampling.norm, nn.LayerNorm)
    assert not prunable_layers(build()) and "mask_step" not in build().state_dict()
    plain = build({"modes": "streaming", **PRUNED})
    assert prunable_layers(plain) and not any(isinstance(m, DualNorm) for m in plain.modules())
    assert not any(isinstance(m, DualNorm) for m in build({"separate_norms": False}).modules())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"streaming": False}, "--streaming false and --convolution chunk.*use --streaming true --convolution chunk"),
        ({"convolution": "causal"}, "--convolution causal"),
        ({"chunk_size": [-1]}, "--chunk-size names no finite size"),
    ],
)
def test_an_encoder_of_another_kind_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        build(**model)


def test_the_modes_do_not_touch_each_other():
    encoder = sparse_encoder()
    x, lens = features(90, 61)
    full, streaming = run(encoder, "full", False, x, lens), run(encoder, "streaming", True, x, lens)
    with torch.no_grad():
        for norm in (m for m in encoder.modules() if isinstance(m, DualNorm)):
            norm.streaming.weight.mul_(2)
        for layer in prunable_layers(encoder).values():
            layer.mask.logical_not_()
    assert torch.equal(run(encoder, "full", False, x, lens), full)
    assert not torch.equal(run(encoder, "streaming", True, x, lens), streaming)


def test_the_mode_holds_inside_its_block_alone():
    encoder = sparse_encoder()
    x, lens = features(90)
    before = encoder(x, lens).encoder_out
    with pytest.raises(ZeroDivisionError), encoder_mode(encoder, "streaming", True):
        assert not torch.equal(encoder(x, lens).encoder_out, before)
        with encoder_mode(encoder, "full", False):
            full = encoder(x, lens).encoder_out
        assert not torch.equal(encoder(x, lens).encoder_out, full)
        raise ZeroDivisionError
    assert torch.equal(encoder(x, lens).encoder_out, before)
    set_mode(encoder, "full", False)
    assert torch.equal(encoder(x, lens).encoder_out, full)


def test_training_sees_whole_utterances_in_the_full_mode_and_finite_chunks_in_the_other():
    encoder = build(chunk_size=[-1, 8, 16], left_context_frames=[-1, 32]).train()
    x, lens = features(400)
    with torch.no_grad():
        outputs = [run(encoder, "full", False, x, lens) for _ in range(5)]
        encoder.eval()
        outputs.append(run(encoder, "full", False, x, lens, Chunks(-1, -1)))
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
    encoder.train()
    drawn = {streaming_chunks(encoder) for _ in range(100)}
    assert drawn == {Chunks(c, left) for c in (8, 16) for left in (-1, 32)}
    encoder.eval()
    assert streaming_chunks(encoder) == Chunks(8, -1)
    encoder.chunks = Chunks(16, 32)
    assert streaming_chunks(encoder) == Chunks(16, 32)


@pytest.mark.parametrize("chunks", [Chunks(4, 8), Chunks(8, 4), Chunks(16, -1)])
def test_what_comes_behind_a_chunk_changes_nothing_before(chunks):
    encoder = sparse_encoder(chunk_size=[4, 8, 16])
    x, lens = features(170, 131)
    before = run(encoder, "streaming", True, x, lens, chunks)
    for end in range(chunks.chunk_size, before.shape[1], chunks.chunk_size):
        changed = x.clone()
        changed[:, 4 * end + 5 :] = torch.randn_like(changed[:, 4 * end + 5 :])  # a chunk hears 5 frames more
        after = run(encoder, "streaming", True, changed, lens, chunks)
        assert (after[:, :end] - before[:, :end]).abs().max() < 1e-5
        assert not torch.allclose(after[:, end:], before[:, end:], atol=1e-3)
        full = run(encoder, "full", True, changed, lens)
        assert not torch.allclose(full[:, :end], run(encoder, "full", True, x, lens)[:, :end], atol=1e-3)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_caches_give_what_the_mask_gives(size):
    encoder, chunks = sparse_encoder(chunk_size=[4, 8, 16]), Chunks(size, 2 * size)
    for lens in ((171, 67, 30), (9, 8)):  # odd lengths, and less than a chunk
        x, x_lens = features(*lens)
        whole = run(encoder, "streaming", True, x, x_lens, chunks)
        with torch.no_grad(), encoder_mode(encoder, "streaming", True, chunks):
            outs, valid = zip(*encode_chunks(encoder, x, x_lens, chunks), strict=True)
        pieces = torch.cat(outs, dim=1)
        total = torch.stack(valid).sum(0)
        assert torch.equal(total, encoder.output_lens(x_lens))
        for i, n in enumerate(total.tolist()):
            torch.testing.assert_close(pieces[i, :n], whole[i, :n], atol=1e-4, rtol=0)


def test_a_chunk_as_long_as_the_utterance_is_the_full_mode():
    encoder = build(chunk_size=[64]).eval()
    x, lens = features(170, 131)
    full = run(encoder, "full", False, x, lens)
    chunked = run(encoder, "streaming", False, x, lens, Chunks(64, -1))
    for i, n in enumerate(encoder.output_lens(lens).tolist()):
        torch.testing.assert_close(chunked[i, :n], full[i, :n], atol=1e-5, rtol=1e-5)


def test_masks_are_refreshed_when_due_and_then_stay():
    cfg = DualConfig(sparsity=0.8, prune_begin_step=10, prune_end_step=30, mask_interval=10, mask_freeze_step=40)
    encoder = build({"sparsity": 0.8})
    assert refresh_masks(encoder, cfg, 0)["sparsity"] == 0.0 and refresh_masks(encoder, cfg, 15) == {}
    assert refresh_masks(encoder, cfg, 10)["sparsity"] == 0.0 and int(encoder.mask_step) == 0  # nothing changed
    # Half of the ramp is 1 - (1/2)^3 of the sparsity, rounded down to whole blocks.
    assert refresh_masks(encoder, cfg, 20)["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert int(encoder.mask_step) == 20
    figures = refresh_masks(encoder, cfg, 30)
    assert figures["lowest"] == pytest.approx(figures["highest"], abs=0.02) and figures["churn"] == 0
    assert figures["iou"] == pytest.approx(0.2 / 0.3, abs=0.05)
    for layer in prunable_layers(encoder).values():
        nn.init.normal_(layer.weight)
    assert refresh_masks(encoder, cfg, 40)["churn"] > 0.5 and int(encoder.mask_step) == 40
    assert refresh_masks(encoder, cfg, 50) == {}
    # Masks of another training are kept at the beginning.
    assert refresh_masks(encoder, DualConfig(**PRUNED), 0) == {}


def test_masks_that_stay_before_the_ramp_is_over_are_warned_of(caplog):
    ramp = {"sparsity": 0.8, "prune_end_step": 100, "mask_interval": 40}
    refresh_masks(build(ramp), DualConfig(**ramp, mask_freeze_step=120), 0)
    refresh_masks(build(ramp), DualConfig(**ramp), 0)
    assert not caplog.records
    refresh_masks(build(ramp), DualConfig(**ramp, mask_freeze_step=119), 0)
    # 0.8 (1 - (1 - 80 / 100)^3)
    assert "last time at step 80" in caplog.text and "sparsity of 0.794, not --sparsity 0.8" in caplog.text


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_a_dense_encoder_has_nothing_to_try(ranking):
    encoder, (x, lens) = build().eval(), features(90)
    with trial_sparsity(encoder, DualConfig(prune_ranking=ranking), 0.5):
        assert torch.equal(run(encoder, "streaming", True, x, lens), run(encoder, "streaming", False, x, lens))


def test_masks_for_a_trial_leave_the_own_ones():
    encoder = sparse_encoder()
    x, lens = features(90)
    before = run(encoder, "streaming", True, x, lens)
    with trial_sparsity(encoder, DualConfig(**PRUNED), 0.0):
        assert torch.equal(run(encoder, "streaming", True, x, lens), run(encoder, "streaming", False, x, lens))
    assert torch.equal(run(encoder, "streaming", True, x, lens), before)


def test_norms_of_the_other_mode_get_a_gradient_of_zero():
    encoder = build()
    x, lens = features(40)
    with encoder_mode(encoder, "full", False):
        loss = encoder(x, lens).encoder_out.square().sum()
    (loss + no_gradient_of_norms(encoder)).backward()
    norms = [m for m in encoder.modules() if isinstance(m, DualNorm)]
    assert all(not m.streaming.weight.grad.any() for m in norms)
    assert any(m.full.weight.grad.any() for m in norms)
    assert all(p.grad is not None for p in encoder.parameters())
