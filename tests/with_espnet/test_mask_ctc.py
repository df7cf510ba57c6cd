"""Our searches against those of ESPnet 202511, with the same weights: `make test-espnet`."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from nar_search_toys import nar_model, ragged_batch

from icefall_kd.decode.ctc_string import ctc_string_scores
from icefall_kd.decode.joint_beam import JointBeamSearch
from icefall_kd.decode.mask_ctc import MaskPredict

pytest.importorskip("espnet2", reason="ESPnet is not installed; make test-espnet")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "espnet_models.py"


@pytest.fixture(scope="module")
def theirs():
    spec = importlib.util.spec_from_file_location("espnet_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def comparable(model):
    """Take out what the two differ in: the epsilon of LayerNorm, and tokens that ESPnet may predict and we do not."""
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-12
    with torch.no_grad():
        model.ctc_output.bias[[1, 2, model.mask_id]] -= 1e4
        # The end of a string is a token like others to the autoregressive decoder.
        model.decoder.output.bias[[0, 2, model.mask_id] + ([] if model.decoder.causal else [1])] -= 1e4
    return model


def test_the_masked_decoders_give_the_same_logits(theirs):
    for seed in range(5):
        model = comparable(nar_model(seed))
        x, _ = ragged_batch(seed, n=1)
        y = torch.randint(3, 12, (1, 7))
        ours = model.decoder(y, torch.tensor([7]), model.decoder.memory(x, torch.tensor([15])))
        ids = theirs.our_ids(model.vocab_size)
        asked = ids.argsort()[y]
        found, _ = theirs.make_decoder(model)(x, torch.tensor([15]), asked, torch.tensor([7]))
        torch.testing.assert_close(found, ours[..., ids], rtol=1e-6, atol=1e-6)


def test_mask_predict_gives_the_same_tokens_on_50_random_cases(theirs):
    masked = []
    settings = itertools.cycle(itertools.product([1, 2, 3, 10], [0.7, 0.9, 0.99]))
    for seed in range(10):
        model = comparable(nar_model(seed))
        x, lens = ragged_batch(seed, n=5, longest=30, shortest=4)
        for i, (passes, threshold) in zip(range(5), settings, strict=False):
            case, length = x[i : i + 1], lens[i : i + 1]
            search = MaskPredict(model, passes=passes, mask_threshold=threshold, rank_masks_by="logit")
            (ours,) = search.decode(case, length)
            (found,) = theirs.EspnetMaskCtc(model, passes, threshold).decode(case, length)
            assert ours[0].tokens == found[0].tokens
            masked.append(ours[0].masked)
    assert len(masked) == 50 and sum(n > 1 for n in masked) > 25


@torch.no_grad()
def test_the_joint_beam_search_scores_as_espnet_does_and_finds_no_worse(theirs):
    """In flat random models ESPnet's beam loses more: the end of a string takes places in it."""
    for seed in range(6):
        model = comparable(nar_model(seed, decoder="ar", sharpness=2.0))
        model.ctc_output.weight.div_(3)
        x, lens = ragged_batch(seed, n=1)
        memory, log_probs = model.decoder.memory(x, lens), model.ctc_log_probs(x)
        (ours,), (found,) = (s.decode(x, lens) for s in (JointBeamSearch(model, 10), theirs.EspnetBeam(model, 10)))
        assert ours[0].score >= found[0].score - 1e-3
        for hyp in (ours[0], *found[:5]):
            path = [*hyp.tokens, model.sos_id]
            logits = model.decoder(torch.tensor([[1, *hyp.tokens]]), torch.tensor([len(path)]), memory)[0]
            attention = logits.log_softmax(-1)[range(len(path)), path].sum()
            (ctc,) = ctc_string_scores(log_probs, lens, [0], [hyp.tokens])
            assert hyp.score == pytest.approx(0.7 * float(attention) + 0.3 * ctc, abs=1e-3)


def test_the_benchmark_times_espnet_on_batches_too(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("nar_rtf", SCRIPT.with_name("nar_rtf.py"))
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "VOCAB", 40)
    monkeypatch.setattr(benchmark, "SIZES", {"big": (1, 1, 16, 16, (2, 4, 8))})
    config = benchmark.RtfConfig(sizes=["big"], seconds=1.2, tokens=6, utterances=2, batch=2, repeats=1, espnet=True)
    rows = benchmark.measure_random(config, torch.device("cpu"))
    assert sum(row["search"].startswith("ESPnet") for row in rows) == 2
    assert all(row["tokens"] == 6.0 for row in rows)
