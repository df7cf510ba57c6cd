import json

import pytest
import torch

from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.frames import SSL_CONV
from icefall_kd.teachers.pretrained import Precision
from icefall_kd.teachers.speech_ssl import SpeechSslTeacher, normalize_audio
from tests.teachers.tiny_models import ssl_model

CPU = Precision(device=torch.device("cpu"))
IDENTITY = {"teacher": "tiny", "source": "random", "weights_sha256": "0"}
LENGTHS = (6000, 399, 16001, 400, 16000, 9999, 6000, 0, 15700)
# (family, norm of the convolutions, pre-norm blocks); data2vec has neither choice.
VARIANTS = [
    *((family, n, s) for family in ("hubert", "wavlm", "wav2vec2") for n in ("group", "layer") for s in (False, True)),
    ("data2vec-audio", "layer", False),
]


def make(model, **options) -> SpeechSslTeacher:
    return SpeechSslTeacher(model, precision=CPU, identity=IDENTITY, **options)


def waves(lengths=LENGTHS):
    return [0.3 * torch.randn(n) + 0.05 for n in lengths]


@pytest.mark.parametrize(("family", "norm", "stable"), VARIANTS)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw_audio", "normalized_audio"])
def test_alone_equals_in_a_padded_batch(family, norm, stable, normalize):
    teacher = make(ssl_model(family, feat_extract_norm=norm, stable=stable), normalize_audio=normalize)
    audio = waves()
    whole = teacher.extract(Batch.from_audio(audio))
    embeddings, lens = whole.arrays["embeddings"], whole.lens["embeddings"]
    assert lens.tolist() == [SSL_CONV.num_frames(n) for n in LENGTHS]
    for i, wave in enumerate(audio):
        alone = teacher.extract(Batch.from_audio([wave]))
        count = int(lens[i])
        assert alone.lens["embeddings"].tolist() == [count]
        assert alone.arrays["embeddings"].shape == (1, count, teacher.dim)
        assert not embeddings[i, count:].any()
        if count:
            difference = (embeddings[i, :count] - alone.arrays["embeddings"][0]).abs().max()
            assert difference <= 1e-5 * alone.arrays["embeddings"].abs().max(), i


def test_padding_would_change_a_group_norm_model_run_naively():
    # The trap is real: without the grouping by length the equality above does not hold.
    model = ssl_model("hubert", feat_extract_norm="group", stable=False)
    teacher = make(model)
    audio = waves((6000, 16000))
    alone = teacher.extract(Batch.from_audio(audio[:1])).arrays["embeddings"]
    teacher.equal_lengths_only = False
    naive = teacher.extract(Batch.from_audio(audio)).arrays["embeddings"][:1, : alone.shape[1]]
    assert (naive - alone).abs().max() > 1e-3 * alone.abs().max()


def test_padding_would_enter_the_positional_convolutions_of_data2vec():
    teacher = make(ssl_model("data2vec-audio", feat_extract_norm="layer", stable=False))
    audio = waves((6000, 16000))
    alone = teacher.extract(Batch.from_audio(audio[:1])).arrays["embeddings"]
    for conv in teacher.model.encoder.pos_conv_embed.layers:
        conv._forward_pre_hooks.clear()
    naive = teacher.extract(Batch.from_audio(audio)).arrays["embeddings"][:1, : alone.shape[1]]
    assert (naive - alone).abs().max() > 1e-3 * alone.abs().max()


@pytest.mark.parametrize(("family", "stable"), [(f, s) for f, n, s in VARIANTS if n == "layer"])
def test_layers_are_block_outputs_before_any_final_norm(family, stable):
    reference = ssl_model(family, feat_extract_norm="layer", stable=stable)
    state = reference.state_dict()
    outputs = {}
    for i, block in enumerate(reference.encoder.layers, start=1):

        def keep(module, args, output, i=i):
            outputs[i] = output[0] if isinstance(output, tuple) else output

        block.register_forward_hook(keep)
    wave = waves((8000,))[0]
    with torch.no_grad():
        reference(normalize_audio(wave[None], torch.tensor([8000])))
    for layer in (1, 2, 3, -1):
        model = ssl_model(family, feat_extract_norm="layer", stable=stable)
        model.load_state_dict(state)
        teacher = make(model, layer=layer)
        expected = outputs[3 if layer == -1 else layer][0]
        got = teacher.extract(Batch.from_audio([wave])).arrays["embeddings"][0]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert len(teacher.model.encoder.layers) == teacher.layer == (3 if layer == -1 else layer)
        assert ("never applied" in teacher.provenance()["layer_convention"]) == stable


