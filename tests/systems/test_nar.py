"""The nar system: losses of teacher and student, and every distillation term against its formula."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from nar_toys import VOCAB, nar_config, toy_batch, toy_labels

from icefall_kd.config import AttentionDecoderConfig, RecogniserKdConfig
from icefall_kd.data.batch import NBest, TopK
from icefall_kd.errors import ConfigError
from icefall_kd.losses.masked_lm import draw_masks
from icefall_kd.systems import build_system
from icefall_kd.systems.nar import KD_LABELS, NarSystem, active_kd
from icefall_kd.train.guards import parameters_without_gradient

ALL = dict.fromkeys(KD_LABELS, 0.3)


def build(decoder="mlm", kd=None, teacher_dim=16, **options):
    torch.manual_seed(1)
    config = nar_config(decoder, **options)
    return NarSystem(config, VOCAB, kd, teacher_dim=teacher_dim).train()


def losses(system, batch, step=0, seed=7):
    torch.manual_seed(seed)
    return system(batch, step)


@pytest.mark.parametrize("decoder", ["ar", "mlm"])
@pytest.mark.parametrize("kd", [None, ALL], ids=["plain", "distilled"])
def test_every_parameter_gets_a_gradient(decoder, kd):
    if decoder == "ar" and kd:
        with pytest.raises(ConfigError, match="needs --attention-decoder mlm"):
            build_system(nar_config("ar", kd={"ctc_kd_scale": 0.1}), VOCAB)
        return
    system = build(decoder, kd)
    terms = losses(system, toy_labels(toy_batch()))
    terms.total.backward()
    assert parameters_without_gradient(system) == []
    assert all(p.grad.isfinite().all() for p in system.parameters())
    assert set(terms.terms) == {"ctc_loss", "att_loss" if decoder == "ar" else "mlm_loss"} | (
        {f"{name}_loss" for name in kd} if kd else set()
    )


@pytest.mark.parametrize("decoder", ["ar", "mlm"])
def test_a_batch_is_the_sum_of_its_utterances(decoder):
    system, batch = build(decoder).eval(), toy_batch()
    whole = system(batch, 0)
    parts = []
    for i in range(3):
        t, u = int(batch.x_lens[i]), int(batch.y_lens[i])
        one = dataclasses.replace(
            batch, ids=batch.ids[i : i + 1], features=batch.features[i : i + 1, :t], x_lens=batch.x_lens[i : i + 1],
            y=batch.y[i : i + 1, :u], y_lens=batch.y_lens[i : i + 1],
        )  # fmt: skip
        parts.append(system(one, 0))
    names = ["ctc_loss"] + (["att_loss"] if decoder == "ar" else [])  # masks are drawn batch by batch
    for name in names:
        total = sum(p.terms[name].value.item() for p in parts)
        assert whole.terms[name].value.item() == pytest.approx(total, rel=1e-4)
        each = [p.terms[name].value.item() for p in parts]
        assert whole.terms[name].per_utterance.tolist() == pytest.approx(each, rel=1e-4)


def test_the_teacher_predicts_each_token_and_the_end():
    system, batch = build("ar", attention={"label_smoothing": 0.0}).eval(), toy_batch()
    encoder_out, lens = system.encode(batch)
    memory = system.model.decoder.memory(encoder_out, lens)
    expected = 0.0
    for i, length in enumerate(batch.y_lens.tolist()):
        y = batch.y[i, :length].tolist()
        logits = system.model.decoder(
            torch.tensor([[1, *y]]), torch.tensor([length + 1]), memory.select(torch.tensor([i]))
        )
        expected += F.cross_entropy(logits[0], torch.tensor([*y, 1]), reduction="sum").item()
    found = system(batch, 0)
    assert found.terms["att_loss"].value.item() == pytest.approx(expected, rel=1e-4)
    assert (found.terms["att_loss"].count, found.terms["att_loss"].unit) == (sum([7, 4, 2]), "token")
    assert [found.terms[n].scale for n in ("ctc_loss", "att_loss")] == pytest.approx([0.3, 0.7])


def test_the_student_predicts_masked_tokens_alone():
    system, batch = build(attention={"label_smoothing": 0.0}), toy_batch()
    found = losses(system, batch)
    torch.manual_seed(7)
    masks = draw_masks(batch.y_lens, 6, "without_replacement")
    encoder_out, lens = system.encode(batch)
    logits = system.model.decoder(
        torch.where(masks, VOCAB - 1, batch.y), batch.y_lens, system.model.decoder.memory(encoder_out, lens)
    )
    expected = F.cross_entropy(logits[masks], batch.y[masks], reduction="sum")
    assert found.terms["mlm_loss"].value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.terms["mlm_loss"].count == int(masks.sum())
    # An unmasked token is input, not target.
    assert found.metrics["mlm_acc"][1] == float(masks.sum())


def test_several_draws_are_the_mean_of_as_many_trainings():
    batch = toy_labels(toy_batch())
    found = losses(build(kd={"token_kd": 0.3}, attention={"mask_draws": 3}), batch)
    torch.manual_seed(7)
    masks = draw_masks(batch.y_lens.repeat_interleave(3), 6, "without_replacement").unflatten(0, (3, 3))
    one = build(kd={"token_kd": 0.3})
    values = {"mlm_loss": 0.0, "token_kd_loss": 0.0}
    each = torch.zeros(3)
    for draw in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one, "_draw", lambda *_, draw=draw: masks[:, draw])
            terms = one(batch, 0).terms
        values = {name: value + terms[name].value.item() / 3 for name, value in values.items()}
        each += terms["mlm_loss"].per_utterance / 3
    assert {n: found.terms[n].value.item() for n in values} == pytest.approx(values, rel=1e-4)
    assert found.terms["mlm_loss"].count == pytest.approx(int(masks.sum()) / 3)
    torch.testing.assert_close(found.terms["mlm_loss"].per_utterance, each)


def test_validation_masks_are_the_same_every_time_and_draw_nothing():
    system, batch = build().eval(), toy_batch()
    first = system(batch, 0).terms["mlm_loss"].value
    state = torch.get_rng_state()
    assert torch.equal(system(batch, 5).terms["mlm_loss"].value, first)
    assert torch.equal(torch.get_rng_state(), state)


def kl(ids, probs, rest, logits):
    """Return the divergence of one frame over the named classes and the rest, in plain Python."""
    q = logits.double().softmax(0).tolist()
    terms = [(p, q[i]) for i, p in zip(ids.tolist(), probs.tolist(), strict=True)]
    terms.append((rest.item(), 1 - sum(x for _, x in terms)))
    return sum(p * math.log(p / x) for p, x in terms if p > 0)


def test_frame_level_term_of_the_ctc_head():
    batch = toy_labels(toy_batch())
    system = build(kd={"ctc_kd": 0.5})
    term = losses(system, batch).terms["ctc_kd_loss"]
    encoder_out, lens = system.encode(batch)
    logits, labels = system.model.ctc_output(encoder_out), batch.labels["ctc_posteriors"]
    frames = [(i, t) for i in range(3) for t in range(int(lens[i]))]
    expected = [kl(labels.ids[i, t], labels.probs[i, t], labels.rest[i, t], logits[i, t]) for i, t in frames]
    assert term.value.item() == pytest.approx(sum(expected), rel=1e-4)
    # A mean over frames, times the tokens of the batch.
    assert term.value.item() * term.scale == pytest.approx(0.5 * 10 * sum(expected) / len(frames), rel=1e-4)
    assert (term.count, term.unit) == (len(frames), "frame")


def test_frames_of_a_sure_blank_count_less():
    batch = toy_labels(toy_batch())
    labels = batch.labels["ctc_posteriors"]
    ids, probs, rest = labels.ids.clone(), labels.probs.clone(), labels.rest.clone()
    ids[:, ::2], probs[:, ::2], rest[:, ::2] = torch.tensor([0, 5, 6, 7]), torch.tensor([0.995, 0, 0, 0]), 0.005
    batch = dataclasses.replace(batch, labels={**batch.labels, "ctc_posteriors": TopK(ids, probs, rest, labels.lens)})
    torch.manual_seed(1)
    system = NarSystem(nar_config(kd={"kd_blank_weight": 0.1}), VOCAB, {"ctc_kd": 1.0})
    term = losses(system, batch).terms["ctc_kd_loss"]
    encoder_out, lens = system.encode(batch)
    logits = system.model.ctc_output(encoder_out)
    total = weight = 0.0
    for i in range(3):
        for t in range(int(lens[i])):
            w = 0.1 if t % 2 == 0 else 1.0
            total, weight = total + w * kl(ids[i, t], probs[i, t], rest[i, t], logits[i, t]), weight + w
    assert term.value.item() == pytest.approx(total, rel=1e-4) and term.count == pytest.approx(weight)


def test_token_level_term_at_masked_tokens_without_special_classes():
    batch = toy_labels(toy_batch())
    system = build(kd={"token_kd": 0.5})
    term = losses(system, batch).terms["token_kd_loss"]
    torch.manual_seed(7)
    masks = draw_masks(batch.y_lens, 6, "without_replacement")
    encoder_out, lens = system.encode(batch)
    logits = system.model.decoder(
        torch.where(masks, VOCAB - 1, batch.y), batch.y_lens, system.model.decoder.memory(encoder_out, lens)
    )
    logits[..., [0, 1, VOCAB - 1]] = -math.inf
    labels = batch.labels["token_posteriors"]
    places = [tuple(x) for x in masks.nonzero().tolist()]
    expected = sum(kl(labels.ids[p], labels.probs[p], labels.rest[p], logits[p]) for p in places)
    assert term.value.item() == pytest.approx(expected, rel=1e-3)
    assert (term.count, term.scale, term.unit) == (len(places), 0.5, "token")


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_encoder_term(distance):
    batch = toy_labels(toy_batch())
    torch.manual_seed(1)
    system = NarSystem(nar_config(kd={"encoder_kd": distance}), VOCAB, {"encoder_kd": 0.5}, teacher_dim=16)
    term = losses(system, batch).terms["encoder_kd_loss"]
    encoder_out, lens = system.encode(batch)
    expected = []
    for i in range(3):
        for t in range(int(lens[i])):
            a, b = system.heads["encoder"](encoder_out[i, t]), batch.labels["embeddings"].values[i, t]
            cosine = 1 - (a @ b) / (a.norm() * b.norm())
            expected.append((cosine if distance == "cosine" else ((a - b) ** 2).mean()).item())
    assert term.value.item() == pytest.approx(sum(expected), rel=1e-4)
    assert term.scale == pytest.approx(0.5 * 10 / len(expected))
    assert not any(name.startswith("heads.") for name in system.inference_state_dict())


def test_sequence_level_terms_are_weighted_by_the_teachers_scores():
    batch = toy_labels(toy_batch())
    system = build(kd={"nbest_ctc": 0.5, "nbest_token": 0.25}, attention={"label_smoothing": 0.1})
    # The last utterance has 11 frames; its first hypothesis needs more, with a blank between equal tokens.
    nbest = batch.labels["nbest"]
    tokens = torch.cat([nbest.tokens, torch.zeros(3, 3, 5, dtype=torch.long)], dim=2)
    tokens[2, 0] = 4
    lens = nbest.lens.clone()
    lens[2, 0] = 7
    scores = nbest.scores.clone()
    scores[1, 2] = -math.inf
    batch = dataclasses.replace(batch, labels={"nbest": NBest(tokens, lens, scores)})
    found = losses(system, batch)
    encoder_out, encoder_lens = system.encode(batch)
    log_probs = system.model.ctc_output(encoder_out).log_softmax(2)
    e = [math.exp(s) for s in (-1.0, -1.5, -4.0)]
    weights = [[x / sum(e) for x in e], [e[0] / (e[0] + e[1]), e[1] / (e[0] + e[1]), 0],
               [0, e[1] / (e[1] + e[2]), e[2] / (e[1] + e[2])]]  # fmt: skip
    expected = 0.0
    for i in range(3):
        for j in range(3):
            if weights[i][j]:
                ctc = F.ctc_loss(
                    log_probs[i, : encoder_lens[i]].unsqueeze(1), tokens[i, j, : lens[i, j]].unsqueeze(0),
                    encoder_lens[i : i + 1], lens[i, j : j + 1], reduction="sum",
                )  # fmt: skip
                expected += weights[i][j] * ctc.item()
    term = found.terms["nbest_ctc_loss"]
    assert term.value.item() == pytest.approx(expected, rel=1e-4) and term.scale == 0.5
    torch.manual_seed(7)
    draw_masks(batch.y_lens, 6, "without_replacement")
    masks = draw_masks(lens.flatten(), 10, "without_replacement")
    memory = system.model.decoder.memory(encoder_out, encoder_lens)
    flat = tokens.flatten(0, 1)
    logits = system.model.decoder(torch.where(masks, VOCAB - 1, flat), lens.flatten(), memory)
    loss = F.cross_entropy(logits[masks], flat[masks], reduction="none")
    weight = torch.tensor(weights).flatten()[masks.nonzero()[:, 0]]
    term = found.terms["nbest_token_loss"]
    assert term.value.item() == pytest.approx((loss * weight).sum().item(), rel=1e-4)
    assert term.count == pytest.approx(float(weight.sum())) and term.scale == 0.25


def test_what_lies_behind_the_ends_changes_nothing():
    batch = toy_labels(toy_batch())
    system = build(kd=ALL)
    before = {n: t.value.item() for n, t in losses(system, batch).terms.items()}
    y = batch.y.clone()
    y[torch.arange(6) >= batch.y_lens[:, None]] = 5
    labels = dict(batch.labels)
    for kind in ("ctc_posteriors", "token_posteriors"):
        x = labels[kind]
        beyond = torch.arange(x.ids.shape[1]) >= x.lens[:, None]
        labels[kind] = TopK(x.ids, x.probs.masked_fill(beyond.unsqueeze(2), 0.2), x.rest, x.lens)
    values = labels["embeddings"].values.clone()
    values[torch.arange(values.shape[1]) >= labels["embeddings"].lens[:, None]] = math.nan
    labels["embeddings"] = dataclasses.replace(labels["embeddings"], values=values)
    after = losses(system, dataclasses.replace(batch, y=y, labels=labels)).terms
    assert {n: t.value.item() for n, t in after.items()} == pytest.approx(before, rel=1e-6)


def test_utterances_without_labels_are_left_out_of_distillation():
    batch = toy_labels(toy_batch())
    system = build(kd=ALL)
    labels = {}
    for kind, x in batch.labels.items():
        if kind == "nbest":
            scores = x.scores.clone()
            scores[1] = -math.inf
            labels[kind] = NBest(x.tokens, x.lens, scores)
        else:
            labels[kind] = dataclasses.replace(x, lens=x.lens * torch.tensor([1, 0, 1]))
    found = losses(system, dataclasses.replace(batch, labels=labels)).terms
    for name in ALL:
        each = found[f"{name}_loss"].per_utterance
        assert each[1] == 0 and (each[[0, 2]] > 0).all(), name
    none = {k: dataclasses.replace(x, lens=x.lens * 0) if k != "nbest" else NBest(x.tokens, x.lens, x.scores - math.inf)
            for k, x in batch.labels.items()}  # fmt: skip
    total = losses(system, dataclasses.replace(batch, labels=none)).total
    assert total.isfinite()


def test_distillation_grows_over_its_warm_up():
    batch = toy_labels(toy_batch())
    torch.manual_seed(1)
    system = NarSystem(nar_config(kd={"kd_warm_step": 10}), VOCAB, {"nbest_ctc": 0.5, "token_kd": 0.2})
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        terms = losses(system, batch, step).terms
        assert terms["nbest_ctc_loss"].scale == pytest.approx(0.5 * share)
        assert terms["token_kd_loss"].scale == pytest.approx(0.2 * share)


@pytest.mark.parametrize("name", KD_LABELS)
def test_a_warm_up_begins_with_a_gradient_of_every_parameter(name):
    """A training refuses parameters without a gradient in its first step, and DDP does in any."""
    torch.manual_seed(1)
    system = NarSystem(nar_config(kd={"kd_warm_step": 10}), VOCAB, {name: 0.5}, teacher_dim=16).train()
    terms = losses(system, toy_labels(toy_batch()), 0)
    terms.total.backward()
    assert parameters_without_gradient(system) == []
    plain = build()
    losses(plain, toy_batch(), 0).total.backward()
    for (n, p), (_, q) in zip(plain.named_parameters(), system.named_parameters(), strict=False):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-12, msg=n)  # which does not count yet


def test_distillation_changes_nothing_at_inference():
    torch.manual_seed(1)
    plain = NarSystem(nar_config(), VOCAB)
    torch.manual_seed(1)
    distilled = NarSystem(nar_config(), VOCAB, ALL, teacher_dim=16)
    state, other = plain.state_dict(), distilled.inference_state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in state)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_frames():
    system = build(kd={"ctc_kd": 1.0})
    batch = toy_batch()
    encoder_out, lens = system.encode(batch)
    probs = system.model.ctc_output(encoder_out).softmax(2).detach()
    values, ids = probs.sort(dim=2, descending=True)
    labels = TopK(ids, values, torch.zeros(probs.shape[:2]), lens)
    system.zero_grad()
    term = losses(system, dataclasses.replace(batch, labels={"ctc_posteriors": labels})).terms["ctc_kd_loss"]
    assert abs(term.value.item()) < 1e-4
    term.value.backward()
    assert max(p.grad.abs().max().item() for p in system.parameters() if p.grad is not None) < 1e-5


def test_options_that_make_no_sense_are_refused(tmp_path):
    assert active_kd(RecogniserKdConfig(ctc_kd_scale=0.1, nbest_ctc_scale=0.2)) == {"ctc_kd": 0.1, "nbest_ctc": 0.2}
    with pytest.raises(ConfigError, match=r"--ctc-kd-scale: one label set of kind ctc_posteriors is needed"):
        build_system(nar_config(kd={"ctc_kd_scale": 0.1}), VOCAB)
    for name, value in (("kd", "mvq"), ("kd_delay", 2), ("kd_layer", [1]), ("kd_scale", [0.5])):
        with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} is of --system mvq"):
            build_system(nar_config(labels={name: value}), VOCAB)
    for options, message in (({}, "--ctc-kd-scale is of --system nar"), ({"kd": "l2"}, "--ctc-kd-scale is of")):
        config = dataclasses.replace(nar_config(kd={"ctc_kd_scale": 0.1}, labels=options), system="mvq")
        with pytest.raises(ConfigError, match=message):
            build_system(config, VOCAB)
    for name, value in (("ctc_weight", 0.0), ("ctc_weight", 1.0), ("label_smoothing", 1.0), ("decoder_dropout", -0.1)):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is"):
            AttentionDecoderConfig(**{name: value})
    for name in ("kd_temperature", "nbest_temperature"):
        with pytest.raises(ConfigError, match="must be above 0"):
            RecogniserKdConfig(**{name: 0.0})
