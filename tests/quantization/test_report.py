"""The report's figures against brute force, and its warnings."""

import io
import json
import math
from collections import Counter

import pytest
import torch
from rich.console import Console

from icefall_kd.errors import DataError
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.report import codebook_correlation, index_entropy, print_report, quantizer_report


def test_entropy_is_that_of_the_counts():
    codes = torch.randint(0, 5, (200, 3), dtype=torch.uint8)
    expected = []
    for column in codes.T.tolist():
        expected.append(-sum(c / 200 * math.log(c / 200) for c in Counter(column).values()))
    assert index_entropy(codes, 16).tolist() == pytest.approx(expected)


def test_correlation_is_that_of_the_covariances():
    quantizer = Quantizer(7, 4, 16)
    centers = quantizer.scaled_centers().detach().double()
    covariances = [torch.cov(c.T, correction=0) for c in centers]
    ours = codebook_correlation(quantizer)
    for i, a in enumerate(covariances):
        for j, b in enumerate(covariances):
            expected = torch.trace(a @ b) / torch.sqrt(torch.trace(a @ a) * torch.trace(b @ b))
            assert ours[i, j].item() == pytest.approx(expected.item())


def test_errors_storage_and_projection():
    quantizer = Quantizer(16, 4, 256)
    x = torch.randn(300, 16) * 0.5
    report = quantizer_report(quantizer, x, torch.randn(200, 16), 50.0, hours=300, teacher_speed=100)
    for rounds in range(6):
        decoded = quantizer.decode(quantizer.encode(x, rounds)).double()
        expected = (decoded - x).square().sum() / (x.double() - x.double().mean(dim=0)).square().sum()
        assert report["relative_error"][str(rounds)] == pytest.approx(expected.item(), rel=1e-5)
    assert report["entropy_frames"] == 500
    assert report["entropy_bias"] == pytest.approx(255 / 1000)
    assert report["bytes_per_hour"] == 180_000 * 4
    assert report["ratio_to_float32"] == pytest.approx(16)
    assert report["gaussian_bound"] == pytest.approx(2.0**-4)
    projection = report["projection"]
    assert projection["bytes"] == 300 * 180_000 * 4 and projection["teacher_hours"] == 3
    assert projection["encode_hours"] == pytest.approx(300 * 50 / report["encode_frames_per_second"])
    assert json.loads(json.dumps(report)) == report


def test_a_collapsed_and_a_doubled_codebook_are_named():
    quantizer = Quantizer(16, 4, 256)
    with torch.no_grad():
        quantizer.centers[1] = quantizer.centers[0]
        quantizer.centers[2, 1:] = 1000.0
    report = quantizer_report(quantizer, torch.randn(500, 16))
    assert any("codebook 2 has collapsed" in warning for warning in report["warnings"])
    assert any("codebooks 0 and 1 share" in warning for warning in report["warnings"])
    assert any("500 frames" in warning for warning in report["warnings"])
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=120))
    assert "collapsed" in stream.getvalue() and "relative error" in stream.getvalue()


def test_no_frames_is_an_error():
    with pytest.raises(DataError, match="frames"):
        quantizer_report(Quantizer(16, 4, 256), torch.zeros(0, 16))
