"""report.html: self-contained and well formed, with the numbers that the exp_dir holds."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from report_toys import RECORDS, Page, write_result

from icefall_kd.config import AttentionDecoderConfig, KdConfig, ReportConfig, TrainConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import WHISPER_CONV
from icefall_kd.labels.info import LabelSetInfo
from icefall_kd.labels.store import LabelStore
from icefall_kd.report.build import write_report
from icefall_kd.report.mvq import read_codes
from icefall_kd.report.training import curves, read_log
from icefall_kd.train.state import write_config

REPO = Path(__file__).resolve().parents[2]


def write_exp_dir(exp_dir: Path, config: TrainConfig, records: list[dict]) -> Path:
    (exp_dir / "log").mkdir(parents=True)
    write_config(exp_dir, config, 0)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (exp_dir / "log/metrics.jsonl").write_text(lines)
    return exp_dir


def test_curves_hold_every_value_of_the_log_and_no_bookkeeping():
    found = curves(RECORDS)
    assert list(found) == ["loss", "ctc_loss", "lr", "grad_norm"]
    assert found["ctc_loss"].train == [(1, 3.0), (9, 2.0)] and found["ctc_loss"].running == [(1, 3.0), (9, 2.25)]
    assert found["ctc_loss"].valid == [(9, 2.125)] and found["lr"].train == [(1, 0.1), (9, 0.2)]
    assert math.isnan(found["loss"].train[1][1])  # JSON has no NaN: a None is one
    assert found["ctc_loss"].last() == (2.25, 2.125)


def test_figures_that_a_system_logs_between_steps_are_curves_too():
    found = curves([{"kind": "train", "step": 3, "loss": 1.0, "figures": {"sparsity": 0.5}}])
    assert list(found) == ["loss", "sparsity"] and found["sparsity"].train == [(3, 0.5)]


def test_the_page_needs_nothing_else_and_says_what_the_exp_dir_holds(tmp_path):
    exp_dir = write_exp_dir(tmp_path / "a<b>", TrainConfig(), RECORDS)
    write_result(exp_dir, "greedy_search", [{"id": "u"}, {"id": "v"}], [1, 2], {})
    file = write_report(ReportConfig(exp_dir=exp_dir))
    assert file == exp_dir / "report.html" and [p.name for p in exp_dir.glob(".tmp*")] == []
    page = Page(file)
    assert page.fetched == [] and "url(http" not in page.source and "<script" not in page.source
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert page.row("seed") == ["seed", "42"]
    assert page.row("student without KD", "greedy_search")[2:6] == ["1,234", "15.00 (14.00 to 16.00)", "0.5000", "s"]
    assert page.row("ctc_loss") == ["ctc_loss", "per token", "2.25", "2.125"]
    assert page.row("--num-epochs") == ["--num-epochs", "30"]  # a default: among all options alone
    assert any(alt == "ctc_loss over the steps: training ends at 2.25, validation ends at 2.125" for alt in page.alts)
    assert "a<b>" in page.text
    # Every part of a drawing that is referred to by name has this name once.
    named = re.findall(r'(?:xlink:href="|url\()#([\w-]+)', page.source)
    assert named and all(page.ids.count(name) == 1 for name in named)
    before = file.read_bytes()
    assert write_report(ReportConfig(exp_dir=exp_dir)).read_bytes() == before


def test_only_options_that_were_changed_stand_in_front(tmp_path):
    config = TrainConfig(kd=KdConfig(kd="none", kd_delay=4))
    page = Page(write_report(ReportConfig(exp_dir=write_exp_dir(tmp_path / "e", config, RECORDS))))
    assert page.row("--kd-delay")[:3] == ["--kd-delay", "4", "0"]
    assert [row for row in page.rows if row[0] == "--kd-layer"] == [["--kd-layer", "0"]]


def test_other_trainings_get_rows_of_the_results(tmp_path):
    dirs = []
    for name, kd_delay, errors in (("a", 0, [1]), ("b", 1, [2])):
        config = TrainConfig(kd=KdConfig(kd_delay=kd_delay))
        dirs.append(write_exp_dir(tmp_path / name, config, RECORDS))
        write_result(dirs[-1], "greedy_search", [{"id": "u"}], errors, {})
    page = Page(write_report(ReportConfig(exp_dir=dirs[0], out=tmp_path / "r.html", compare_with=dirs[1:])))
    assert page.row("student without KD (a)")[3].startswith("10.00")
    assert page.row("student without KD (b)")[3].startswith("20.00")
    assert not (dirs[0] / "report.html").exists()


def test_an_exp_dir_without_a_log_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; train first"):
        write_report(ReportConfig(exp_dir=tmp_path / "none"))
    exp_dir = write_exp_dir(tmp_path / "e", TrainConfig(), [])
    with pytest.raises(DataError, match=r"metrics.jsonl holds no record yet; .* run train.py --exp-dir"):
        write_report(ReportConfig(exp_dir=exp_dir))
    (exp_dir / "log/metrics.jsonl").unlink()
    command = [sys.executable, REPO / "local/report.py", "--exp-dir", exp_dir]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and "metrics.jsonl does not exist" in done.stderr and "Traceback" not in done.stderr
    assert not (exp_dir / "report.html").exists()


def write_codes(folder: Path, codes: np.ndarray) -> None:
    """Write a label set of one utterance, codes (F, Q) of 256 entries."""
    info = LabelSetInfo(kind="codebook_indexes", dtype="uint8", width=codes.shape[1], dim=8, teacher="t",
                        teacher_sha256="ab" * 32, layer=1, layer_convention="1-based", normalization="none",
                        frame_formula=WHISPER_CONV.to_dict(), num_codebooks=codes.shape[1], codebook_size=256,
                        quantizer_sha256="cd" * 32)  # fmt: skip
    writer = LabelStore.create(folder, info).writer(0, 1)
    writer.add(f"r|0|{320 * len(codes)}|1.0", codes, 320 * len(codes))
    writer.finish()


def mvq_records(values: list[float]) -> list[dict]:
    ce = {f"kd_ce{m:02d}": value for m, value in enumerate(values)}
    return [RECORDS[0] | ce | {"tot": RECORDS[0]["tot"] | ce}, *RECORDS[1:]]


def test_codebooks_have_their_entropy_usage_and_cross_entropy(tmp_path):
    rng = np.random.default_rng(0)
    used = np.stack([rng.permutation(np.arange(256).repeat(2)), np.arange(512) % 4], axis=1).astype(np.uint8)
    write_codes(tmp_path / "labels", used)
    assert torch.equal(read_codes(tmp_path / "labels"), torch.from_numpy(used.astype(np.int64)))
    config = TrainConfig(kd=KdConfig(kd="mvq", label_dir=[tmp_path / "labels"]))
    exp_dir = write_exp_dir(tmp_path / "e", config, mvq_records([5.0, 1.25, 4.0, 1.0]))
    page = Page(write_report(ReportConfig(exp_dir=exp_dir)))
    # By the definition of entropy: all of 256 entries equally often, ln 256; four of them, ln 4.
    assert page.row("0", "0", "0")[3:] == ["256 of 256", "256.0", "5.545", "5.000", "+0.545"]
    assert page.row("3", "1", "1")[3:] == ["4 of 256", "4.0 (collapsed)", "1.386", "1.000", "+0.386"]
    assert page.row(str(tmp_path / "labels"))[1:5] == ["codebook indexes", "t abababababab", "1 (1-based)", "cd" * 6]


def test_codebooks_without_their_labels_still_have_cross_entropies(tmp_path):
    config = TrainConfig(kd=KdConfig(kd="mvq", label_dir=[tmp_path / "gone"]))
    page = Page(write_report(ReportConfig(exp_dir=write_exp_dir(tmp_path / "e", config, mvq_records([5.0, 1.25])))))
    assert page.row("1", "1.250") == ["1", "1.250"] and "is no more" in page.text


def nar_config(decoder: str) -> TrainConfig:
    return TrainConfig(system="nar", attention=AttentionDecoderConfig(attention_decoder=decoder))


def test_masks_and_passes_are_those_of_the_decodings(tmp_path):
    exp_dir = write_exp_dir(tmp_path / "e", nar_config("mlm"), RECORDS)
    # 7 masks in at most 5 passes: 1 1 1 1 3, five passes; 3 masks: one pass each; none: no pass.
    nbest = [{"id": str(k), "nbest": [{"tokens": [3] * 8, "masked": m}]} for k, m in enumerate((0, 3, 7, 0))]
    options = {"passes": 5, "mask_threshold": 0.9}
    write_result(exp_dir, "mask_predict", nbest, [1, 4, 6, 2], options, masked_share=10 / 32)
    page = Page(write_report(ReportConfig(exp_dir=exp_dir)))
    row = page.row("mask_predict", "dev")
    assert row[2:6] == ["threshold 0.9, at most 5 passes", "31.2 %", "2.00", "5"]
    assert row[6:] == ["15.00 (2)", "50.00 (2)"]  # 1 + 2 of 20 words, 4 + 6 of 20
    passes = next(alt for alt in page.alts if alt.startswith("Passes"))
    assert passes == "Passes, mask_predict, dev; utterances by passes: 0: 2, 1: 0, 2: 0, 3: 1, 4: 0, 5: 1"
    (exp_dir / "mask_predict/nbest-dev-s.jsonl").write_text('{"id"')
    with pytest.raises(DataError, match=r"nbest-dev-s.jsonl is damaged"):
        write_report(ReportConfig(exp_dir=exp_dir))


def test_a_teacher_masks_nothing(tmp_path):
    page = Page(write_report(ReportConfig(exp_dir=write_exp_dir(tmp_path / "e", nar_config("ar"), RECORDS))))
    assert "autoregressive teacher: it masks nothing" in page.text
    assert read_log(tmp_path / "e") == RECORDS
