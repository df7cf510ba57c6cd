"""Students of a HuBERT teacher: what they compare with, which frames count, and who learns in which stage."""

import dataclasses
import math
import types
from pathlib import Path

import pytest
import torch
from hubert_toys import hubert_config, samples, write_cmvn, write_teacher

from icefall_kd.config import AugmentConfig, HubertConfig, HubertKdConfig, SslConfig, TrainConfig
from icefall_kd.data.batch import Batch, Labels
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.models.hubert_heads import ExpandLast, LayerWise, teacher_layers
from icefall_kd.systems import build_system
from icefall_kd.systems.hubert_distil import HubertDistilSystem, Target, head_kind
from icefall_kd.systems.hubert_states import States, StoredStates
from icefall_kd.train.guards import parameters_without_gradient
from tests.teachers.tiny_models import ssl_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    write_teacher(folder)
    return folder


@pytest.fixture()
def front(tmp_path):
    return {"ssl": {"front_end": "fbank"}, "hubert": {"cmvn": write_cmvn(tmp_path / "cmvn.safetensors")}}


def build(teacher, **options) -> HubertDistilSystem:
    torch.manual_seed(0)
    return build_system(hubert_config(teacher=teacher, **options), 0)


def value(terms, name):
    return terms.terms[name].value.item() / terms.terms[name].count


def rows(found: States):
    """Yield utterance and frame of every state that counts."""
    return [(n, t) for n, length in enumerate(found.lens.tolist()) for t in range(length)]


@torch.no_grad()
def predictions(system, batch):
    """Return the predictions (N, n, T', D), the last hidden states and the teacher's states."""
    encoder = system.model.encoder
    x, lens = encoder.subsampling(batch.audio, batch.audio_lens)
    out = encoder.forward_embedded(x, lens, tuple(range(1, encoder.num_layers + 1)))
    head = system.heads["states"]
    predicted = head({i: out.taps[i] for i in head.taps(encoder.num_layers)}, x.shape[1])
    return predicted, out.encoder_out, system.target.source.states(batch, lens, x.shape[1])


