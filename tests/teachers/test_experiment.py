import dataclasses

import pytest
import torch

from icefall_kd.cli import config_to_dict, options_of
from icefall_kd.config import ModelConfig, TeacherConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError
from icefall_kd.frames import conv2d_subsampled_len, fbank_num_frames
from icefall_kd.models.transducer import TransducerModel
from icefall_kd.teachers import build_teacher
from icefall_kd.train.checkpoint import save_checkpoint

MODEL = ModelConfig(encoder_size="tiny", num_encoder_layers=3, encoder_dim=32, num_heads=2, feedforward_dim=48)


def flat(config) -> dict:
    values = {}
    for name, option in options_of(type(config)).items():
        value = config
        for part in (*option.group, name):
            value = getattr(value, part)
        values[name] = value if isinstance(value, (int, float, str, bool, type(None))) else None
    return {k: v for k, v in values.items() if v is not None}


@pytest.fixture()
def exp_dir(tmp_path):
    config = dataclasses.replace(TrainConfig(), model=MODEL)
    model = TransducerModel(MODEL, vocab_size=10, transducer=False, ctc=True)
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    checkpoint = {"model": state, "config": flat(config), "train": {"step": 3, "average_period": 100, "epoch": 1}}
    save_checkpoint(tmp_path / "epoch-1.pt", checkpoint)
    return tmp_path, model


def teacher_of(folder, **options):
    return build_teacher(TeacherConfig(teacher=str(folder), teacher_device="cpu", **options))


def test_an_exp_dir_is_a_teacher_with_exact_frames(exp_dir):
    folder, model = exp_dir
    lengths = [16000, 700, 12345, 1199, 8000, 16079]
    audio = [0.1 * torch.randn(n) for n in lengths]
    teacher = teacher_of(folder, layer=2)
    whole = teacher.extract(Batch.from_audio(audio))
    expected = [max(0, conv2d_subsampled_len(fbank_num_frames(n))) for n in lengths]
    assert whole.lens["embeddings"].tolist() == expected == [teacher.num_frames(n) for n in lengths]
    for i, wave in enumerate(audio):
        alone = teacher.extract(Batch.from_audio([wave])).arrays["embeddings"][0]
        assert len(alone) == expected[i]
        if len(alone):
            got = whole.arrays["embeddings"][i, : expected[i]]
            assert (got - alone).abs().max() <= 1e-5 * alone.abs().max()
    features = teacher.extractor.extract(audio[0])
    with torch.no_grad():
        taps = model.encoder.eval()(features[None], torch.tensor([len(features)]), taps=(2,)).taps
    both = teacher_of(folder, layer=3)
    assert both.tap([2, -1]) == ["layer2", "embeddings"]
    assert torch.equal(both.extract(Batch.from_audio(audio)).arrays["layer2"], whole.arrays["embeddings"])
    assert (taps[2][0] - whole.arrays["embeddings"][0, : expected[0]]).abs().max() < 1e-5


def test_provenance_names_weights_and_extractor(exp_dir):
    folder, _ = exp_dir
    provenance = teacher_of(folder).provenance()
    assert provenance["layer"] == 3 and provenance["family"] == "experiment"
    assert len(provenance["weights_sha256"]) == 64 and provenance["feature_extractor"]
    assert provenance["weights_sha256"] == teacher_of(folder, layer=1).provenance()["weights_sha256"]


def test_a_training_without_an_encoder_is_refused(tmp_path):
    save_checkpoint(tmp_path / "epoch-1.pt", {"model": {"x": torch.ones(1)}, "config": {}, "train": {"step": 1}})
    with pytest.raises(ConfigError, match="no encoder"):
        teacher_of(tmp_path)


@pytest.mark.parametrize("sizes, seen", [([4, 2, -1], {}), ([4, 8], {"chunk_size": 8, "left_context_frames": -1})])
def test_a_streaming_model_teaches_with_the_most_that_it_can_see(tmp_path, sizes, seen):
    model = dataclasses.replace(MODEL, streaming=True, chunk_size=sizes, left_context_frames=[8, -1])
    config = TrainConfig(model=model)
    state = {f"model.{k}": v for k, v in TransducerModel(model, 10, transducer=False).state_dict().items()}
    train = {"step": 3, "average_period": 100, "epoch": 1}
    save_checkpoint(tmp_path / "epoch-1.pt", {"model": state, "config": config_to_dict(config), "train": train})
    teacher = teacher_of(tmp_path)
    provenance = teacher.provenance()
    assert {k: v for k, v in provenance.items() if k in ("chunk_size", "left_context_frames")} == seen
    audio = [0.1 * torch.randn(16000), 0.1 * torch.randn(5000)]
    both = teacher.extract(Batch.from_audio(audio)).arrays["embeddings"]
    alone = teacher.extract(Batch.from_audio(audio[1:])).arrays["embeddings"][0]
    assert (both[1, : len(alone)] - alone).abs().max() <= 1e-5 * alone.abs().max()
