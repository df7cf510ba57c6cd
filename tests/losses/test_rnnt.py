"""The one function of the pruned transducer loss: shapes, precision, backends."""

import logging
import sys
import types

import pytest
import torch
from torch import nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.losses import rnnt_backends
from icefall_kd.losses.rnnt import pruned_transducer_loss
from icefall_kd.models.transducer import Joiner, StatelessDecoder
from icefall_kd.runtime import optional


@pytest.fixture(autouse=True)
def fresh_probes():
    for probe in (rnnt_backends.probe, optional.probe_import):
        probe.cache_clear()
    yield
    for probe in (rnnt_backends.probe, optional.probe_import):
        probe.cache_clear()


def setup(vocab=20, dim=16, frames=12, symbols=6, fewest=0):
    torch.manual_seed(0)
    decoder, joiner = StatelessDecoder(vocab, dim), Joiner(dim, dim, dim, vocab)
    am, lm = nn.Linear(dim, vocab), nn.Linear(dim, vocab)
    encoder_out = torch.randn(3, frames, dim, requires_grad=True)
    y = torch.randint(1, vocab, (3, symbols))
    lens = torch.tensor([frames, frames - 3, 5]), torch.tensor([symbols, 3, fewest])

    def loss(**options):
        decoder_out = decoder(decoder.add_sos(y))
        return pruned_transducer_loss(encoder_out, decoder_out, joiner, am, lm, y, *lens, **options)

    return loss, encoder_out, nn.ModuleList([decoder, joiner, am, lm])


def test_losses_are_per_utterance_and_reach_every_parameter():
    loss, encoder_out, modules = setup()
    simple, pruned = loss(backend="torch")
    assert simple.shape == pruned.shape == (3,) and simple.dtype == pruned.dtype == torch.float32
    assert (simple > 0).all() and (pruned > 0).all()
    (simple.sum() + pruned.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in modules.parameters())
    assert not encoder_out.grad[1, 9:].any() and not encoder_out.grad[2, 5:].any()