@pytest.mark.parametrize("structure", ["deep_thin", "shallow_wide"])
@pytest.mark.parametrize("regression", ["l1", "l2"])
def test_regression_is_the_mean_over_frames_layers_and_channels(teacher, structure, regression):
    system = build(teacher, structure=structure, hubert_kd={"disc_scale": 0.0, "regression": regression}).eval()
    batch = samples()
    found = system.losses(batch, 0)
    predicted, _, states = predictions(system, batch)
    assert system.target.layers == [1, 2, 3] and isinstance(
        system.heads["states"], LayerWise if structure == "deep_thin" else ExpandLast
    )
    rec = cos = 0.0
    for n, t in rows(states):
        for i, layer in enumerate(system.target.layers):
            p, y = predicted[n, i, t].double(), states.layers[layer][n, t].double()
            rec += ((p - y).abs() if regression == "l1" else (p - y) ** 2).mean().item() / 3
            cos += math.log(1 + math.exp(-(p @ y / p.norm() / y.norm()).item())) / 3
    frames = len(rows(states))
    assert found.frames == frames == sum((n - 400) // 320 + 1 for n in (8000, 6500, 7001))
    assert value(found, "rec_loss") == pytest.approx(rec / frames, rel=1e-4)
    assert value(found, "cos_loss") == pytest.approx(cos / frames, rel=1e-4)
    assert found.total.item() == pytest.approx(rec + cos, rel=1e-4)
    assert sum(found.metrics[f"rec_H{i}"][0].item() for i in (1, 2, 3)) / 3 == pytest.approx(rec, rel=1e-4)


@pytest.mark.parametrize("kind", ["type1", "type2", "type3"])
@pytest.mark.parametrize("stage", ["front end", "all"])
def test_losses_are_float32_whatever_the_precision_of_the_student(teacher, front, kind, stage):
    options = {"disc_type": kind, "frontend_steps": 1}
    system = build(teacher, structure="deep_thin", **front, hubert_kd=options).train()
    with torch.autocast("cpu", torch.bfloat16):
        found = system.losses(samples(), 0 if stage == "front end" else 1)
    assert set(found.terms) == ({"frontend_loss"} if stage == "front end" else {"rec_loss", "cos_loss", "disc_loss"})
    for name, term in found.terms.items():
        assert term.value.dtype == term.per_utterance.dtype == torch.float32, name
        # The sums of its layers are the loss, to more digits than bfloat16 has.
        layers = [found.metrics[f"{name[:4]}H{i}"][0].item() for i in (1, 2, 3) if f"{name[:4]}H{i}" in found.metrics]
        assert not layers or term.value.item() == pytest.approx(sum(layers) / 3, rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["type1", "type2", "type3"])
def test_divergence_compares_with_the_teachers_clusters(teacher, kind, scaled):
    options = {"disc_type": kind, "disc_scale": 0.5, "disc_student_temperature": scaled, "disc_temperature": 0.2}
    system = build(teacher, hubert_kd=options)
    batch = samples()
    found = system.losses(batch, 0)
    _, hidden, states = predictions(system, batch)
    clusters, tau = system.target.clusters, 0.2 if scaled else 1.0
    embeddings = torch.nn.functional.normalize(clusters.label_embs.double(), dim=-1)
    total, right = 0.0, 0
    for n, t in rows(states):
        e = torch.nn.functional.normalize(clusters.final_proj(states.layers[3][n, t]).double(), dim=0)
        q = (embeddings @ e / 0.2).softmax(0)
        output = system.heads["clusters"](hidden[n, t]).double()
        logits = output if kind == "type2" else embeddings @ torch.nn.functional.normalize(output, dim=0)
        p = (logits / tau).softmax(0)
        total += (-p[q.argmax()].log() if kind == "type3" else (q * (q / p).log()).sum()).item()
        right += int(p.argmax() == q.argmax())
    assert found.terms["disc_loss"].value.item() == pytest.approx(total, rel=1e-4)
    assert found.metrics["cluster_acc"][0] == right
    named = {n: t.value * t.scale for n, t in found.terms.items()}
    assert found.total.item() == pytest.approx(sum(v.item() for v in named.values()), rel=1e-5)
    assert named["disc_loss"].item() == pytest.approx(0.5 * total, rel=1e-4)
    found.total.backward()
    assert not parameters_without_gradient(system)
    assert all(p.grad is None for p in clusters.parameters())


def test_clusters_alone_need_no_heads_of_states(teacher):
    alone = {"rec_scale": 0.0, "cos_scale": 0.0}
    system = build(teacher, hubert_kd=alone, model={"num_encoder_layers": 2})  # whatever the depths
    found = system.losses(samples(), 0)
    assert set(found.terms) == {"disc_loss"} and set(system.heads) == {"clusters"}
    assert list(system.target.source.states(samples(), torch.tensor([24, 20, 21]), 24).layers) == [3]
    found.total.backward()
    assert not parameters_without_gradient(system)


def test_padding_counts_only_where_it_is_asked_for(teacher):
    batch = samples((8000, 4000))
    system = build(teacher, hubert_kd={"disc_scale": 0.0}).eval()
    alone = [system.losses(samples((n,), seed), 0) for n, seed in ((8000, 0), (4000, 1))]
    together = system.losses(batch, 0)
    assert together.frames == sum(x.frames for x in alone) == 24 + 12
    assert together.total.item() == pytest.approx(sum(x.total.item() for x in alone), rel=1e-4)
    padded = build(teacher, hubert_kd={"disc_scale": 0.0, "pad_frames": True}).eval().losses(batch, 0)
    predicted, _, states = predictions(system, batch)
    assert padded.frames == 48
    # There, the teacher's states are 0, and the cosine to them counts as 0.
    assert not states.layers[1][1, 12:].any()
    more = predicted[1, :, 12:].abs().mean(dim=(0, 2)).sum().item()
    assert padded.terms["rec_loss"].value.item() == pytest.approx(together.terms["rec_loss"].value.item() + more, 1e-4)
    expected = together.terms["cos_loss"].value.item() + 12 * math.log(2)
    assert padded.terms["cos_loss"].value.item() == pytest.approx(expected, rel=1e-4)


def test_a_thin_student_compares_its_layer_i_with_the_output_of_the_teachers_layer_i(teacher):
    system = build(teacher, hubert_kd={"disc_scale": 0.0}).eval()

    class Numbered:
        def states(self, batch, lens, num_frames):
            return States({i: torch.full((len(lens), num_frames, 32), float(i)) for i in range(4)}, lens)

    system.target = dataclasses.replace(system.target, source=Numbered())
    with torch.no_grad():
        for i, head in enumerate(system.heads["states"].heads):
            head.weight.zero_()
            head.bias.fill_(i + 1)
    found = system.losses(samples(), 0)
    assert value(found, "rec_loss") == 0 and value(found, "cos_loss") == pytest.approx(0.3133, abs=5e-5)


def test_the_states_are_those_of_the_frozen_teacher_in_float32(teacher, tmp_path):
    encoder = write_teacher(tmp_path / "again")
    system = build(teacher, hubert_kd={"teacher_layers": [1, 2, 3]})
    batch = samples()
    lens = encoder.output_lens(batch.audio_lens)
    with torch.no_grad():
        out = encoder(batch.audio, batch.audio_lens, taps=(1, 2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = system.target.source.states(batch, lens, int(lens.max()))
    for i in (1, 2, 3):
        for n, length in enumerate(lens.tolist()):
            torch.testing.assert_close(states.layers[i][n, :length], out.taps[i][n, :length], rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="u0-1: the teacher has 20 frames, the student 19"):
        system.target.source.states(batch, lens - torch.tensor([0, 1, 0]), int(lens.max()))


def test_a_model_of_transformers_teaches_too(tmp_path):
    theirs = ssl_model("hubert", feat_extract_norm="group", stable=False)
    theirs.save_pretrained(tmp_path)
    system = build(tmp_path, hubert_kd={"disc_scale": 0.0})
    batch = samples((8000,))
    x, lens = system.model.encoder.subsampling(batch.audio, batch.audio_lens)
    states = system.target.source.states(batch, lens, x.shape[1])
    with torch.no_grad():
        expected = theirs(batch.audio, output_hidden_states=True).hidden_states
    for i in (1, 2, 3):
        torch.testing.assert_close(states.layers[i], expected[i], rtol=1e-4, atol=1e-4)
    assert system.losses(batch, 0).total.isfinite()
    with pytest.raises(ConfigError, match="has no clusters"):
        build(tmp_path)


def test_each_stage_trains_what_it_is_for(teacher, front):
    system = build(teacher, hubert_kd={"frontend_steps": 3, "frontend_scale": 2.0}, **front)
    names = {id(p): n for n, p in system.named_parameters()}
    for step in (0, 2, 3, 10):
        system.zero_grad()
        found = system.losses(samples(), step)
        found.total.backward()
        assert not parameters_without_gradient(system)
        learns = {n for n, p in system.named_parameters() if p.grad.abs().sum() > 0}
        frozen = {names[id(p)] for p in system.frozen(step)}
        assert not learns & frozen
        front_end = {n for n in names.values() if n.startswith(("model.encoder.subsampling.", "heads.front."))}
        if step < 3:
            assert set(found.terms) == {"frontend_loss"} and learns == front_end
            assert frozen == set(names.values()) - front_end
            assert found.total.item() == pytest.approx(2 * found.terms["frontend_loss"].value.item())
        else:
            assert set(found.terms) == {"rec_loss", "cos_loss", "disc_loss"}
            assert frozen == {"heads.front.weight", "heads.front.bias"}
            # Bias of the keys alone can be without effect: a softmax does not see it.
            assert {n for n in set(names.values()) - frozen - learns if "k_proj.bias" not in n} == set()
    assert system.heaviest_step(0) == 3 and system.heaviest_step(7) == 7


def test_the_first_stage_imitates_the_input_of_the_teachers_layers(teacher, front):
    system = build(teacher, hubert_kd={"frontend_steps": 0.25, "disc_scale": 0.0}, **front)
    assert system.needs_plan
    system.plan(8)
    batch = samples()
    found = system.losses(batch, 1)
    x, lens = system.model.encoder.subsampling(batch.audio, batch.audio_lens)
    states = system.target.source.states(batch, lens, x.shape[1])
    predicted = system.heads["front"](x)
    expected = sum((predicted[n, t] - states.layers[0][n, t]).abs().mean().item() for n, t in rows(states))
    assert found.total.item() == pytest.approx(expected, rel=1e-4)
    assert "rec_loss" in system.losses(batch, 2).terms
    valid = system.eval().losses(batch, 1)
    assert valid.terms["frontend_loss"].scale == 0 and {"rec_loss", "cos_loss"} < set(valid.terms)


def test_fithubert_is_a_configuration(teacher):
    kd = {"regression": "l2", "cos_scale": 0.0, "disc_scale": 0.0, "layer_scales": [0.1, 0.1, 1.0]}
    system = build(teacher, structure="fithubert", hubert_kd=kd)
    batch = samples((8000, 6720))  # 24 and 20 frames; 12 and 10 pairs
    found = system.losses(batch, 0)
    predicted, hidden, states = predictions(system, batch)
    assert hidden.shape[1] == 12 and predicted.shape[2] == 24
    expected = 0.0
    for n, t in rows(states):
        for i, weight in enumerate(kd["layer_scales"]):
            expected += weight * ((predicted[n, i, t] - states.layers[i + 1][n, t]) ** 2).mean().item()
    assert found.total.item() == pytest.approx(expected, rel=1e-4)
    found.total.backward()
    assert not parameters_without_gradient(system)
    odd = system.losses(samples((8320, 6500)), 0)  # 25 frames: the last has no partner
    assert odd.frames == 25 + 20 and odd.total.isfinite()


def test_heads_have_the_published_sizes():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in m.parameters()) for m in (ExpandLast(768, 768, 2), LayerWise(480, 768, 12))]
        one = LayerWise(480, 768, 1, upsample=True)
    assert [round(n / 1e6, 2) for n in sizes] == [2.36, 4.43]
    assert sum(p.numel() for p in one.parameters()) == 480 * 480 * 2 + 480 + 480 * 768 + 768
    assert teacher_layers("expand_last", None, 2, 12) == [4, 8, 12]
    assert teacher_layers("layer_wise", None, 12, 12) == list(range(1, 13))


@pytest.mark.parametrize(
    ("structure", "ssl", "hubert_kd", "size", "heads"),
    [
        # DistilHuBERT: 4, 8 and 12 of its teacher, one map to three times the width and three of its width.
        ("shallow_wide", {}, {}, 23_491_200, 768 * 2304 + 2304 + 3 * (768 * 768 + 768)),
        # The thin student of equal size, one map a layer.
        ("deep_thin", {"front_end": "fbank"}, {}, 19_107_008, 12 * (480 * 768 + 768)),
        (
            "fithubert",
            {},
            {"regression": "l2", "cos_scale": 0.0, "layer_scales": [0.1] * 11 + [1.0]},
            21_200_096,
            12 * (480 * 480 * 2 + 480 + 480 * 768 + 768),
        ),
    ],
)
def test_published_students_have_their_sizes(structure, ssl, hubert_kd, size, heads):
    config = TrainConfig(
        system="hubert",
        objective="distil",
        hubert=HubertConfig(structure=structure),
        ssl=SslConfig(**{"front_end": "waveform", "extractor_norm": "default", **ssl}),
        hubert_kd=HubertKdConfig(disc_scale=0.0, **hubert_kd),
        augment=AugmentConfig(spec_aug=False),
    )
    kind = head_kind(config)
    with torch.device("meta"):
        encoder = HubertEncoder(config.model, config.hubert, config.ssl)
        layers = teacher_layers(kind, None, encoder.num_layers, 12)
        teacher = types.SimpleNamespace(dim=768)
        system = HubertDistilSystem(config, encoder, Target(teacher, layers, 12, layers))
    assert layers == ([4, 8, 12] if structure == "shallow_wide" else list(range(1, 13)))
    assert sum(p.numel() for p in system.model.parameters()) == size
    assert sum(p.numel() for p in system.heads.parameters()) == heads


def test_learning_brings_the_student_to_its_teacher(teacher):
    system = build(teacher, hubert_kd={"disc_scale": 1.0})
    optimizer = torch.optim.Adam(system.parameters(), lr=0.01)
    found = []
    for step in range(30):
        optimizer.zero_grad()
        terms = system.losses(samples(), step)
        (terms.total / terms.frames).backward()
        optimizer.step()
        found.append({name: value(terms, name) for name in terms.terms})
    for name in ("rec_loss", "cos_loss", "disc_loss"):
        assert found[-1][name] < 0.9 * found[0][name], name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hubert_kd": {"frontend_steps": 5}}, "needs --front-end fbank"),
        ({"hubert_kd": {"teacher_layers": [1, 2]}}, "2 teacher layers for 3 student layers"),
        ({"hubert_kd": {"teacher_layers": [1, 2, 4]}}, "names layer 4; the teacher has 3"),
        ({"hubert_kd": {"layer_scales": [1.0]}}, "--layer-scales has 1 values for 3"),
        ({"model": {"num_encoder_layers": 2}}, "name the teacher layer of each with --teacher-layers"),
        ({"kd": {"teacher_labels": "stored"}, "hubert_kd": {"disc_scale": 0.0}}, "needs --label-dir"),
        ({"kd": {"kd": "mvq"}}, "--kd is of --system mvq"),
        ({"structure": "fithubert"}, "--disc-scale 0"),
        ({"hubert_kd": {"kd_quantizers": [Path("q.safetensors")]}}, "decode stored codes"),
        ({"ssl": {"mask_prob": 0.5}}, "--mask-prob is of"),
    ],
)
def test_options_that_do_not_fit_are_refused(teacher, options, message):
    with pytest.raises(ConfigError, match=message):
        build(teacher, **options)


