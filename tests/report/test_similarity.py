"""CKA against its definition, and of models in exp_dirs."""

import json

import pytest
import torch
from hubert_asr_toys import hubert_config
from micro_corpus import write_part
from students import SIZES, tokenizer_of, write_student

from icefall_kd.config import LoopConfig, ModelConfig, TrainConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.report.similarity import SimilarityConfig, alignment, measure, table


def hsic_by_traces(k, m):
    """Return the unbiased estimator of Song et al. (2012), term by term."""
    n = len(k)
    k, m = k - torch.diag(k.diag()), m - torch.diag(m.diag())
    one = torch.ones(n, dtype=torch.float64)
    total = torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


def cka_by_definition(x, y, estimator):
    x, y = x.double(), y.double()
    if estimator == "debiased":
        k, m = x @ x.T, y @ y.T
        return hsic_by_traces(k, m) / (hsic_by_traces(k, k) * hsic_by_traces(m, m)) ** 0.5
    x, y = x - x.mean(0), y - y.mean(0)  # Kornblith et al., section 3, in channels
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize("estimator", ["debiased", "plain"])
def test_it_is_what_the_definition_says(estimator):
    torch.manual_seed(0)
    x = [torch.randn(30, 5) + 2, torch.randn(30, 7).cumsum(0)]
    y = [torch.randn(30, 4), x[1] @ torch.randn(7, 6), x[0] * 3]
    found = alignment(x, y, estimator)
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            assert float(found[i, j]) == pytest.approx(cka_by_definition(a, b, estimator), abs=1e-9)
    assert float(found[0, 2]) == pytest.approx(1.0)  # whatever the scale
    rotation = torch.linalg.qr(torch.randn(7, 7))[0]
    turned = alignment([x[1]], [x[1] @ rotation + 5], estimator)
    assert float(turned) == pytest.approx(1.0, abs=1e-4)


def test_the_debiased_one_is_nothing_where_nothing_is_in_common():
    torch.manual_seed(1)
    x, y = torch.randn(60, 300), torch.randn(60, 300)
    assert abs(float(alignment([x], [y], "debiased"))) < 0.05 < 0.5 < float(alignment([x], [y], "plain"))
    with pytest.raises(DataError, match="all frames of a layer are alike"):
        alignment([torch.ones(20, 3)], [x[:20]])


def test_layers_of_two_trainings_are_compared(tmp_path):
    write_part(tmp_path, "dev", [1.0, 0.8, 1.2], features=False)
    for name, layers in (("one", 2), ("two", 3)):
        model = ModelConfig(**SIZES | {"num_encoder_layers": layers, "feedforward_dim": 24 * layers})
        config = TrainConfig(model=model, loop=LoopConfig(exp_dir=tmp_path / name))
        (tmp_path / name).mkdir()
        write_student(tmp_path / name, tokenizer_of("char"), config)
    options = {"cuts": [tmp_path / "manifests/cuts_dev.jsonl.gz"], "num_frames": 40, "device": "cpu"}

    def compare(student, teacher):
        files = {"student": str(tmp_path / student), "teacher": str(tmp_path / teacher), "out": tmp_path / "cka.json"}
        return measure(SimilarityConfig(**options, **files))

    result = compare("one", "two")
    assert json.loads((tmp_path / "cka.json").read_text()) == result
    assert result["student_layers"] == [1, 2] and result["teacher_layers"] == [1, 2, 3] and result["frames"] == 40
    assert torch.tensor(result["cka"]).abs().max() < 1.0
    itself = torch.tensor(compare("two", "two")["cka"])
    torch.testing.assert_close(itself.diag(), torch.ones(3))
    torch.testing.assert_close(itself, itself.T)
    lines = table(result).splitlines()
    assert lines[0] == "| student \\ teacher | 1 | 2 | 3 |" and len(lines) == 4 and lines[2].count("**") == 2


def test_layers_of_hubert_models_meet_frame_by_frame(tmp_path):
    write_part(tmp_path, "dev", [0.8, 0.6], features=False)
    for kind in ("base", "deep_thin", "fithubert"):
        (tmp_path / kind).mkdir()
        write_student(tmp_path / kind, tokenizer_of("char"), hubert_config(kind, exp_dir=tmp_path / kind))
    files = {"cuts": [tmp_path / "manifests/cuts_dev.jsonl.gz"], "out": tmp_path / "cka.json"}
    teacher = {"teacher": str(tmp_path / "base"), "device": "cpu", "num_frames": 30, **files}
    result = measure(SimilarityConfig(student=str(tmp_path / "deep_thin"), **teacher))
    assert result["student_layers"] == result["teacher_layers"] == [1, 2] and result["estimator"] == "debiased"
    with pytest.raises(ConfigError, match=r"fithubert makes 20 frames of dev\d-0, .*base 39|makes 15 .* 29"):
        measure(SimilarityConfig(student=str(tmp_path / "fithubert"), **teacher))