def test_float32_agrees_with_float64():
    g = torch.Generator().manual_seed(1)
    am, lm = torch.randn(4, 60, 30, generator=g) * 3, torch.randn(4, 21, 30, generator=g) * 3
    y = torch.randint(1, 30, (4, 20), generator=g)
    lens = torch.tensor([60, 50, 30, 20]), torch.tensor([20, 11, 20, 0])
    joiner = nn.Module()  # adds, so that the whole difference is the loss's
    joiner.encoder_proj = joiner.decoder_proj = nn.Identity()
    joiner.forward = lambda a, b, project_input: torch.tanh(a + b) * 5
    single, double = (
        pruned_transducer_loss(x, z, joiner, nn.Identity(), nn.Identity(), y, *lens, backend="torch")
        for x, z in ((am, lm), (am.double(), lm.double()))
    )
    for a, b in zip(single, double, strict=True):
        assert a.dtype == torch.float32 and b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_lattices_in_float32():
    loss, *_ = setup()
    expected = loss(backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        simple, pruned = loss(backend="torch")
    assert simple.dtype == pruned.dtype == torch.float32
    torch.testing.assert_close(simple, expected[0], rtol=2e-2, atol=0.1)
    torch.testing.assert_close(pruned, expected[1], rtol=2e-2, atol=0.1)


def test_a_large_window_makes_pruning_exact():
    loss, *_ = setup()
    wide, wider = loss(backend="torch", prune_range=7)[1], loss(backend="torch", prune_range=50)[1]
    assert torch.equal(wide, wider)
    assert (loss(backend="torch", prune_range=2)[1] >= wide - 1e-4).all()


def test_a_text_longer_than_the_windows_can_climb_widens_them(caplog):
    decoder, joiner = StatelessDecoder(5, 8), Joiner(8, 8, 8, 5)
    proj = nn.Linear(8, 5)
    y, x_lens, y_lens = torch.ones(1, 9, dtype=torch.int64), torch.tensor([2]), torch.tensor([9])
    args = torch.randn(1, 2, 8), decoder(decoder.add_sos(y)), joiner, proj, proj, y, x_lens, y_lens
    with caplog.at_level(logging.WARNING):
        _, pruned = pruned_transducer_loss(*args, prune_range=3, backend="torch")
    assert pruned.isfinite().all() and "prune_range 3" in caplog.text


@pytest.mark.parametrize(
    "x_lens, y_lens, what", [([13, 3], [2, 2], "encoder_out_lens"), ([4, 0], [2, 2], "encoder_out_lens"),
                             ([4, 4], [2, 7], "y_lens")],
)  # fmt: skip
def test_lengths_that_do_not_fit_are_refused(x_lens, y_lens, what):
    joiner, proj = Joiner(8, 8, 8, 5), nn.Linear(8, 5)
    y = torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(DataError, match=what):
        pruned_transducer_loss(torch.randn(2, 12, 8), torch.randn(2, 7, 8), joiner, proj, proj, y,
                               torch.tensor(x_lens), torch.tensor(y_lens), backend="torch")  # fmt: skip


def plant(monkeypatch, tmp_path, name, source):
    """Make ``import name`` run this source."""
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    "source, reason",
    [
        ("raise OSError('libtorch.so: undefined symbol _ZN3c10')", "undefined symbol"),
        ("raise RuntimeError('built for another torch')", "built for another torch"),
        ("import a_library_that_nobody_has", "a_library_that_nobody_has"),
        ("rnnt_loss_smoothed = None", "it lacks get_rnnt_prune_ranges"),
    ],
)
def test_a_broken_library_is_named_once_and_passed_over(monkeypatch, tmp_path, caplog, source, reason):
    plant(monkeypatch, tmp_path, "k2", source)
    plant(monkeypatch, tmp_path, "fast_rnnt", "raise ModuleNotFoundError('none here', name='fast_rnnt')")
    with caplog.at_level(logging.WARNING):
        assert rnnt_backends.load_backend("auto").name == "torch"
        assert rnnt_backends.load_backend("auto").name == "torch"
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ConfigError, match=reason):
        rnnt_backends.load_backend("k2")
    with pytest.raises(ConfigError, match="not installed"):
        rnnt_backends.load_backend("fast_rnnt")


def working_library(calls):
    """Return a library with the functions' names and arguments, and the assertions of k2."""
    lib = types.ModuleType("k2")

    def rnnt_loss_smoothed(lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, reduction,
                           return_grad):  # fmt: skip
        calls["boundary"], calls["reduction"] = boundary.tolist(), reduction
        num, num_frames, num_symbols = am.shape[0], am.shape[1], symbols.shape[1]
        assert num_frames >= num_symbols and (boundary[:, 2] >= 1).all()
        grads = torch.zeros(num, num_symbols, num_frames + 1), torch.zeros(num, num_symbols + 1, num_frames)
        return am.sum((1, 2)) + lm.sum((1, 2)), grads

    def get_rnnt_prune_ranges(px_grad, py_grad, boundary, s_range):
        assert s_range >= 2
        return torch.arange(s_range).expand(px_grad.shape[0], py_grad.shape[2], s_range)

    def do_rnnt_pruning(am, lm, ranges):
        index = ranges.flatten(1).unsqueeze(2).expand(-1, -1, lm.shape[2])
        return am.unsqueeze(2).expand(-1, -1, ranges.shape[2], -1), lm.gather(1, index).unflatten(1, ranges.shape[1:])

    def rnnt_loss_pruned(logits, symbols, ranges, termination_symbol, boundary, reduction):
        calls["logits"] = tuple(logits.shape)
        return logits.sum((1, 2, 3))

    for function in (rnnt_loss_smoothed, get_rnnt_prune_ranges, do_rnnt_pruning, rnnt_loss_pruned):
        setattr(lib, function.__name__, function)
    return lib


