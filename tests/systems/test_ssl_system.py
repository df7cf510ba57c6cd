"""Self-supervised training in one and in two modes."""

import dataclasses
import logging
import math

import pytest
import torch
from ssl_toys import ssl_batch, ssl_config

from icefall_kd.config import AugmentConfig
from icefall_kd.errors import ConfigError
from icefall_kd.models.dual import DualNorm
from icefall_kd.systems import build_system
from icefall_kd.systems.ssl import SslSystem
from icefall_kd.train.guards import parameters_without_gradient

DUAL = {"modes": "dual"}


def build(**options) -> SslSystem:
    torch.manual_seed(0)
    return build_system(ssl_config(**options), 0)


def gradients(system) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}


def run(system, batch, step=0, seed=1):
    """Run forward and backward of all parts of a step; return terms by name, and the divisor of the gradients."""
    torch.manual_seed(seed)
    system.zero_grad()
    count = system.passes(batch, step)
    terms, metrics, frames = {}, {}, 0
    for part in [None] if count == 1 else range(count):
        found = system.losses(batch, step, part)
        found.total.backward()
        terms |= found.terms
        metrics |= found.metrics
        frames += found.frames
    return terms, metrics, frames


@pytest.mark.parametrize("front_end", ["fbank", "waveform"])
@pytest.mark.parametrize("modes", ["full", "streaming", "dual"])
def test_an_untrained_model_is_at_the_log_of_the_candidates(front_end, modes):
    # 100 negatives, as many codes as in the paper: few of them are equal.
    ssl = {"front_end": front_end, "extractor_channels": 16, "codebook_entries": 320, "target_dim": 256}
    system = build(ssl=ssl, dual={"modes": modes})
    terms, metrics, frames = run(system, ssl_batch(audio=True, lens=(400, 400)))
    names = ["full", "streaming"] if modes == "dual" else [modes]
    for mode in names:
        term = terms[f"{mode}_contrastive_loss"]
        assert term.value.item() / term.count == pytest.approx(math.log(101), abs=0.3)
        assert term.count == frames and term.per_utterance.sum() == pytest.approx(term.value.item(), rel=1e-5)
    assert not parameters_without_gradient(system)
    share, count = metrics["masked_share"]
    assert share == frames and 0.3 < share / count < 0.6


def test_the_total_is_the_sum_that_the_objective_names():
    system = build(dual=DUAL | {"streaming_scale": 0.5, "dual_kd_scale": 0.3, "lean": False})
    torch.manual_seed(1)
    found = system.losses(ssl_batch(), 0)
    value = {name: term.value.item() for name, term in found.terms.items()}
    expected = value["full_contrastive_loss"] + 0.5 * value["streaming_contrastive_loss"]
    expected += 0.1 * value["diversity_loss"] + 10 * value["feature_penalty"] + 0.3 * value["mode_kd_loss"]
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    assert 0 <= value["diversity_loss"] / found.frames < 1 and value["mode_kd_loss"] > 0


def test_both_modes_learn_to_find_their_targets():
    system = build(dual=DUAL, ssl={"num_negatives": 20, "diversity_scale": 1.0}, model={"dropout": 0.0})
    optimizer = torch.optim.Adam(system.parameters(), lr=0.003, betas=(0.9, 0.98))
    torch.manual_seed(0)
    # A sound lasts 15 encoder frames, of which a masked span hides 5: what surrounds it tells what is there.
    sounds = torch.randn(4, 7, 80).repeat_interleave(60, dim=1)[:, :400]
    batch = dataclasses.replace(ssl_batch(lens=(400,) * 4), features=-6 + 4 * sounds + torch.randn(4, 400, 80))
    losses, wins = [], []
    for step in range(80):
        terms, metrics, frames = run(system, batch, step, seed=step)
        for p in system.parameters():
            p.grad /= frames
        optimizer.step()
        losses.append([terms[f"{m}_contrastive_loss"].value.item() / frames for m in ("full", "streaming")])
        wins.append([float(metrics[f"{m}_acc"][0]) / frames for m in ("full", "streaming")])
    losses, wins = torch.tensor(losses), torch.tensor(wins)
    assert (losses[-5:].mean(dim=0) < losses[:5].mean(dim=0) - 1.0).all()
    assert (wins[:5].mean(dim=0) < 0.2).all() and (wins[-5:].mean(dim=0) > 0.4).all()
    assert metrics["code_perplexity"][0] > 20