def test_options_that_make_no_sense_are_refused(tmp_path):
    for options, message in (
        ({"rec_scale": 0.0, "cos_scale": 0.0, "disc_scale": 0.0}, "nothing to learn"),
        ({"teacher_layers": [0, 1]}, "from 1 on"),
        ({"disc_temperature": 0.0}, "--disc-temperature"),
        ({"frontend_steps": 2.5}, "--frontend-steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            HubertKdConfig(**options)
    write_teacher(tmp_path / "bare", clusters=0)
    with pytest.raises(ConfigError, match="has no clusters"):
        build(tmp_path / "bare")
    with pytest.raises(ConfigError, match="--disc-scale is of --system hubert --objective distil"):
        build_system(hubert_config("asr", hubert_kd={"disc_scale": 0.5}), 10)


def test_the_heads_are_left_out_of_what_goes_on(teacher):
    system = build(teacher)
    kept = system.inference_state_dict()
    assert kept and all(name.startswith("model.encoder.") for name in kept)
    assert not any("clusters.final_proj" in n or "label_embs" in n for n in system.state_dict())


def test_no_stored_set_has_other_frames_than_the_student_whatever_the_others_have():
    info = types.SimpleNamespace(dim=4, teacher_sha256="a")
    source = StoredStates({layer: (Path("x"), info) for layer in (1, 2)}, {})

    def states(first, second):
        counts = {"H1": first, "H2": second}
        labels = {name: Labels(torch.zeros(1, n, 4), torch.tensor([n])) for name, n in counts.items()}
        return source.states(Batch(ids=["one"], labels=labels), torch.tensor([5]), 5)

    assert states(5, 5).lens.tolist() == [5] and states(5, 0).lens.tolist() == [0]
    for wrong in ((6, 5), (5, 6), (4, 5), (0, 6)):
        with pytest.raises(DataError, match=r"utterance one: the teacher has \d frames, the student 5"):
            states(*wrong)
