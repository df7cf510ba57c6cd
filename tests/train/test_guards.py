import contextlib
import logging
import random

import numpy as np
import pytest
import torch
from torch import nn

from icefall_kd.data.batch import Batch, Labels, NBest, TopK
from icefall_kd.errors import ConfigError, NumericError
from icefall_kd.runtime.files import read_json
from icefall_kd.systems.base import LossTerm, LossTerms
from icefall_kd.train import guards
from tests.train.toy import ToyData, ToySystem


def scan(system, batches, tmp_path):
    guards.scan_worst_batches(
        system, batches, torch.device("cpu"), contextlib.nullcontext, tmp_path, max_duration=200.0
    )


def test_the_scan_leaves_no_trace(tmp_path):
    system = ToySystem()
    system.eval()
    before = {k: v.clone() for k, v in system.state_dict().items()}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = (torch.rand(1), random.random(), np.random.rand())
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    scan(system, ToyData().worst_batches(), tmp_path)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert all(torch.equal(v, system.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in system.parameters())
    assert not system.training
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_used_by_one_of_the_batches_is_not_unused(tmp_path):
    class Sometimes(ToySystem):
        def losses(self, batch, step):
            terms = super().losses(batch, step)
            if "100" in batch.ids[0]:
                extra = self.forgotten(torch.ones(1, 3)).sum()
                terms.terms["extra"] = LossTerm(extra, 1.0, 1.0)
            return terms

    scan(Sometimes(unused=True), ToyData().worst_batches(), tmp_path)
    with pytest.raises(ConfigError, match="forgotten"):
        scan(Sometimes(unused=True), ToyData().worst_batches()[1:], tmp_path)


def test_frozen_parameters_need_no_gradient(tmp_path):
    system = ToySystem(unused=True)
    system.forgotten.requires_grad_(False)
    scan(system, ToyData().worst_batches(), tmp_path)
    assert not any(p.grad is not None for p in system.parameters()), "the scan leaves no gradient behind"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert guards.is_out_of_memory(error) is expected


def test_the_dump_holds_shapes_and_no_audio(tmp_path):
    batch = Batch(
        ids=["a", "b"],
        features=torch.zeros(2, 7, 80),
        x_lens=torch.tensor([7, 5]),
        audio=torch.zeros(2, 100),
        y=torch.ones(2, 3, dtype=torch.int64),
        y_lens=torch.tensor([3, 1]),
        texts=["secret", "words"],
        labels={
            "kd": Labels(torch.zeros(2, 9, 8), torch.tensor([9, 8])),
            "ctc_posteriors": TopK(torch.zeros(2, 9, 4), torch.zeros(2, 9, 4), torch.zeros(2, 9), torch.tensor([9, 8])),
            "nbest": NBest(torch.zeros(2, 5, 3), torch.zeros(2, 5), torch.zeros(2, 5)),
        },
        durations=[110.0, 50.0],
    )
    error = guards.out_of_memory(MemoryError(), batch, "here", tmp_path / "oom.json", 200.0)
    assert "--max-duration 150 (now 200)" in str(error) and "longest text 3 tokens" in str(error)
    dump = read_json(tmp_path / "oom.json")
    assert dump["batch"] == {
        "ids": ["a", "b"],
        "durations": [110.0, 50.0],
        "utterances": 2,
        "features": [2, 7, 80],
        "audio": [2, 100],
        "y": [2, 3],
        "x_lens": [7, 5],
        "y_lens": [3, 1],
        "labels": {"kd": [2, 9, 8], "ctc_posteriors": [2, 9, 4], "nbest": [2, 5, 3]},
    }


@pytest.mark.parametrize(
    ("durations", "max_duration", "remedy"),
    [
        ([10.0, 9.0], 100.0, "--max-duration 15 (now 100)"),  # of 20 s of padded audio: 75 would change nothing
        ([60.0, 55.0], 100.0, "--max-duration 75 (now 100)"),
        ([0.5, 0.5], 1.0, "--max-duration 0.75 (now 1)"),
        ([20.0], 100.0, "--max-utt-duration 15 or a smaller model"),
        ([], 100.0, "--max-duration 75 (now 100)"),
    ],
)
def test_the_suggestion_makes_a_batch_like_this_one_smaller(tmp_path, durations, max_duration, remedy):
    batch = Batch(ids=["a", "b"][: len(durations) or 2], durations=durations)
    error = guards.out_of_memory(MemoryError(), batch, "here", tmp_path / "oom.json", max_duration)
    assert str(error).endswith(f"try {remedy}")


def terms_of(**values):
    """Loss terms from lists of values by utterance; a float has no values by utterance."""
    terms = {}
    for name, x in values.items():
        x = torch.tensor(x)
        terms[name] = LossTerm(x.sum(), 1.0, 1.0, per_utterance=x if x.ndim else None)
    return LossTerms(terms=terms, frames=1)


def test_the_guilty_term_and_utterances_are_named():
    batch = Batch(ids=["a", "b", "c"])
    inf, nan = float("inf"), float("nan")
    report = guards.describe_non_finite(terms_of(ctc=[1.0, inf, nan], kd=[1.0, 2.0, 3.0]), batch)
    assert report == {"ctc": {"value": "nan", "utterances": ["b", "c"]}}
    report = guards.describe_non_finite(terms_of(ctc=inf), batch)
    assert report == {"ctc": {"value": "inf", "utterances": ["a", "b", "c"]}}
    # finite terms whose sum overflows
    report = guards.describe_non_finite(terms_of(x=[3e38], y=[3e38]), Batch(ids=["a"]))
    assert report == {"total": {"value": "inf", "utterances": ["a"]}}


def test_good_steps_reset_the_count(tmp_path):
    guard = guards.NonFiniteGuard(2, tmp_path)
    batch, bad = Batch(ids=["a"]), terms_of(ctc=[float("nan")])
    for step in range(18):
        if step % 3 == 2:
            guard.good()
        else:
            guard.bad(step, bad, [batch], locally=True)
    guard.bad(18, bad, [batch], locally=True)
    guard.bad(19, None, [batch], locally=False)
    with pytest.raises(NumericError, match="gradient is non-finite in a, b;"):
        guard.bad(20, None, [batch, Batch(ids=["b"])], locally=True)
    assert guard.total == 15
    dump = read_json(tmp_path / "nonfinite-step20-rank0.json")
    assert list(dump["skipped"][1]["terms"]) == ["another rank"]
    assert [b["ids"] for b in dump["skipped"][2]["batches"]] == [["a"], ["b"]]


def test_a_constant_validation_metric_warns(caplog):
    before = {"loss": 1.5, "ctc_loss": 2.0, "ctc_rate": 0.0, "ce_bound": 5.545, "length_acc": 0.25}
    with caplog.at_level(logging.WARNING):
        assert guards.constant_metrics([before]) == []
        assert guards.constant_metrics([before, {**before, "loss": 1.4}]) == ["ctc_loss"]
        assert guards.constant_metrics([before, {"loss": 1.4, "ctc_loss": 1.9}]) == []
    assert caplog.text.count("did not change over two epochs") == 1 and "ctc_loss=2" in caplog.text


def test_parameters_without_gradient_are_listed_in_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1](torch.ones(1, 2)).sum().backward()
    assert guards.parameters_without_gradient(model) == ["0.weight", "0.bias"]
