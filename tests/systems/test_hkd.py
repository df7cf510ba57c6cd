"""The hkd system: its losses against hand computations, what distillation reaches, and what it leaves alone."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hkd_toys import TEACHER_DIM, X_LENS, Y_LENS, hkd_batch, hkd_config, text_states
from nar_toys import VOCAB, nar_config, toy_batch

from icefall_kd.config import TextKdConfig, TrainConfig
from icefall_kd.data.batch import TextStates
from icefall_kd.data.filters import why_not
from icefall_kd.errors import ConfigError
from icefall_kd.systems import build_system
from icefall_kd.systems.hkd import HkdSystem, active_text_kd, add_end
from icefall_kd.train.guards import parameters_without_gradient
from icefall_kd.train.metrics import Tracker
from icefall_kd.train.optim import build_optimizer

BOTH = {"acd": 1.0, "lrd": 0.01}
U_LENS = [n + 1 for n in Y_LENS]  # with the end
TOKENS = sum(U_LENS)


def build(kd=None, seed=1, **options):
    torch.manual_seed(seed)
    return HkdSystem(hkd_config(**options), VOCAB, kd, teacher_dim=TEACHER_DIM).train()


def losses(system, batch, step=0, seed=7):
    torch.manual_seed(seed)
    return system(batch, step)


def tokens_of(batch, i):
    return [*batch.y[i, : int(batch.y_lens[i])].tolist(), 1]


def passes(system, batch):
    """Return c, logits and states of every utterance, one at a time, and the sums of its weights."""
    found = []
    for i, (t, u) in enumerate(zip(X_LENS, U_LENS, strict=True)):
        out = system.model.encoder(batch.features[i : i + 1, :t], torch.tensor([t]))
        fired = system.model.fire(out.encoder_out, out.encoder_out_lens, torch.tensor([u]))
        y_in = torch.tensor([[1, *tokens_of(batch, i)[:-1]]])
        logits, states = system.model.decoder(y_in, fired.c)
        found.append((out, fired.c[0], logits[0], states[0], fired.quantity.item()))
    return found


def test_the_end_is_a_token():
    y, lens = add_end(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([3, 1]), 1)
    assert y.tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]] and lens.tolist() == [4, 2]


def test_the_losses_are_what_their_formulas_say():
    system = build(BOTH, attention={"label_smoothing": 0.1}, text={"acd_temperature": 0.1, "acd_negatives": None})
    batch = hkd_batch()
    found = losses(system, batch)
    ce = ctc = quantity = lrd = 0.0
    projected, wanted = [], []
    for i, (out, c, logits, states, total) in enumerate(passes(system, batch)):
        target = torch.tensor(tokens_of(batch, i))
        log_p = logits.log_softmax(dim=1)
        spread = 0.1 / (VOCAB - 1)
        each = -(1 - 0.1 - spread) * log_p.gather(1, target[:, None]).squeeze(1) - spread * log_p.sum(dim=1)
        # Less the entropy of the smoothed label: a perfect prediction costs nothing.
        entropy = -0.9 * math.log(0.9) - 0.1 * math.log(spread)
        ce += (each.sum() - len(target) * entropy).item()
        quantity += abs(total - len(target))
        ctc_logits = system.model.ctc_output(out.encoder_out).log_softmax(dim=2).transpose(0, 1)
        ctc += F.ctc_loss(ctc_logits, target[None], out.encoder_out_lens, torch.tensor([len(target)]), 0, "sum").item()
        e = batch.labels["text_states"].values[i, : len(target)]
        lrd += (system.heads["lrd"](states) - e).square().sum().item()
        projected.append(system.heads["acd"](c))
        wanted.append(e)
    scores = F.normalize(torch.cat(projected), dim=1) @ F.normalize(torch.cat(wanted), dim=1).T / 0.1
    acd = F.cross_entropy(scores, torch.arange(TOKENS), reduction="sum").item()
    expected = {"ce_loss": ce, "quantity_loss": quantity, "ctc_loss": ctc, "acd_loss": acd, "lrd_loss": lrd}
    assert {name: term.value.item() for name, term in found.terms.items()} == pytest.approx(expected, rel=1e-4)
    total = ce + quantity + 0.5 * ctc + acd + 0.01 * lrd
    assert found.total.item() == pytest.approx(total, rel=1e-4)
    # The log and the gradients of AdamW are of a token.
    assert (found.frames, found.unit) == (TOKENS, "token")
    assert {(term.count, term.unit) for term in found.terms.values()} == {(TOKENS, "token")}
    right = (scores.argmax(dim=1) == torch.arange(TOKENS)).sum().item()
    assert found.metrics["acd_acc"] == (right, TOKENS)
    tracker = Tracker()
    tracker.add_terms(found)
    assert f"loss={total / TOKENS:.4g}/token" in str(tracker) and str(tracker).endswith(f"over {TOKENS} tokens")


def test_the_published_weights_are_the_defaults():
    config = TrainConfig(system="hkd")
    assert (config.cif.quantity_scale, config.cif.cif_ctc_scale, config.attention.label_smoothing) == (1.0, 0.5, 0.1)
    text = config.text_kd
    assert (text.acd_scale, text.acd_temperature, text.acd_negatives) == (1.0, 0.02, 700)
    assert (text.lrd_scale, text.lrd_reduction, text.text_kd) == (0.01, "sum", None)


@pytest.mark.parametrize("kd", [None, {"acd": 1.0}, {"lrd": 0.01}, BOTH], ids=str)
@pytest.mark.parametrize("lens", [None, [7, 0, 2], [0, 0, 0]], ids=["all", "some", "none"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_every_parameter_gets_a_finite_gradient(kd, lens, precision):
    """Even where no utterance of a batch has states, as on one of several ranks."""
    system = build(kd, cif={"quantity_warm_step": 10}, text={"standardise_text_states": True})
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        terms = losses(system, hkd_batch(lens=lens))
    terms.total.backward()
    assert parameters_without_gradient(system) == []
    assert all(p.grad.isfinite().all() for p in system.parameters())
    names = {"ce_loss", "quantity_loss", "ctc_loss"} | {f"{name}_loss" for name in kd or ()}
    assert set(terms.terms) == names
    assert all(math.isfinite(term.value.item() / term.count) for term in terms.terms.values())


def test_utterances_without_states_are_left_out_of_distillation_alone():
    text = {"acd_negatives": None}
    batch = hkd_batch(lens=[7, 0, 2])
    found = losses(build(BOTH, text=text), batch)
    assert found.terms["acd_loss"].count == found.terms["lrd_loss"].count == 9 and found.frames == TOKENS
    assert found.terms["lrd_loss"].per_utterance[1] == found.terms["acd_loss"].per_utterance[1] == 0
    # Nor are zero vectors anybody's negatives: the loss is that of the two others alone.
    pick = [0, 2]
    values = batch.labels["text_states"]
    fewer = dataclasses.replace(
        batch, ids=["u0", "u2"], features=batch.features[pick], x_lens=batch.x_lens[pick], y=batch.y[pick],
        y_lens=batch.y_lens[pick],
        labels={"text_states": TextStates(values.values[pick], values.lens[pick], values.owner[pick])},
    )  # fmt: skip
    other = losses(build(BOTH, text=text), fewer)
    for name in ("acd_loss", "lrd_loss"):
        assert found.terms[name].value.item() == pytest.approx(other.terms[name].value.item(), rel=1e-4)


@pytest.mark.parametrize(("name", "reaches_decoder"), [("acd", False), ("lrd", True)])
def test_what_distillation_reaches(name, reaches_decoder):
    system, batch = build({name: 1.0}), hkd_batch()
    term = losses(system, batch).terms[f"{name}_loss"]
    term.value.backward()
    grads = {n: p.grad is not None and bool(p.grad.any()) for n, p in system.named_parameters()}
    for part in ("model.encoder.front.conv.weight", "model.encoder.layers.1.norm.weight", "model.cif.conv.weight"):
        assert grads[part]
    decoder = {n for n, got in grads.items() if got and n.startswith("model.decoder.")}
    assert bool(decoder) == reaches_decoder and grads[f"heads.{name}.weight"]
    assert not any(got for n, got in grads.items() if "ctc_output" in n or "decoder.output" in n)


@pytest.mark.parametrize("standardised", [False, True])
def test_no_gradient_into_the_states_of_a_model(standardised):
    system, batch = build(BOTH, text={"standardise_text_states": standardised}), hkd_batch()
    states = batch.labels["text_states"]
    values = torch.nn.Parameter(states.values.clone())
    batch = dataclasses.replace(batch, labels={"text_states": dataclasses.replace(states, values=values)})
    losses(system, batch).total.backward()
    assert values.grad is None


def test_words_average_fired_vectors_and_take_the_last_state():
    owner = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 2, -100, -100, -100], [0, 1] + [-100] * 5])
    lens = torch.tensor([3, 3, 2])
    values = torch.randn(3, 3, TEACHER_DIM, generator=torch.Generator().manual_seed(5))
    batch = dataclasses.replace(hkd_batch(), labels={"text_states": TextStates(values, lens, owner)})
    system = build(BOTH, text={"acd_temperature": 0.1, "acd_negatives": None})
    found = losses(system, batch)
    words = [[[0, 1, 2], [3, 4, 5], [6]], [[0], [1, 2], [3]], [[0], [1]]]
    each, wanted, lrd = [], [], 0.0
    for i, (_, c, _, states, _) in enumerate(passes(system, batch)):
        for m, word in enumerate(words[i]):
            each.append(system.heads["acd"](c[word].mean(dim=0)))
            wanted.append(values[i, m])
            lrd += (system.heads["lrd"](states[word[-1]]) - values[i, m]).square().sum().item()
    scores = F.normalize(torch.stack(each), dim=1) @ F.normalize(torch.stack(wanted), dim=1).T / 0.1
    acd = F.cross_entropy(scores, torch.arange(8), reduction="sum").item()
    assert found.terms["acd_loss"].value.item() == pytest.approx(acd, rel=1e-4)
    assert found.terms["lrd_loss"].value.item() == pytest.approx(lrd, rel=1e-4) and found.terms["lrd_loss"].count == 8


def test_the_mean_over_channels():
    batch = hkd_batch()
    by_sum, by_mean = (
        losses(build(BOTH, text={"lrd_reduction": r}), batch).terms["lrd_loss"].value.item() for r in ("sum", "mean")
    )
    assert by_sum == pytest.approx(TEACHER_DIM * by_mean, rel=1e-5)


def test_the_fade_in_after_ctc_and_quantity():
    system, batch = build(BOTH, cif={"quantity_warm_step": 100}), hkd_batch()
    for step, share in ((0, 0.0), (25, 0.25), (100, 1.0), (1000, 1.0)):
        scales = {name: term.scale for name, term in losses(system, batch, step).terms.items()}
        expected = {"ce_loss": share, "acd_loss": share, "lrd_loss": 0.01 * share}
        assert scales == pytest.approx({**expected, "quantity_loss": 1.0, "ctc_loss": 0.5}, abs=1e-12)
    assert system.eval()(batch, 0).terms["ce_loss"].scale == 1.0


def train_steps(system, count=3):
    """Train on toy batches and return the parameters of the model."""
    config = dataclasses.replace(hkd_config())
    optimizer = build_optimizer(dataclasses.replace(config.optim, optimizer="adamw"), system)
    for step in range(count):
        optimizer.zero_grad()
        losses(system, hkd_batch(step), step, seed=step).total.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
    return system.model.state_dict()


def test_without_distillation_training_is_bit_equal_to_one_that_knows_none():
    """Nor do the heads change what the model starts from."""
    dropout = {"model": {"dropout": 0.1}, "attention": {"decoder_dropout": 0.1}, "cif": {"cif_dropout": 0.2}}
    text = {"text_kd": ["acd", "lrd"], "acd_scale": 0.0, "lrd_scale": 0.0}
    torch.manual_seed(1)
    silent = build_system(hkd_config(text=text, **dropout), VOCAB)
    plain, other = build(**dropout), build(BOTH, **dropout)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert len(silent.heads) == 0 and silent.label_specs == []
    # The batches differ in their labels alone: without distillation they are not looked at.
    ours, theirs = train_steps(plain), train_steps(silent.train())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with_kd = train_steps(other)
    assert not torch.equal(ours["encoder.front.conv.weight"], with_kd["encoder.front.conv.weight"])


def test_removing_the_heads_leaves_inference_bit_equal():
    system = build(BOTH, text={"standardise_text_states": True})
    train_steps(system, 2)
    bare = build_system(hkd_config(text={"text_kd": ["acd", "lrd"]}), VOCAB, inference=True)
    state = system.inference_state_dict()
    assert len(state) < len(system.state_dict()) and set(state) == set(bare.state_dict())
    bare.load_state_dict(state)
    batch = hkd_batch()
    results = []
    for one in (system.eval(), bare.eval()):
        with torch.no_grad():
            encoder_out, lens = one.encode(batch)
            out = one.model.fire(encoder_out, lens)
            y = torch.ones(3, out.c.shape[1], dtype=torch.int64)
            results.append((out.lens, out.c, one.model.ctc_output(encoder_out), *one.model.decoder(y, out.c)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_validation_scales_nothing_and_a_missing_token_costs_a_guess():
    system, batch = build(attention={"label_smoothing": 0.0}, cif={"cif_initial_rate": 0.2}).eval(), hkd_batch()
    terms = system(batch, 0)
    expected, missing, right = 0.0, 0, 0
    encoder_out, lens = system.encode(batch)
    out = system.model.fire(encoder_out, lens)
    for i, u in enumerate(U_LENS):
        target = tokens_of(batch, i)
        count = min(int(out.lens[i]), u)
        logits, _ = system.model.decoder(torch.tensor([[1, *target[:-1]]])[:, :count], out.c[i : i + 1, :count])
        expected += F.cross_entropy(logits[0], torch.tensor(target[:count]), reduction="sum").item()
        right += (logits[0].argmax(1) == torch.tensor(target[:count])).sum().item()
        missing += u - count
    assert missing > 0
    assert terms.terms["ce_loss"].value.item() == pytest.approx(expected + missing * math.log(VOCAB), rel=1e-4)
    assert terms.terms["ce_loss"].per_utterance.sum().item() == pytest.approx(expected + missing * math.log(VOCAB))
    assert terms.metrics["token_acc"] == (right, TOKENS)
    assert terms.metrics["length_acc"] == (int((out.lens == torch.tensor(U_LENS)).sum()), 3)
    assert set(terms.terms) == {"ce_loss", "quantity_loss", "ctc_loss"}


def test_too_many_fired_tokens_in_validation_are_cut():
    system, batch = build(cif={"cif_initial_rate": 0.97}).eval(), hkd_batch()
    terms = system(batch, 0)
    encoder_out, lens = system.encode(batch)
    assert (system.model.fire(encoder_out, lens).lens > torch.tensor(U_LENS)).any()
    assert terms.total.isfinite() and terms.metrics["token_acc"][1] == TOKENS


def test_filters_count_the_end_at_this_encoders_rate():
    keep = build().alignment_losses
    # 16 frames of 80 ms: 15 tokens and the end.
    frames = next(t for t in range(200) if keep["num_encoder_frames"](t) == 16)
    assert why_not([3 + i % 2 for i in range(15)], frames, **keep) is None
    assert "16 tokens and the end, 16 encoder frames" in why_not([3 + i % 2 for i in range(16)], frames, **keep)
    assert "with 14 repeats" in why_not([3] * 15, frames, **keep)
    assert why_not([3 + i % 2 for i in range(15)], frames - 1, **keep) is not None


def test_a_few_steps_learn_a_toy_by_heart():
    system = build(BOTH, text={"acd_temperature": 0.1, "acd_negatives": None})
    batch = hkd_batch()
    optimizer = torch.optim.AdamW(system.parameters(), lr=3e-3)
    first = losses(system, batch)
    for step in range(150):
        optimizer.zero_grad()
        terms = losses(system, batch, step)
        (terms.total / TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(system.parameters(), 1.0)
        optimizer.step()
    last = losses(system.train(), batch)
    assert last.metrics["token_acc"][0] == TOKENS and last.metrics["acd_acc"][0] == TOKENS
    assert last.metrics["length_acc"] == (3, 3)
    for name in ("ce_loss", "ctc_loss", "lrd_loss", "acd_loss", "quantity_loss"):
        assert last.terms[name].value < 0.2 * first.terms[name].value, name


def test_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--text-kd lrd: one label set of kind text_states is needed, --label-dir n"):
        build_system(hkd_config(text={"text_kd": ["lrd"]}), VOCAB)
    with pytest.raises(ConfigError, match="--mask-draws is of --system nar"):
        build_system(hkd_config(attention={"mask_draws": 2}), VOCAB)
    with pytest.raises(ConfigError, match="--teacher-labels online"):
        build_system(hkd_config(labels={"teacher_labels": "online"}), VOCAB)
    with pytest.raises(ConfigError, match="--text-kd is of --system hkd"):
        build_system(dataclasses.replace(nar_config(), text_kd=TextKdConfig(text_kd=["acd"])), VOCAB)
    with pytest.raises(ConfigError, match="--front-channels is of --system hkd"):
        build_system(dataclasses.replace(hkd_config(cif={"front_channels": 3}), system="mvq"), VOCAB)
    with pytest.raises(ConfigError, match="name each loss once"):
        TextKdConfig(text_kd=["acd", "acd"])
    assert active_text_kd(TextKdConfig(text_kd=["acd", "lrd"], acd_scale=0.0)) == {"lrd": 0.01}


def test_label_specs_name_the_set():
    torch.manual_seed(1)
    system = HkdSystem(hkd_config(), VOCAB, {"acd": 1.0}, path="labels/plm", teacher_dim=4)
    (spec,) = system.label_specs
    assert (spec.name, spec.kind, spec.path) == ("text_states", "text_states", "labels/plm")
    assert toy_batch().labels == {} and text_states().lens.tolist() == U_LENS
