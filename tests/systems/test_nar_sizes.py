"""The sizes in conf/ of the recipes: those of ESPnet's recipes, and students of a ninth of them."""

from pathlib import Path

import pytest

from icefall_kd.cli import parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.models.ctc_attention import CtcAttentionModel

REPO = Path(__file__).resolve().parents[2]
# Millions of parameters of encoder, decoder and CTC head with V tokens, computed from the published dimensions with an
# ESPnet front end.
SIZES = {
    ("aishell", "teacher"): (4233, 46.2),
    ("aishell", "small"): (4233, 5.28),
    ("librispeech", "teacher"): (5000, 116.2),
    ("librispeech", "small"): (5000, 12.9),
}


def parameters(folder: Path, name: str, vocab_size: int, *layers: str) -> int:
    files = [folder / f"{name}{layer}.yaml" for layer in ("", *(f"_{layer}" for layer in layers))]
    config = parse_config(TrainConfig, [f"--config={file}" for file in files])
    return sum(p.numel() for p in CtcAttentionModel(config.model, config.attention, vocab_size).parameters())


@pytest.mark.parametrize(("recipe", "layer"), SIZES)
def test_sizes_are_those_that_were_published(recipe, layer):
    vocab_size, millions = SIZES[recipe, layer]
    found = parameters(REPO / "egs" / recipe / "conf", "nar", vocab_size, layer)
    assert abs(found / 1e6 / millions - 1) < 0.02


@pytest.mark.parametrize("recipe", ["aishell", "librispeech"])
def test_small_students_have_about_a_ninth_of_the_parameters(recipe):
    vocab_size = SIZES[recipe, "small"][0]
    folder = REPO / "egs" / recipe / "conf"
    big, student = (parameters(folder, "nar", vocab_size, *layers) for layers in (["teacher"], ["transfer"]))
    assert abs(student / big - 1) < 0.001  # <mask> is one row of embedding and output
    assert 8.5 < big / parameters(folder, "nar", vocab_size, "small") < 9.5
    assert 8 < parameters(folder, "nar_demo", 31) / parameters(folder, "nar_demo", 31, "small") < 10


@pytest.mark.parametrize("bed", ["nar_digits", "nar_barista", "nar_mandarin_words"])
def test_so_have_those_of_the_beds(bed):
    folder = REPO / "benchmarks" / "conf"
    assert 8 < parameters(folder, bed, 40) / parameters(folder, bed, 40, "small") < 10
