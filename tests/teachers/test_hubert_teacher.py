"""HuBERT trainings of ours as teachers."""

import pytest
import torch
from hubert_toys import FRONT, samples, write_teacher

from icefall_kd.config import TeacherConfig
from icefall_kd.frames import SSL_CONV
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.teachers.speech_ssl import SpeechSslTeacher
from tests.teachers.tiny_models import ssl_model

LENS = (8000, 6500, 300, 7001)


def teacher_of(folder, **options):
    return build_teacher(TeacherConfig(teacher=str(folder), teacher_device="cpu", **options))


@pytest.mark.parametrize(
    ("objective", "structure", "front_end"),
    [("ssl", "base", "waveform"), ("distil", "deep_thin", "fbank"), ("asr", "shallow_wide", "waveform")],
)
def test_every_training_of_it_is_a_teacher_of_all_its_layers(tmp_path, objective, structure, front_end):
    ssl = {"front_end": front_end, **FRONT}
    clusters = 7 if objective == "ssl" else 0
    encoder = write_teacher(tmp_path, clusters, objective, structure=structure, ssl=ssl)
    if front_end == "fbank":
        encoder.subsampling.cmvn_std.fill_(1.0)
    teacher = teacher_of(tmp_path)
    depth = encoder.num_layers
    wanted = list(range(depth + 1))
    names = teacher.tap(wanted)
    assert names == [*(f"layer{i}" for i in range(depth)), "embeddings"]
    batch = samples(LENS)
    found = teacher.extract(batch)
    lens = [SSL_CONV.num_frames(n) for n in LENS]
    assert found.lens["embeddings"].tolist() == lens == [teacher.num_frames(n) for n in LENS] and lens[2] == 0
    for row, (samples_there, frames) in enumerate(zip(LENS, lens, strict=True)):
        if not frames:
            continue
        with torch.no_grad():
            alone = encoder(
                batch.audio[row : row + 1, :samples_there], torch.tensor([samples_there]), taps=tuple(wanted)
            )
        for i, name in enumerate(names):
            torch.testing.assert_close(found.arrays[name][row, :frames], alone.taps[i][0], rtol=1e-4, atol=1e-5)
            assert not found.arrays[name][row, frames:].any()
    provenance = teacher.provenance()
    assert (
        provenance["family"] == "hubert" and provenance["layer"] == depth and "H[0]" in provenance["layer_convention"]
    )
    assert provenance["weights_sha256"] == teacher_of(tmp_path, layer=1).provenance()["weights_sha256"]


def test_fithubert_gives_a_frame_for_each_pair(tmp_path):
    write_teacher(tmp_path, 0, "distil", structure="fithubert")
    teacher = teacher_of(tmp_path)
    found = teacher.extract(samples((8320, 6720)))
    assert found.lens["embeddings"].tolist() == [13, 10] == [teacher.num_frames(n) for n in (8320, 6720)]


def test_layer_0_is_what_transformers_calls_so():
    model = ssl_model("hubert", feat_extract_norm="group", stable=False)
    precision = Precision(device=torch.device("cpu"))
    teacher = SpeechSslTeacher(
        model, normalize_audio=False, precision=precision, identity={"teacher": "toy", "weights_sha256": "0"}
    )
    assert teacher.tap([0, 2, -1]) == ["layer0", "layer2", "embeddings"]
    batch = samples((8000,))
    with torch.no_grad():
        expected = model(batch.audio, output_hidden_states=True).hidden_states
    found = teacher.extract(batch).arrays
    for i, name in ((0, "layer0"), (2, "layer2"), (3, "embeddings")):
        torch.testing.assert_close(found[name][0], expected[i][0], rtol=1e-5, atol=1e-5)