@pytest.mark.parametrize(("family", "stable"), [(f, s) for f, n, s in VARIANTS if n == "layer"])
def test_one_pass_gives_several_layers_which_are_hidden_states(family, stable):
    reference = ssl_model(family, feat_extract_norm="layer", stable=stable)
    wave = waves((8000,))[0]
    with torch.no_grad():
        hidden = reference(
            normalize_audio(wave[None], torch.tensor([8000])), output_hidden_states=True
        ).hidden_states
    assert len(hidden) == 4  # the first is the input of block 1
    teacher = make(reference)
    assert teacher.tap([1, 3, 2]) == ["layer1", "embeddings", "layer2"]
    out = teacher.extract(Batch.from_audio([wave, wave[:3000]]))
    for layer, name in ((1, "layer1"), (2, "layer2"), (3, "embeddings")):
        count = teacher.num_frames(8000)
        assert (out.arrays[name][0, :count] - hidden[layer][0]).abs().max() <= 1e-5 * hidden[layer].abs().max()
        assert out.lens[name].tolist() == [count, teacher.num_frames(3000)]
        assert not out.arrays[name][1, teacher.num_frames(3000) :].any()
    with pytest.raises(ConfigError, match="cut there, has blocks 1 to 3"):
        teacher.tap([4])


def test_a_position_batch_norm_keeps_the_equality():
    model = ssl_model("hubert", feat_extract_norm="layer", stable=False, conv_pos_batch_norm=True)
    with torch.no_grad():
        model.encoder.pos_conv_embed.batch_norm.running_mean.normal_()
    teacher = make(model)
    audio = waves((6000, 16000))
    alone = teacher.extract(Batch.from_audio(audio[:1])).arrays["embeddings"]
    batch = teacher.extract(Batch.from_audio(audio)).arrays["embeddings"][:1, : alone.shape[1]]
    assert (batch - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_audio_is_normalized_over_valid_samples():
    audio = waves((500, 2000))
    batch = Batch.from_audio(audio)
    out = normalize_audio(batch.audio, batch.audio_lens)
    for wave, row in zip(audio, out, strict=True):
        expected = (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + 1e-7)
        assert torch.allclose(row[: len(wave)], expected, atol=1e-5)
        assert not row[len(wave) :].any()


def test_garbage_beyond_the_end_is_not_heard():
    teacher = make(ssl_model("wav2vec2", feat_extract_norm="layer", stable=True))
    batch = Batch.from_audio(waves((4000, 6000)))
    clean = teacher.extract(batch).arrays["embeddings"]
    batch.audio[0, 4000:] = 7.0
    assert torch.equal(teacher.extract(batch).arrays["embeddings"], clean)


def test_normalized_embeddings_have_unit_variance():
    teacher = make(ssl_model("hubert", feat_extract_norm="layer", stable=True), normalize_embeddings=True)
    frames = teacher.extract(Batch.from_audio(waves((8000,)))).arrays["embeddings"][0]
    assert torch.allclose(frames.mean(dim=1), torch.zeros(len(frames)), atol=1e-5)
    assert torch.allclose(frames.var(dim=1, correction=0), torch.ones(len(frames)), atol=1e-3)
    assert teacher.provenance()["normalization"] == "layer_norm_without_parameters"


@pytest.mark.parametrize(
    ("norm", "preprocessor", "expected"),
    [("layer", None, True), ("group", None, False), ("group", True, True), ("layer", False, False)],
)
def test_input_normalization_follows_the_preprocessor_file(tmp_path, norm, preprocessor, expected):
    ssl_model("hubert", feat_extract_norm=norm, stable=False).save_pretrained(tmp_path)
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": preprocessor}))
    teacher = SpeechSslTeacher.load(tmp_path, precision=CPU, identity=IDENTITY)
    assert teacher.normalize_audio is expected
    assert (teacher.provenance()["input_normalization"] == "none") is not expected


def test_a_layer_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="blocks 1 to 3"):
        make(ssl_model("hubert", feat_extract_norm="layer", stable=True), layer=4)


def test_a_batch_without_audio_is_refused():
    teacher = make(ssl_model("hubert", feat_extract_norm="layer", stable=True))
    with pytest.raises(DataError, match="audio"):
        teacher.extract(Batch(ids=["a"]))