def test_a_library_that_imports_but_fails_at_the_first_loss_is_passed_over(monkeypatch, caplog):
    lib = working_library({})

    def fails(**_):
        raise RuntimeError("k2 was not compiled with CUDA\nstack trace")

    monkeypatch.setattr(lib, "rnnt_loss_pruned", fails)
    monkeypatch.setitem(sys.modules, "k2", lib)
    monkeypatch.setitem(sys.modules, "fast_rnnt", None)
    loss, *_ = setup()
    expected = loss(backend="torch")
    for a, b in zip(loss(backend="auto"), expected, strict=True):
        assert torch.equal(a, b)
    assert "k2 is installed but broken (on cpu: RuntimeError: k2 was not compiled with CUDA)" in caplog.text
    with pytest.raises(ConfigError, match=r"on cpu: .* not compiled with CUDA"):
        loss(backend="k2")


@pytest.mark.parametrize("frames, symbols, lens", [(5, 0, [0, 0, 0]), (5, 7, [7, 2, 1]), (5, 4, [4, 0, 2])])
def test_batches_that_a_library_asserts_away_are_computed_here(monkeypatch, frames, symbols, lens):
    monkeypatch.setitem(sys.modules, "k2", working_library({}))
    y, y_lens = torch.randint(1, 20, (3, symbols)), torch.tensor(lens)
    decoder, joiner, proj = StatelessDecoder(20, 16), Joiner(16, 16, 16, 20), nn.Linear(16, 20)
    args = (torch.randn(3, frames, 16), decoder(decoder.add_sos(y)), joiner, proj, proj, y,
            torch.tensor([5, 4, 1]), y_lens)  # fmt: skip
    mine, theirs = (pruned_transducer_loss(*args, backend=name) for name in ("torch", "k2"))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_a_ragged_batch_equals_single_utterances_with_their_gradients():
    decoder, joiner = StatelessDecoder(20, 16), Joiner(16, 16, 16, 20)
    am, lm = nn.Linear(16, 20), nn.Linear(16, 20)
    x_lens, y_lens = [9, 2, 5, 1], [4, 6, 0, 1]  # a text longer than its audio, no text, one frame
    x, y = torch.randn(4, 9, 16, requires_grad=True), torch.randint(1, 20, (4, 6))

    def loss(x, y, x_lens, y_lens):  # windows as wide as any text: their width depends on the batch
        args = decoder(decoder.add_sos(y)), joiner, am, lm, y, torch.tensor(x_lens), torch.tensor(y_lens)
        losses = torch.stack(pruned_transducer_loss(x, *args, prune_range=50, backend="torch"))
        return losses, torch.autograd.grad(losses.sum(), x)[0]

    losses, grads = loss(x, y, x_lens, y_lens)
    for n, (t, s) in enumerate(zip(x_lens, y_lens, strict=True)):
        one, grad = loss(x[n : n + 1, :t], y[n : n + 1, :s], [t], [s])
        torch.testing.assert_close(losses[:, n : n + 1], one)
        torch.testing.assert_close(grads[n, :t], grad[0], rtol=1e-4, atol=1e-6)
        assert not grads[n, t:].any()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="choose auto, torch"):
        rnnt_backends.load_backend("warp")


def test_a_library_that_works_is_called_with_its_own_argument_names(monkeypatch):
    calls = {}
    monkeypatch.setitem(sys.modules, "k2", working_library(calls))
    loss, *_ = setup(fewest=1)
    simple, pruned = loss(backend="auto", prune_range=4)
    assert simple.shape == pruned.shape == (3,)
    assert calls == {"boundary": [[0, 0, 6, 12], [0, 0, 3, 9], [0, 0, 1, 5]], "reduction": "none",
                     "logits": (3, 12, 4, 20)}  # fmt: skip
