"""The dual-mode recogniser: what each pass contributes, its variants, training, averaging and decoding."""

import dataclasses

import pytest
import torch
from dual_toys import MODEL, PRUNED, batch_of, dual_config, dual_system, train_dual
from nar_toys import VOCAB
from students import load, tokenizer_of, write_student

from icefall_kd.cli import config_from_dict, config_to_dict, parse_config
from icefall_kd.config import CifConfig, DecodeConfig, DualConfig, KdConfig, TextKdConfig, TrainConfig
from icefall_kd.decode.runner import build_decoder
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError
from icefall_kd.models.dual import DualNorm
from icefall_kd.models.pruning import block_mask, prunable_layers
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks
from icefall_kd.runtime.files import read_json
from icefall_kd.systems import build_system
from icefall_kd.train.average import average_checkpoints, load_for_decoding, load_trained
from icefall_kd.train.checkpoint import load_checkpoint, save_checkpoint
from icefall_kd.train.guards import parameters_without_gradient
from icefall_kd.train.metrics import read_metrics
from tests.train.toy import same_weights

SPARSE = {"sparsity": 0.5, "prune_end_step": 0}
LOSSES = ("simple_loss", "pruned_loss", "ctc_loss")


def gradients(system, step=5, part=None, seed=3):
    """Return losses and gradients of one batch, in as many passes as the system has; of one part alone if given."""
    system.zero_grad(set_to_none=True)
    batch, results = batch_of(), []
    count = system.passes(batch, step)
    torch.manual_seed(seed)
    for i in range(count):
        terms = system.losses(batch, step) if count == 1 else system.losses(batch, step, i)
        results.append(terms)
        if part is None or i == part:
            terms.total.backward()
    return results, {name: p.grad for name, p in system.named_parameters()}


