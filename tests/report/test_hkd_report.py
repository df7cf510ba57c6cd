"""The page of a CIF recogniser: boundaries are where the weights pass whole numbers."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from hkd_toys import hkd_config
from report_toys import RECORDS, Page, write_result
from students import babble, write_student

from icefall_kd.config import DecodeConfig, ReportConfig
from icefall_kd.data.batch import Batch
from icefall_kd.recipe import load_system
from icefall_kd.report.build import write_report
from icefall_kd.report.hkd import fire
from icefall_kd.report.plots import draw_cif
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import save_weights
from icefall_kd.train.checkpoint import load_checkpoint

TEXTS = {"utt-a": "ONE TWO", "utt-b": "THREE", "utt-c": "TWO THREE ONE"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An exp_dir of an untrained recogniser with a log, and a folder of speech-like noise with transcripts."""
    root = tmp_path_factory.mktemp("hkd")
    exp_dir, audio = root / "exp", root / "speech"
    write_student(exp_dir, Tokenizer.train_char(TEXTS.values()), hkd_config(text={"text_kd": ["acd", "lrd"]}))
    (exp_dir / "log").mkdir()
    (exp_dir / "log/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    audio.mkdir()
    for i, name in enumerate(TEXTS):
        soundfile.write(audio / f"{name}.wav", babble(24000 + 8000 * i, i), 16000)
    (audio / "speech.trans.txt").write_text("".join(f"{k} {v}\n" for k, v in TEXTS.items()))
    return exp_dir, audio


def test_the_page_draws_utterances_of_all_lengths(trained, tmp_path):
    exp_dir, audio = trained
    page = Page(write_report(ReportConfig(exp_dir=exp_dir, out=tmp_path / "r.html", part=str(audio), utterances=2)))
    assert "CIF + ACD + LRD" in page.text
    assert all(link.startswith("data:image/png") for link in page.fetched) and len(page.fetched) == 2
    drawn = [alt for alt in page.alts if alt.startswith("Spectrogram of ")]
    assert [alt.split()[2] for alt in drawn] == ["utt-a", "utt-c"]  # a third and two thirds through the lengths
    # The reference's characters and the end of the text.
    assert page.row("utt-c")[1] == "14" and page.row("utt-c")[4] == "TWO THREE ONE"
    named = [name for name in page.ids if page.ids.count(name) > 1]
    assert named == []


def test_what_is_gone_is_named(trained, tmp_path):
    exp_dir, _ = trained
    options = {"exp_dir": exp_dir, "out": tmp_path / "r.html"}
    page = Page(write_report(ReportConfig(**options)))  # of the training's validation part, which is nowhere
    assert "No utterance is drawn: " in page.text and "cuts_dev.jsonl.gz" in page.text
    assert "No utterance" not in Page(write_report(ReportConfig(**options, utterances=0))).text


def test_the_parameters_are_those_of_the_decoding(trained, tmp_path):
    exp_dir, audio = trained
    checkpoint, file = load_checkpoint(exp_dir / "epoch-1.pt"), tmp_path / "other.safetensors"
    save_weights(file, checkpoint | {"model": {k: v.clone() for k, v in checkpoint["model"].items()}})
    options = {"exp_dir": exp_dir, "out": tmp_path / "r.html", "part": str(audio), "utterances": 1}
    for used, weights in (("epoch-1.pt", None), ("other.safetensors", str(file))):
        config = {"epoch": 1, "iter": None, "avg": 1, "use_averaged_model": False, "weights": weights}
        write_result(exp_dir, "cif_greedy_search", [{"id": "u"}], [1], config)
        assert f"parameters: {used}" in Page(write_report(ReportConfig(**options))).text
        shutil.rmtree(exp_dir / "cif_greedy_search")


def test_tokens_are_written_as_they_are():
    svg = draw_cif(
        "u", np.zeros((16, 8)), 0.01, np.full((4, 2), 0.25), 0.08, ["$a$", "$$", "<b>"], [0, 0.04, 0.08, 0.16]
    )
    assert all(f">{token}</text>" in svg for token in ("$a$", "$$", "&lt;b&gt;"))


@pytest.mark.parametrize(("alpha", "fired", "begins"), [
    # 2.55 in all: two whole tokens and a tail, which lasts to the end of the audio.
    ([0.5, 0.25, 0.5, 0.75, 0.55], 3, [0.0, 0.08 * 2.5, 0.08 * 4, 0.08 * 5]),
    # 2.25: what is left behind the second token is nobody's.
    ([0.5, 0.25, 0.5, 0.75, 0.25], 2, [0.0, 0.08 * 2.5, 0.08 * 4]),
])  # fmt: skip
def test_boundaries_and_shares_are_those_of_the_weights(trained, alpha, fired, begins):
    loaded = load_system(DecodeConfig(exp_dir=trained[0], device="cpu"))
    predicted = torch.zeros(1, 20)
    predicted[0, :5] = torch.tensor(alpha)
    system = loaded.system
    system.model.cif.alpha = lambda encoder_out, lens: predicted[:, : encoder_out.shape[1]]
    system.encode = lambda batch: (torch.randn(1, 5, system.model.encoder.dim), torch.tensor([5]))
    batch = Batch(ids=["u"], texts=["ONE"], features=torch.randn(1, 40, 80), x_lens=torch.tensor([40]))
    found = fire(loaded, batch)
    assert found.expected == 4 and found.quantity == pytest.approx(sum(alpha))
    assert len(found.tokens) == fired and found.begins == pytest.approx(begins)
    assert found.weights.sum(axis=0) == pytest.approx(alpha)  # every frame's weight is somewhere
    assert found.weights[: min(fired, 2)].sum(axis=1) == pytest.approx(1)
    rest = sum(alpha) - fired
    assert found.weights[-1].sum() == pytest.approx(max(rest, 0.0)) and np.all(found.weights >= 0)
