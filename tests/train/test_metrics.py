import json
import math

import pytest
import torch

from icefall_kd.systems.base import LossTerm, LossTerms
from icefall_kd.train.metrics import MetricsWriter, Tracker, format_values, read_metrics, read_terms, truncate_metrics


def test_values_are_per_frame_and_per_token():
    terms = LossTerms(
        terms={
            "ctc_loss": LossTerm(torch.tensor(60.0), 0.5, 20.0),
            "att_loss": LossTerm(torch.tensor(10.0), 1.0, 4.0, unit="token"),
            "logged": LossTerm(torch.tensor(8.0), 0.0, 2.0),
        },
        frames=20,
        metrics={"accuracy": (torch.tensor(5), 20.0), "ce00": (11.0, 2.0, math.log(256))},
    )
    tracker = Tracker()
    tracker.add(read_terms(terms))
    for _ in range(2):
        tracker.add_terms(terms)
    assert tracker.means() == {
        "loss": 2.0, "ctc_loss": 3.0, "att_loss": 2.5, "logged": 4.0, "accuracy": 0.25, "ce00": 5.5
    }  # fmt: skip
    assert tracker.frames == 60 and tracker.bounds == {"ce00": math.log(256)}
    text = "loss=2, ctc_loss=3, att_loss=2.5/token, logged=4, accuracy=0.25, ce00=5.5 (bound 5.545), over 60 frames"
    assert str(tracker) == text
    running = Tracker(0.9)
    running.add_tracker(tracker)
    assert str(running) == text


def test_running_values_forget():
    tracker = Tracker(decay=1 - 1 / 200)
    total = frames = 0.0
    for i in range(1000):
        value, count = float(i), float(1 + i % 3)
        tracker.add({"loss": [value, count]})
        total, frames = total * 0.995 + value, frames * 0.995 + count
    assert tracker.means()["loss"] == pytest.approx(total / frames, rel=1e-12)


def test_a_tracker_continues_exactly():
    a, b = Tracker(0.9), Tracker(0.9)
    for i in range(10):
        a.add({"loss": [0.1 * i, 3.0]})
        if i == 4:
            b.load_state_dict(json.loads(json.dumps(a.state_dict())))
        if i > 4:
            b.add({"loss": [0.1 * i, 3.0]})
    assert a.sums == b.sums


def test_numbered_values_share_an_entry():
    values = {"loss": 1.0, "kd_ce00": 1.0, "kd_ce01": 2.5, "kd_ce02": 3.25, "wav2vec2": 4.0}
    assert format_values(values) == "loss=1, kd_ce=[1 2.5 3.25], wav2vec2=4"
    assert format_values(values, {"kd_ce00": 5.545, "kd_ce01": 5.545}).count("(bound 5.545)") == 1
    assert format_values({}) == ""


def test_the_writer_appends_and_drops_what_will_come_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write("train", step, {"loss": 1.0 / step, "x": math.inf}, tot={"loss": 0.5}, lr=0.1)
    writer.write("valid", 3, {"loss": 0.25})
    writer.close()
    file = tmp_path / "log" / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(file)] == [1, 2, 3, 3]
    assert read_metrics(file, "train")[1] == {
        "kind": "train", "step": 2, "loss": 0.5, "x": None, "tot": {"loss": 0.5}, "lr": 0.1
    }  # fmt: skip
    with open(file, "a") as f:
        f.write('{"kind": "train", "st')  # killed while it wrote
    writer = MetricsWriter(tmp_path, resumed_step=2)
    writer.write("train", 3, {"loss": 7.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(file)] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    writer = MetricsWriter(tmp_path, resumed_step=3)
    for kind, loss in (("valid", 5.0), ("valid", 6.0), ("train", 8.0), ("valid", 9.0)):
        writer.write(kind, 3, {"loss": loss})
    writer.close()
    found = [(r["kind"], r["loss"]) for r in read_metrics(file)][2:]
    assert found == [("valid", 5.0), ("valid", 6.0), ("train", 8.0), ("valid", 9.0)], "a record of before is replaced"


def test_tensorboard_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    writer.write("train", 5, {"loss": 1.0}, tot={"loss": 0.5}, lr=0.125, epoch=1)
    writer.write("valid", 5, {"loss": 0.25}, epoch=1)
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    names = {"train/current_loss", "train/tot_loss", "train/learning_rate", "train/valid_loss", "train/epoch"}
    assert names <= set(board.Tags()["scalars"])
    assert [(e.step, e.value) for e in board.Scalars("train/learning_rate")] == [(5, 0.125)]


def test_truncating_a_missing_file_is_fine(tmp_path):
    truncate_metrics(tmp_path / "absent.jsonl", 3)
    assert read_metrics(tmp_path / "absent.jsonl") == []