@pytest.mark.parametrize(
    "dual",
    [{}, SPARSE | {"dual_kd_scale": 0.5}, SPARSE | {"dual_kd_scale": 0.5, "sandwich": True, "streaming_scale": 0.3}],
)
def test_the_lean_order_has_the_gradients_of_the_joint_one(dual):
    options = {"model": {"dropout": 0.1}}
    lean, joint = (dual_system(dual={**dual, "lean": lean}, **options) for lean in (True, False))
    passes = 3 if dual.get("sandwich") else 2
    assert lean.passes(batch_of(), 0) == passes and joint.passes(batch_of(), 0) == 1
    parts, by_parts = gradients(lean)
    (whole,), at_once = gradients(joint)
    assert whole.terms.keys() == {name for terms in parts for name in terms.terms}
    assert [terms.frames for terms in parts] == [whole.frames, *[0] * (passes - 1)]
    torch.testing.assert_close(sum(terms.total for terms in parts), whole.total)
    for name, gradient in at_once.items():
        torch.testing.assert_close(by_parts[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_masked_weights_learn_from_the_full_mode_alone():
    system = dual_system(dual={**SPARSE, "streaming_scale": 0.7})
    _, both = gradients(system)
    _, full = gradients(system, part=0)
    _, streaming = gradients(system, part=1)
    assert len(prunable_layers(system)) == 16
    for name, layer in prunable_layers(system).items():
        name = f"{name}.weight"
        torch.testing.assert_close(both[name], full[name] + streaming[name], rtol=1e-4, atol=1e-5)
        assert not streaming[name][~layer.mask].any() and full[name][~layer.mask].any()
        assert streaming[name][layer.mask].any()
    ste = dual_system(dual={**SPARSE, "prune_ste": True})
    _, streaming = gradients(ste, part=1)
    assert all(streaming[f"{n}.weight"][~layer.mask].any() for n, layer in prunable_layers(ste).items())


def test_the_total_weighs_both_modes_and_what_lies_between():
    dual = {**SPARSE, "streaming_scale": 0.7, "dual_kd_scale": 0.2, "dual_kd_warm_step": 10, "lean": False}
    system = dual_system(dual=dual, asr={"transducer_scale": 0.9, "ctc_scale": 0.3, "simple_loss_scale": 0.5})
    (result,), _ = gradients(system, step=5)
    value = {name: float(term.value.detach()) for name, term in result.terms.items()}
    nodes = result.terms["mode_lattice_kd_loss"].count
    asr = {m: 0.9 * (0.5 * value[f"{m}_simple_loss"] + value[f"{m}_pruned_loss"]) + 0.3 * value[f"{m}_ctc_loss"]
           for m in ("full", "streaming")}  # fmt: skip
    kd = 0.9 * value["mode_lattice_kd_loss"] * result.frames / nodes + 0.3 * value["mode_ctc_kd_loss"]
    assert float(result.total.detach()) == pytest.approx(asr["full"] + 0.7 * asr["streaming"] + 0.1 * kd, rel=1e-5)
    assert kd > 0 and result.frames == 29 + 21 + 11 + 16


def test_each_pass_leaves_the_norms_of_the_other_mode_alone():
    system = dual_system(dual={**SPARSE, "dual_kd_scale": 0.5})
    encoder = system.model.encoder
    full = [p for m in encoder.modules() if isinstance(m, DualNorm) for p in m.full.parameters()]
    streaming = [p for m in encoder.modules() if isinstance(m, DualNorm) for p in m.streaming.parameters()]
    gradients(system, part=0)
    assert all(p.grad is None for p in streaming) and any(p.grad.any() for p in full)
    gradients(system, part=1)  # with distillation: its teacher is the full mode
    assert all(not p.grad.any() for p in full) and any(p.grad.any() for p in streaming)
    before = system.losses(batch_of(), 5, 0).total
    with torch.no_grad():
        for p in streaming:
            p.add_(0.5)
        for layer in prunable_layers(system).values():
            layer.mask.logical_not_()
    assert torch.equal(system.losses(batch_of(), 5, 0).total, before)


def test_modes_that_are_equal_have_nothing_to_distil():
    model = {"chunk_size": [64], "left_context_frames": [-1]}
    system = dual_system(dual={"dual_kd_scale": 1.0, "lean": False}, model=model)
    terms = system.losses(batch_of(), 5).terms
    assert terms["mode_lattice_kd_loss"].value.abs() < 1e-3 and terms["mode_ctc_kd_loss"].value.abs() < 1e-3
    for name in LOSSES:
        torch.testing.assert_close(terms[f"full_{name}"].value, terms[f"streaming_{name}"].value)


def test_validation_is_of_both_modes_without_distillation_and_draws_nothing():
    system = dual_system(dual={**SPARSE, "dual_kd_scale": 1.0}).eval()
    state = torch.get_rng_state()
    terms = system.losses(batch_of(), 5)
    assert terms.terms.keys() == {f"{mode}_{name}" for mode in ("full", "streaming") for name in LOSSES}
    assert torch.equal(torch.get_rng_state(), state) and terms.frames == 77
    assert not torch.equal(terms.terms["full_ctc_loss"].value, terms.terms["streaming_ctc_loss"].value)


def test_a_sampled_step_trains_one_mode_and_misses_no_gradient():
    system = dual_system(dual={**SPARSE, "sampled_mode": True})
    seen = set()
    for seed in range(12):
        (result,), _ = gradients(system, seed=seed)
        seen.add(frozenset(name.split("_")[0] for name in result.terms))
        assert parameters_without_gradient(system) == [] and result.frames == 77
    assert seen == {frozenset({"full"}), frozenset({"streaming"})}


@pytest.mark.parametrize("mode", ["full", "streaming"])
def test_a_baseline_of_one_mode_has_its_losses_and_one_norm(mode):
    system = dual_system(dual={"modes": mode, **(SPARSE if mode == "streaming" else {})})
    (result,), _ = gradients(system)
    assert result.terms.keys() == {f"{mode}_{name}" for name in LOSSES}
    assert parameters_without_gradient(system) == []
    assert not any(isinstance(m, DualNorm) for m in system.modules())


def test_ctc_alone_and_a_transducer_alone():
    for asr, names in (({"transducer_scale": 0, "ctc_scale": 1}, {"ctc"}), ({"ctc_scale": 0}, {"simple", "pruned"})):
        system = dual_system(asr=asr, dual={**SPARSE, "dual_kd_scale": 0.3})
        parts, _ = gradients(system)
        wanted = {f"{mode}_{name}_loss" for mode in ("full", "streaming") for name in names}
        wanted.add("mode_ctc_kd_loss" if "ctc" in names else "mode_lattice_kd_loss")
        assert {name for p in parts for name in p.terms} == wanted
        assert parameters_without_gradient(system) == []


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_training_is_the_same_bit_by_bit(tmp_path, stop):
    # Masks change at steps 3 and 6; 2 stops before the first change, 4 behind it.
    options = {"dual": {**PRUNED, "dual_kd_scale": 0.1}, "model": {"dropout": 0.1}}
    whole, system = train_dual(tmp_path / "whole", **options)
    train_dual(tmp_path / "parts", loop={"max_steps": stop}, **options)
    result, resumed = train_dual(tmp_path / "parts", seed=8, **options)
    assert same_weights(system.state_dict(), resumed.state_dict())
    assert result["train_loss"] == whole["train_loss"] and result["valid"] == whole["valid"]
    assert int(resumed.model.encoder.mask_step) == 6 and whole["skipped_steps"] == 0
    for layer in prunable_layers(resumed).values():
        assert 0.4 < float(layer.mask.float().mean()) < 0.6 and (layer.weight != 0).all()
    records = read_metrics(tmp_path / "whole/log/metrics.jsonl", "train")
    figures = [record.get("figures", {}).get("sparsity") for record in records]
    # The cubic law at half of its ramp has 7/8 of the final sparsity.
    assert figures[:2] == [None, None]
    assert figures[2:] == pytest.approx([0.4375] * 3 + [0.5] * 3, abs=0.02)


def test_averages_across_changes_of_masks_are_refused(tmp_path):
    train_dual(tmp_path, dual={**PRUNED, "mask_freeze_step": 4})  # the masks change at step 3 of epoch 1 alone
    with pytest.raises(ConfigError, match=r"epoch-1.pt changed at step 3, behind step 0.*--mask-freeze-step"):
        load_for_decoding(tmp_path, epoch=1)
    state, _, _ = load_for_decoding(tmp_path, epoch=2)
    last = load_checkpoint(tmp_path / "epoch-2.pt")["model"]
    masks = [name for name in last if name.endswith(".mask")]
    assert masks and all(torch.equal(state[name], last[name]) for name in masks)
    files = [tmp_path / f"epoch-{i}.pt" for i in (1, 2)]
    assert average_checkpoints(files)[masks[0]].dtype == torch.bool
    other = tmp_path / "other"
    train_dual(other, dual=PRUNED)
    files = [other / f"epoch-{i}.pt" for i in (1, 2)]
    with pytest.raises(ConfigError, match=r"epoch-1.pt and .*epoch-2.pt have different masks"):
        average_checkpoints(files)
    assert load_trained(other)[2] == "epoch-2.pt"  # not averaged, with a warning


def test_shares_of_a_training_are_steps_of_it(tmp_path, caplog):
    # Two epochs of four batches, two a step: 4 steps are planned.
    loop = {"accum_grad": 2, "num_epochs": 2}
    ends = []
    for name, of in (("steps", 1), ("shares", 4)):
        times = {"prune_begin_step": 1, "prune_end_step": 2, "mask_interval": 1, "mask_freeze_step": 3}
        dual = {"sparsity": 0.5, "dual_kd_scale": 0.1, "dual_kd_warm_step": 2 / of}
        result, system = train_dual(tmp_path / name, dual=dual | {k: v / of for k, v in times.items()}, loop=loop)
        ends.append(system)
        assert result["steps"] == 4 and int(system.model.encoder.mask_step) in (2, 3)
    assert same_weights(*(system.state_dict() for system in ends))
    # A shorter run of the same options plans its own steps, and says where the final sparsity has no time left.
    caplog.clear()
    train_dual(tmp_path / "short", dual=dual | {"prune_end_step": 0.5, "mask_freeze_step": 0.5, "mask_interval": 4},
               loop=loop | {"max_steps": 3})  # fmt: skip
    assert "drawn for the last time at step 0 (--mask-interval 4, --mask-freeze-step 2)" in caplog.text
    assert DualConfig(prune_begin_step=0.1, mask_interval=0.001).in_steps(500).mask_interval == 1
    with pytest.raises(ConfigError, match=r"--mask-freeze-step is 1\.5; give whole steps, or a share below 1"):
        DualConfig(mask_freeze_step=1.5)


def test_norms_of_one_mode_start_both_and_back(tmp_path):
    train_dual(tmp_path / "full", dual={"modes": "full"}, loop={"max_steps": 2})
    first = {"loop": {"max_steps": 1, "init_from": tmp_path / "full"}}
    _, dual = train_dual(tmp_path / "dual", dual={"sparsity": 0.5, "prune_end_step": 0}, **first)
    report = read_transfer(tmp_path / "dual")
    name = "model.encoder.layers.0.norm"
    assert f"{name}.full.weight <- {name}.weight" in report["loaded"]
    assert f"{name}.streaming.bias <- {name}.bias" in report["loaded"]
    assert not any("norm" in n for n in report["missing"] + report["unexpected"])
    # From both modes to the streaming one: its own norms and the masks as they are.
    first["loop"]["init_from"] = tmp_path / "dual"
    _, streaming = train_dual(tmp_path / "streaming", dual={**SPARSE, "modes": "streaming"}, **first)
    report = read_transfer(tmp_path / "streaming")
    assert f"{name}.weight <- {name}.streaming.weight" in report["loaded"]
    for layer, mask in prunable_layers(dual).items():
        assert torch.equal(prunable_layers(streaming)[layer].mask, mask.mask)
    train_dual(tmp_path / "again", dual={"modes": "full"}, **first)
    assert f"{name}.weight <- {name}.full.weight" in read_transfer(tmp_path / "again")["loaded"]


def read_transfer(exp_dir):
    return read_json(exp_dir / "transfer.json")["tensors"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Return an exp_dir whose masks prune, and whose norms differ."""
    exp_dir = write_student(tmp_path_factory.mktemp("student"), tokenizer_of("char"), dual_config(SPARSE))
    checkpoint = load_checkpoint(exp_dir / "epoch-1.pt")
    for weights in (checkpoint["model"], checkpoint["model_avg"]):
        for name in weights:
            if name.endswith(".mask"):
                weights[name] = block_mask(weights[name.replace(".mask", ".weight")], 0.5)
            elif name.endswith("streaming.weight"):
                weights[name] = weights[name] * 1.1
    save_checkpoint(exp_dir / "epoch-1.pt", checkpoint)
    return exp_dir


def test_decoding_chooses_mode_chunks_and_masks(student):
    for options, mode, sparse, chunks in (
        ({}, "full", False, WHOLE_UTTERANCE),
        ({"decode_chunk_size": 4}, "streaming", True, Chunks(4, 8)),
        ({"decode_chunk_size": 4, "sparse": "false"}, "streaming", False, Chunks(4, 8)),
        ({"encoder_mode": "streaming", "left_context_frames": 4}, "streaming", True, Chunks(4, 4)),
        ({"sparse": "true"}, "full", True, WHOLE_UTTERANCE),
    ):
        system = load(student, **options).system
        encoder = system.model.encoder
        assert (system.decoded_as["encoder_mode"], system.decoded_as["sparse"]) == (mode, sparse)
        assert encoder.chunks_of_batch() == encoder.chunks == chunks
        assert {layer.sparse for layer in prunable_layers(system).values()} == {sparse}
        assert {m.mode for m in system.modules() if isinstance(m, DualNorm)} == {mode}
        norms = [m.streaming if mode == "full" else m.full for m in system.modules() if isinstance(m, DualNorm)]
        idle = sum(p.numel() for norm in norms for p in norm.parameters())
        parameters = sum(p.numel() for p in system.parameters()) - idle
        masks = [layer.mask for layer in prunable_layers(system).values()]
        masked, kept = (sum(int((mask == keep).sum()) for mask in masks) for keep in (False, True))
        told = {name: system.decoded_as[name] for name in ("parameters", "nonzeros", "model_bytes")}
        nonzeros = parameters - (masked if sparse else 0)
        stored = 4 * nonzeros + (2 * kept // 8 if sparse else 0)  # an index for each block of 8 rows
        assert told == {"parameters": parameters, "nonzeros": nonzeros, "model_bytes": stored}


def test_a_stream_gives_the_hypotheses_of_the_mask(student):
    batch, found = batch_of(), []
    for chunk_by_chunk in (False, True):
        loaded = load(student, decode_chunk_size=4, left_context_frames=8, chunk_by_chunk=chunk_by_chunk)
        system = loaded.system
        with torch.no_grad():
            if chunk_by_chunk:
                outs, lens = zip(*system.encode_chunks(batch), strict=True)
                encoded = torch.cat(outs, dim=1), torch.stack(lens).sum(0)
            else:
                encoded = system.encode(batch)
            decoder = build_decoder(system, dataclasses.replace(decode_config(), exp_dir=student))
            found.append([hyps[0].tokens for hyps in decoder.decode(*encoded)])
    assert found[0] == found[1] and any(found[0])


def decode_config():
    return DecodeConfig(decoding_method="greedy_search")


@pytest.mark.parametrize(
    ("dual", "options", "message"),
    [
        ({}, {"sparse": "true"}, "without --sparsity and has no masks"),
        ({}, {"encoder_mode": "full", "decode_chunk_size": 4}, "--encoder-mode full sees whole utterances"),
        ({}, {"decode_chunk_size": 64}, "--decode-chunk-size is 64, but this model was trained with"),
        ({"modes": "full"}, {"decode_chunk_size": 4}, "trained with --modes full.* streaming mode"),
        ({"modes": "streaming"}, {"encoder_mode": "full"}, "trained with --modes streaming.* full mode"),
    ],
)
def test_what_a_model_cannot_do_is_refused(tmp_path, dual, options, message):
    write_student(tmp_path, tokenizer_of("char"), dual_config(dual))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **options)


def test_options_of_other_systems_are_refused():
    with pytest.raises(ConfigError, match="--kd is of --system mvq"):
        build_system(dataclasses.replace(dual_config(), kd=KdConfig(kd="l1")), VOCAB)
    with pytest.raises(ConfigError, match="--front-channels is of --system hkd"):
        build_system(dataclasses.replace(dual_config(), cif=CifConfig(front_channels=3)), VOCAB)
    with pytest.raises(ConfigError, match="--acd-scale is of --system hkd"):
        build_system(dataclasses.replace(dual_config(), text_kd=TextKdConfig(acd_scale=3)), VOCAB)
    for system in ("mvq", "nar", "hkd"):
        config = dataclasses.replace(dual_config({"sparsity": 0.5}, MODEL | {"streaming": False}), system=system)
        with pytest.raises(ConfigError, match="--sparsity is of --system dualmode"):
            build_system(config, VOCAB)
    with pytest.raises(ConfigError, match="--encoder-mode and --sparse choose a mode of --system dualmode"):
        system = build_system(dataclasses.replace(dual_config(), system="mvq"), VOCAB)
        system.set_up_decoding(dataclasses.replace(decode_config(), sparse="true"), dual_config().model)


def test_options_come_from_the_command_line():
    command = "--system dualmode --sparsity 0.7 --prune-block 4,4 --mask-freeze-step 9 --sandwich true".split()
    dual = parse_config(TrainConfig, command).dual
    assert dual == DualConfig(sparsity=0.7, prune_block=(4, 4), mask_freeze_step=9, sandwich=True)
    config = dataclasses.replace(dual_config(), dual=dual)
    assert config_from_dict(TrainConfig, config_to_dict(config)) == config
    decode = parse_config(DecodeConfig, "--sparse true --encoder-mode streaming".split())
    assert (decode.sparse, decode.encoder_mode) == ("true", "streaming")
    assert decode_suffix(decode).endswith("streaming_sparse_use-averaged-model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.96}, "at most 0.95"),
        ({"sparsity": 0.5, "modes": "full"}, "the full mode is dense"),
        ({"prune_begin_step": 5, "prune_end_step": 4}, "--prune-end-step is 4; it must be at least 5"),
        ({"dual_kd_scale": 0.1, "modes": "streaming"}, "--dual-kd-scale 0.1 with --modes streaming"),
        ({"sampled_mode": True, "dual_kd_scale": 0.1}, "has no teacher in a step"),
        ({"streaming_scale": 0.0}, "--streaming-scale is 0.0; it must be above 0"),
        ({"prune_block": (0, 1)}, "at least one row"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DualConfig(**options)