@pytest.mark.parametrize("detach", [False, True])
def test_lean_and_joint_order_have_equal_losses_and_gradients(detach):
    results = []
    for lean in (True, False):
        system = build(dual=DUAL | {"lean": lean, "dual_kd_scale": 0.5}, ssl={"detach_targets": detach})
        terms, _, frames = run(system, ssl_batch(), step=3)
        results.append(({n: t.value.item() for n, t in terms.items()}, frames, gradients(system)))
    (terms, frames, lean), (joint_terms, joint_frames, joint) = results
    assert terms == pytest.approx(joint_terms, rel=1e-6) and frames == joint_frames
    assert lean.keys() == joint.keys() == dict(system.named_parameters()).keys()
    for name, grad in joint.items():
        torch.testing.assert_close(lean[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()) + 1e-9)


def test_both_modes_share_frames_targets_and_negatives(monkeypatch):
    import icefall_kd.systems.ssl as module

    seen, logits = [], module.contrastive_logits

    def note(context, targets, codes, negatives, temperature):
        seen.append((targets.detach(), codes, negatives))
        return logits(context, targets, codes, negatives, temperature)

    monkeypatch.setattr(module, "contrastive_logits", note)
    run(build(dual=DUAL), ssl_batch())
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_detached_targets_get_nothing_of_the_streaming_mode():
    quantizer = {}
    for name, dual, detach in (("both", DUAL, True), ("full", {"modes": "full"}, False), ("joined", DUAL, False)):
        system = build(dual=dual, ssl={"detach_targets": detach}, model={"dropout": 0.0})
        run(system, ssl_batch())
        quantizer[name] = system.model.quantizer.codebooks.grad
    torch.testing.assert_close(quantizer["both"], quantizer["full"])
    assert (quantizer["joined"] - quantizer["full"]).abs().max() > 1e-4


def test_the_full_mode_alone_is_the_full_half_of_both():
    values = []
    for modes in ("full", "dual"):
        terms, _, _ = run(build(dual={"modes": modes}), ssl_batch())
        values.append([terms[n].value.item() for n in ("full_contrastive_loss", "diversity_loss", "feature_penalty")])
    assert values[0] == values[1]


def test_the_streaming_mode_of_an_untrained_model_hears_less():
    # The same weights and norms, no dropout: only the chunk mask tells the modes apart.
    system = build(dual=DUAL, model={"dropout": 0.0})
    terms, _, _ = run(system, ssl_batch())
    assert terms["full_contrastive_loss"].value != terms["streaming_contrastive_loss"].value
    wide = build(dual=DUAL, model={"dropout": 0.0, "chunk_size": [500], "left_context_frames": [-1]})
    terms, _, _ = run(wide, ssl_batch())
    torch.testing.assert_close(terms["full_contrastive_loss"].value, terms["streaming_contrastive_loss"].value)


def test_sampled_modes_leave_no_parameter_without_a_gradient():
    system = build(dual=DUAL | {"sampled_mode": True})
    seen = set()
    for seed in range(8):
        terms, _, _ = run(system, ssl_batch(), seed=seed)
        modes = [name for name in terms if name.endswith("contrastive_loss")]
        assert len(modes) == 1 and not parameters_without_gradient(system)
        other = "full" if modes[0].startswith("streaming") else "streaming"
        for module in system.modules():
            if isinstance(module, DualNorm):
                assert not getattr(module, other).weight.grad.any()
        seen |= set(modes)
    assert len(seen) == 2


