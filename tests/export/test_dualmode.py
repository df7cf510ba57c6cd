"""The plain recognisers of a dual-mode training: equal outputs, blocks on the disk, and what is refused."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from students import SIZES, STREAMING, enliven, load, tokenizer_of
from torch import nn

from icefall_kd.cli import config_to_dict
from icefall_kd.config import AsrLossConfig, DualConfig, ExportConfig, LoopConfig, ModelConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.export.exporter import RECORD, export
from icefall_kd.export.plain import mask_facts
from icefall_kd.models.block_storage import pack_blocks, unpack_blocks
from icefall_kd.models.dual import DualNorm
from icefall_kd.models.pruning import PrunableLinear, block_mask, prunable_layers, sparse_size
from icefall_kd.runtime.files import read_json
from icefall_kd.runtime.tensors import read_tensors, write_tensors
from icefall_kd.systems import build_system
from icefall_kd.systems.asr import TransducerSystem
from icefall_kd.train.average import load_weights
from icefall_kd.train.checkpoint import save_checkpoint
from icefall_kd.train.state import write_config

MODEL = {**SIZES, **STREAMING, "convolution": "chunk"}
PRUNED = {"sparsity": 0.7, "prune_end_step": 0, "mask_freeze_step": 0}
CHUNKS = {"decode_chunk_size": 4, "left_context_frames": 8}


def write_dual(exp_dir, dual=(), asr=(), mask_step=0, **model):
    """Write an exp_dir of one checkpoint whose two norms differ and whose masks are drawn."""
    model, loop = ModelConfig(**MODEL | model), LoopConfig(exp_dir=exp_dir, num_epochs=4)
    config = TrainConfig(
        system="dualmode", model=model, loop=loop, dual=DualConfig(**dict(dual)), asr=AsrLossConfig(**dict(asr))
    )
    tokenizer = tokenizer_of("char")
    torch.manual_seed(5)
    system = build_system(config, tokenizer.vocab_size)
    with torch.no_grad():
        for module in system.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
            elif isinstance(module, nn.Linear):
                module.bias.normal_(std=0.1) if module.bias is not None else None
    system.after_step(0)
    if system.cfg.sparsity:
        system.model.encoder.mask_step.fill_(mask_step)
    if system.model.joiner is not None:
        enliven(system.eval().model)
    tokenizer.save(exp_dir / "tokenizer")
    write_config(exp_dir, config, 0)
    state = system.state_dict()
    average = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    train = {"step": 10, "average_period": 10, "history": [{"step": 5}]}
    about = {"config": config_to_dict(config), "tokenizer_hash": tokenizer.hash}
    content = {"model": state, "model_avg": average, "train": train}
    save_checkpoint(exp_dir / "epoch-1.pt", about | content)
    return exp_dir


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return write_dual(tmp_path_factory.mktemp("dual"), PRUNED)


@pytest.fixture(scope="module")
def exported(dual, tmp_path_factory):
    """Return a function from a mode to its folder and record."""
    made = {}

    def make(mode):
        if mode not in made:
            folder = tmp_path_factory.mktemp("exported") / mode
            made[mode] = folder, export(ExportConfig(exp_dir=dual, out_dir=folder, mode=mode, quantize="fp16"))
        return made[mode]

    return make


def utterances():
    """Return ten utterances of different lengths, each alone, and all of them in a padded batch."""
    torch.manual_seed(3)
    lens = [7, 8, 23, 40, 61, 97, 130, 201, 255, 333]
    alone = [torch.randn(1, n, 80) * 4 - 6 for n in lens]
    batch = nn.utils.rnn.pad_sequence([x[0] for x in alone], batch_first=True)
    return [*((x, torch.tensor([x.shape[1]])) for x in alone), (batch, torch.tensor(lens))]


def as_batch(features, lens):
    return Batch(ids=[str(i) for i in range(len(lens))], features=features, x_lens=lens)


def outputs(system, features, lens):
    """Return all that searches look at: encoder output, lengths, what CTC and joiner say."""
    with torch.no_grad():
        out, out_lens = system.encode(as_batch(features, lens))
        model = system.model
        start = torch.full((len(lens), model.decoder.context_size), 0)
        joined = model.joiner(out, model.decoder(start)[:, -1:].expand(-1, out.shape[1], -1))
        return out, out_lens, model.ctc_output(out), joined


def kinds(system):
    return [m for m in system.modules() if isinstance(m, PrunableLinear | DualNorm)]


@pytest.mark.parametrize(("mode", "eager"), [("dense", {}), ("sparse", CHUNKS | {"encoder_mode": "streaming"})])
def test_each_model_says_what_its_mode_says_bit_for_bit(dual, exported, mode, eager):
    folder, record = exported(mode)
    trained = load(dual, **eager).system
    assert trained.decoded_as["sparse"] == (mode == "sparse")
    found = load(folder, weights=folder / record["files"]["fp32"]["model"]).system
    other = load(dual, **({} if mode == "sparse" else CHUNKS)).system
    for features, lens in utterances():
        expected, said = outputs(trained, features, lens), outputs(found, features, lens)
        assert all(torch.equal(a, b) for a, b in zip(expected, said, strict=True))
        if lens.max() > 60:
            assert not torch.allclose(outputs(other, features, lens)[0], said[0], atol=0.1)  # the modes differ
    assert isinstance(found, TransducerSystem) and kinds(trained) and not kinds(found)
    count = [sum(p.numel() for p in s.parameters()) for s in (trained, found)]
    assert count[0] - count[1] == 2 * 6 * (32 + 32)  # layers, norms of each, gain and bias
    assert record["size"]["parameters"] == count[1]
    assert not any("mask" in name for name in found.state_dict())


def test_masked_weights_are_zero_and_the_others_as_trained(dual, exported):
    folder, record = exported("sparse")
    state = load_weights(folder / record["files"]["fp32"]["model"], "")[0]
    layers = prunable_layers(load(dual).system)
    assert len(layers) == 16
    for name, layer in layers.items():
        weight = state[f"{name}.weight"]
        assert torch.equal(weight != 0, layer.mask) and torch.equal(weight[layer.mask], layer.weight[layer.mask])


def header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_files_are_as_large_as_the_accounting_says(dual, exported, mode):
    folder, record = exported(mode)
    size = sparse_size(load(dual).system)
    blocks = sum(int(layer.mask[::8].sum()) for layer in prunable_layers(load(dual).system).values())
    assert size.blocks == blocks and size.nonzeros == 8 * blocks
    for precision, width in (("fp32", 4), ("fp16", 2)):
        path = folder / record["files"][precision]["model"]
        counted = size.sparse_bytes(width) if mode == "sparse" else size.dense_bytes(width)
        assert path.stat().st_size - header_bytes(path) == counted == record["size"]["bytes"][precision]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_16_bit_floats_are_the_weights_rounded(dual, exported, mode):
    folder, record = exported(mode)
    full, half = (load_weights(folder / record["files"][p]["model"], "")[0] for p in ("fp32", "fp16"))
    assert full.keys() == half.keys() and all(torch.equal(half[k], full[k].half()) for k in full)
    found = load(folder, weights=folder / "model.fp16.safetensors").system
    assert all(p.dtype == torch.float32 for p in found.parameters())
    error = record["checks"]["model.fp16.safetensors"]["relative_rms_difference"]
    assert 0 < error < 0.01 and record["checks"]["model.safetensors"]["largest_difference"] == 0


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_the_stored_sparse_model_streams_as_it_hears_under_the_mask(exported, chunk):
    folder, _ = exported("sparse")
    streams_as_it_hears(folder, chunk)


@pytest.mark.parametrize("kind", ["copy", "mask"])
def test_a_stored_model_with_right_context_streams_the_same_way(tmp_path, kind):
    source = write_dual(tmp_path / "exp", PRUNED, right_context=2, right_context_kind=kind)
    record = export(ExportConfig(exp_dir=source, out_dir=tmp_path / "out", mode="sparse"))
    assert record["checks"]["model.safetensors"]["largest_difference"] == 0
    streams_as_it_hears(tmp_path / "out", chunk=4)
    with pytest.raises(ConfigError, match="--right-context 2, which is not exported"):
        export(ExportConfig(exp_dir=source, out_dir=tmp_path / "graphs", mode="sparse", format="torchscript"))


def streams_as_it_hears(folder, chunk):
    """Compare the outputs of a stored model with caches and under the mask."""
    options = {"decode_chunk_size": chunk, "left_context_frames": 8, "chunk_by_chunk": True}
    system = load(folder, weights=folder / "model.safetensors", **options).system
    features, lens = utterances()[-1]
    with torch.no_grad():
        expected, out_lens = system.encode(as_batch(features, lens))
        pieces = list(system.encode_chunks(as_batch(features, lens)))
    found = torch.cat([x for x, _ in pieces], dim=1)
    assert torch.equal(sum(n for _, n in pieces), out_lens)
    for row, n in enumerate(out_lens.tolist()):
        torch.testing.assert_close(found[row, :n], expected[row, :n], rtol=0, atol=1e-4)


def test_the_dense_model_takes_no_chunks_and_the_sparse_one_no_whole_utterance(exported):
    dense, sparse = (folder for folder, _ in (exported("dense"), exported("sparse")))
    with pytest.raises(ConfigError, match="trained with --modes full, the options of decoding ask for its streaming"):
        load(dense, weights=dense / "model.safetensors", **CHUNKS)
    with pytest.raises(ConfigError, match="trained with --modes streaming"):
        load(sparse, weights=sparse / "model.safetensors", encoder_mode="full")


@pytest.mark.parametrize(("mode", "format"), [("dense", "onnx"), ("sparse", "sherpa-onnx"), ("sparse", "torchscript")])
def test_both_are_plain_enough_for_graphs(dual, tmp_path, mode, format):
    record = export(ExportConfig(exp_dir=dual, out_dir=tmp_path / "out", mode=mode, format=format))
    assert record["streaming"] == (mode == "sparse") and record["format"] == format and record["mode"] == mode
    assert all(check["largest_difference"] < 1e-3 for check in record["checks"].values())
    if mode == "sparse":
        assert record["parameters"]["decode_chunk_size"] == 4 and "cached_attn" in record["graphs"]["encoder"]["inputs"]


def test_masks_that_were_not_frozen_are_told_of(tmp_path, caplog):
    exp_dir = write_dual(tmp_path / "exp", PRUNED | {"mask_freeze_step": None, "prune_block": (1, 8)})
    with caplog.at_level(logging.WARNING):
        record = export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", mode="sparse"))
    assert "drawn at step 0 and not frozen" in caplog.text
    assert not record["masks"]["frozen"] and 0.69 < record["masks"]["sparsity"] <= 0.7
    assert record["size"]["block"] == [1, 8]


@pytest.mark.parametrize(("freeze", "frozen"), [(10, True), (11, False), (0.5, True), (0.6, False)])
def test_when_masks_are_frozen(dual, tmp_path, freeze, frozen):
    # Ten steps are done, two epochs of four; below 1 it is a share of the twenty.
    trained = load(dual)
    options = dataclasses.replace(trained.config.dual, mask_freeze_step=freeze)
    trained = dataclasses.replace(trained, config=dataclasses.replace(trained.config, dual=options))
    assert mask_facts(trained, ExportConfig(exp_dir=dual, out_dir=tmp_path))["frozen"] == frozen


def test_what_a_training_does_not_offer_is_refused(dual, student, tmp_path):
    def refused(exp_dir, message, **options):
        with pytest.raises(ConfigError, match=message):
            export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    refused(dual, "without --mode: .* of which --mode dense and --mode sparse can be exported")
    refused(dual, "--mode streaming: .* --mode dense and --mode sparse", mode="streaming")
    full = write_dual(tmp_path / "full", {"modes": "full"})
    remedy = "--modes full .* of which --mode dense can be exported; a training with --modes dual"
    refused(full, f"--mode sparse: .* {remedy}", mode="sparse")
    unpruned = write_dual(tmp_path / "unpruned", {})
    refused(unpruned, "--sparsity 0.0, of which --mode dense and --mode streaming", mode="sparse")
    alone = write_dual(tmp_path / "alone", {"modes": "streaming", **PRUNED})
    refused(alone, "of which --mode sparse can", mode="dense")
    early = write_dual(tmp_path / "early", PRUNED | {"prune_begin_step": 50, "prune_end_step": 90})
    refused(early, "keep every weight, since pruning begins behind --prune-begin-step 50", mode="sparse")
    changing = write_dual(tmp_path / "changing", PRUNED, mask_step=7)
    refused(changing, "changed at step 7, behind step 0: .* or one checkpoint with --use-averaged", mode="sparse")
    refused(student("offline-char"), "not of --system dualmode; leave --mode out", mode="dense")
    refused(dual, "options of chunks with --mode sparse", mode="sparse", decode_chunk_size=4)
    refused(dual, "--mode dense hears whole utterances", mode="dense", format="onnx", decode_chunk_size=4)
    refused(dual, "trained with --chunk-size", mode="sparse", format="onnx", decode_chunk_size=-1)
    refused(dual, "fp16 of safetensors", mode="sparse", format="onnx", quantize="fp16")
    refused(dual, "int8 is of onnx", mode="sparse", quantize="int8")
    refused(dual, "local/average.py --out", format="safetensors")
    for exp_dir, mode in ((full, "dense"), (unpruned, "streaming"), (alone, "sparse")):
        record = export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / mode, mode=mode))
        assert record["streaming"] == (mode != "dense")


def test_a_model_of_ctc_alone_is_stored(tmp_path):
    exp_dir = write_dual(tmp_path / "exp", PRUNED, {"transducer_scale": 0.0})
    record = export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "out", mode="sparse"))
    assert "context_size" not in record
    with pytest.raises(ConfigError, match="has no transducer"):
        export(ExportConfig(exp_dir=exp_dir, out_dir=tmp_path / "graphs", mode="sparse", format="onnx"))


def test_truncated_and_altered_files_are_found(exported, tmp_path):
    folder, _ = exported("sparse")
    content = (folder / "model.safetensors").read_bytes()
    file = tmp_path / "bad.safetensors"

    def refused(data, message):
        file.write_bytes(data)
        with pytest.raises(DataError, match=message):
            load_weights(file, "")

    refused(content[:-5], "is damaged")
    refused(content[:100], "is damaged")
    refused(b"", "is damaged|cannot be read")
    flipped = bytearray(content)
    flipped[-1000] ^= 1
    refused(bytes(flipped), "not as it was written")
    refused(content.replace(b'\\"block\\": [8, 1]', b'\\"block\\": [1, 8]'), "not as it was written")
    metadata, tensors = read_tensors(folder / "model.safetensors")
    about = json.loads(metadata["checkpoint"])
    del about["sha256"]
    key = next(iter(about["blocks"]["matrices"]))

    def wrong(message, change):
        changed = dict(tensors)
        change(changed)
        write_tensors(file, changed, {"checkpoint": json.dumps(about)})
        with pytest.raises(DataError, match=message):
            load_weights(file, "")

    wrong(f"there is no '{key}.gaps'", lambda t: t.pop(f"{key}.gaps"))
    wrong("weights are stored for blocks that hold", lambda t: t.update({f"{key}.values": t[f"{key}.values"][:-1]}))
    wrong("has one at place", lambda t: t.update({f"{key}.gaps": t[f"{key}.gaps"] + 9}))


@pytest.mark.parametrize("block", [(8, 1), (1, 8), (16, 1), (4, 4), (1, 1)])
@pytest.mark.parametrize(("rows", "columns", "matrices"), [(48, 40, 3), (20, 13, 2), (5, 7, 1)])
def test_any_mask_of_blocks_comes_back(block, rows, columns, matrices):
    torch.manual_seed(1)
    weight = torch.randn(rows, columns)
    for sparsity in (0.0, 0.5, 0.95):
        mask = torch.cat([block_mask(w, sparsity, block) for w in weight.chunk(matrices)])
        values, gaps = pack_blocks(weight, mask, block, matrices)
        assert values.numel() == int(mask.sum()) and gaps.dtype == torch.int16
        assert torch.equal(unpack_blocks(values, gaps, (rows, columns), block, matrices), weight * mask)


def test_far_blocks_have_a_place():
    weight, mask = torch.ones(2, 200_000), torch.zeros(2, 200_000, dtype=torch.bool)
    places = [0, 65535, 131_071, 131_072 + 40_000, 330_000]  # gaps of 65534, 65535, 40000 and two more than 65535
    mask.view(-1)[places] = True
    values, gaps = pack_blocks(weight, mask, (1, 1))
    unsigned = gaps.numpy().view(np.uint16).tolist()
    assert unsigned == [0, 65534, 65535, 0, 40000, 65535, 65535, 330_000 - 171_072 - 1 - 2 * 65535]
    assert torch.equal(unpack_blocks(values, gaps, (2, 200_000), (1, 1)), mask.float())


def test_blocks_in_part_are_refused(tmp_path):
    mask = torch.ones(16, 4, dtype=torch.bool)
    mask[3, 2] = False
    with pytest.raises(ConfigError, match="keeps parts of blocks of 8 x 1"):
        pack_blocks(torch.ones(16, 4), mask, (8, 1))


def test_an_export_is_replaced_and_strangers_are_not(dual, tmp_path):
    config = ExportConfig(exp_dir=dual, out_dir=tmp_path / "out", mode="sparse")
    export(config)
    before = (config.out_dir / "model.safetensors").read_bytes()
    export(dataclasses.replace(config, mode="dense"))
    assert read_json(config.out_dir / RECORD)["mode"] == "dense"
    export(config)
    assert (config.out_dir / "model.safetensors").read_bytes() == before
    (config.out_dir / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt beside"):
        export(config)