def test_the_temperature_reaches_its_floor_at_a_share_of_the_steps():
    system = build(ssl={"gumbel_start": 2.0, "gumbel_end": 0.5, "gumbel_end_step": 0.5})
    assert system.needs_plan
    system.plan(20)
    found = []
    for step in (0, 5, 10, 15):
        torch.manual_seed(0)
        found.append(system.train().losses(ssl_batch(), step).metrics["gumbel_temperature"][0])
    assert found == pytest.approx([2.0, 1.0, 0.5, 0.5])


def test_masked_weights_serve_the_streaming_mode_alone():
    dual = DUAL | {"sparsity": 0.7, "prune_end_step": 0, "mask_interval": 1}
    values = []
    for refresh in (False, True):
        system = build(dual=dual, model={"dropout": 0.0})
        if refresh:
            figures = system.after_step(0)
            assert figures["sparsity"] == pytest.approx(0.7, abs=0.01)
        terms, _, _ = run(system, ssl_batch())
        values.append({n: t.value.item() for n, t in terms.items()})
        assert not parameters_without_gradient(system)
    assert values[0]["full_contrastive_loss"] == values[1]["full_contrastive_loss"]
    assert values[0]["streaming_contrastive_loss"] != values[1]["streaming_contrastive_loss"]


def test_padding_changes_nothing():
    system = build(model={"dropout": 0.0}).eval()
    batch = ssl_batch(lens=(160, 160))
    wide = torch.nn.functional.pad(batch.features, (0, 0, 0, 40), value=99.0)
    alone, padded = (system.losses(x, 0).terms for x in (batch, dataclasses.replace(batch, features=wide)))
    for name, term in alone.items():
        torch.testing.assert_close(padded[name].value, term.value, rtol=1e-4, atol=1e-4)


def test_validation_masks_the_same_frames_again_and_training_others():
    system = build(model={"dropout": 0.0})
    with torch.no_grad():
        trained = [float(system.losses(ssl_batch(), 0).total) for _ in range(2)]
        system.eval()
        found = []
        for seed in (3, 4):
            batch = ssl_batch()
            torch.manual_seed(seed)
            found.append(float(system.losses(batch, 0).total))
    assert found[0] == found[1]
    assert trained[0] == trained[1]  # ssl_batch seeds the generator
    with torch.no_grad():
        system.train()
        batch = ssl_batch()
        assert len({float(system.losses(batch, 0).total) for _ in range(3)}) == 3


def test_an_unusual_first_loss_and_equal_modes_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        run(build(ssl={"codebook_entries": 320, "target_dim": 256}), ssl_batch(lens=(400, 400)))
        assert not caplog.records
        run(build(ssl={"contrast_temperature": 0.001}), ssl_batch())
        assert "ln(1 + --num-negatives) = 4.615" in caplog.text
        caplog.clear()
        system = build(ssl={"codebook_entries": 320, "target_dim": 256})
        with torch.no_grad():
            system.model.quantizer.choice.bias[0] += 1000.0
            system.model.quantizer.choice.bias[320] += 1000.0
        run(system, ssl_batch(), step=1000)
        assert "code perplexity is down to 2.0 of 640 at step 1000" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": AugmentConfig()}, "--spec-aug false"),
        ({"ssl": {"front_end": "waveform", "extractor_norm": "default"}, "dual": DUAL}, "use layer_norm"),
        ({"ssl": {"detach_targets": True}}, "nothing would train the quantiser"),
        ({"ssl": {"target_dim": 33}}, "multiple of --codebook-groups 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    augment = options.pop("augment", None)
    with pytest.raises(ConfigError, match=message):
        config = ssl_config(**options)
        build_system(dataclasses.replace(config, augment=augment or config.augment), 0)
