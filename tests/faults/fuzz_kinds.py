"""Sound files of every kind that is read, small, and their readers."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from micro_corpus import write_labels, write_part
from shar_toys import write_shar

from icefall_kd.cli import config_from_dict, config_to_dict, parse_config
from icefall_kd.config import TrainConfig
from icefall_kd.data.loader import audio_of, features_of
from icefall_kd.data.manifests import iterate_cuts
from icefall_kd.data.shar import Shar, labels_of
from icefall_kd.errors import DataError
from icefall_kd.labels.keys import cut_text, label_key, speech_track
from icefall_kd.labels.shard import hash_words
from icefall_kd.labels.store import LabelStore
from icefall_kd.models.fbank_front import NUM_BINS, FbankFrontEnd
from icefall_kd.models.lm import LmConfig, TokenLm, load_lm, save_lm
from icefall_kd.quantization.clusters import Clusters
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.runtime.files import read_record
from icefall_kd.runtime.tensors import write_tensors
from icefall_kd.teachers import hf
from icefall_kd.teachers.state_dicts import read_state_dict
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import load_trained, load_weights, save_weights
from icefall_kd.train.checkpoint import load_newest, save_checkpoint, state_sha256
from icefall_kd.train.state import TrainState
from tests.faults.fuzz import Kind
from tests.teachers.test_state_dicts import export, tiny
from tests.teachers.tiny_models import whisper_model, write_ct2

HASH = "t" * 64
TEXTS = ["one two", "three", "four one"]

# How many cases of each kind: 10,000 in all.
COUNTS = {
    "shards": 1300, "label_set": 700, "cuts": 1400, "shar": 600, "checkpoint": 1000, "trained": 500, "weights": 500,
    "quantizer": 700, "clusters": 500, "cmvn": 400, "lm": 400, "ctranslate2": 600, "fairseq": 300, "old_fairseq": 200,
    "tokenizer": 300, "bpe": 200, "yaml": 200, "config": 200,
}  # fmt: skip


def _contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    found = (p for p in sorted(folder.glob(pattern)) if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def _read_labels(folder: Path) -> Any:
    store = LabelStore(folder)
    values = {}
    try:
        for key in store.keys():
            values[key] = [store.get(key), store.num_samples(key), store.num_frames(key)]
        store.join(store.keys())
        store.shard(0).find_all(hash_words(["a", "b"]))
        store.storage_report()
    except DataError as error:
        assert str(folder) in str(error), str(error)
    if problems := store.verify():  # what reads every byte
        raise DataError(f"{folder}: {'; '.join(problems)}")
    return values


def _read_cuts(folder: Path) -> Any:
    found = []
    for cut in iterate_cuts(folder / "cuts_train.jsonl.gz"):
        try:
            found.append([label_key(cut), cut_text(cut), cut.num_samples, speech_track(cut).duration, cut.to_dict()])
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error  # names the cut, whose file its reader knows
    return found


def _read_shar(folder: Path) -> Any:
    shar, found = Shar(folder), []
    for row in shar.rows:
        for cut in shar.read(row.shard, shar.info.fields):
            try:
                data = [features_of(cut), audio_of(cut), labels_of(cut, "codebook_indexes")]
            except DataError as error:
                raise DataError(f"{folder}: {error}") from error  # names the cut, whose file its reader knows
            found.append([label_key(cut), cut_text(cut), cut.num_samples, data])
    if problems := shar.verify():  # what reads every byte
        raise DataError("; ".join(problems))
    return found


def _read_newest(folder: Path) -> Any:
    _, checkpoint = load_newest(folder)
    TrainState.from_dict(checkpoint["train"])
    return {name: checkpoint.get(name) for name in ("model", "model_avg", "optimizer", "train", "config")}


def _read_quantizer(folder: Path) -> Any:
    quantizer = Quantizer.load(folder / "q.safetensors")
    codes = quantizer.encode(torch.zeros(2, quantizer.dim), 1)
    return [quantizer.sha256, codes.shape]


def _read_clusters(folder: Path) -> Any:
    clusters = Clusters.load(folder / "c.safetensors")
    clusters.encode(torch.zeros(2, clusters.dim))
    return clusters.centers


def _read_cmvn(folder: Path) -> Any:
    front = FbankFrontEnd(8, 0.0)
    front.load_cmvn(folder / "cmvn.safetensors")
    return [front.cmvn_mean, front.cmvn_std]


def _read_yaml(folder: Path) -> Any:
    return config_to_dict(parse_config(TrainConfig, ["--config", str(folder / "train.yaml")]))


def _read_config(folder: Path) -> Any:
    saved = read_record(folder / "config.json", config=dict)["config"]
    return config_to_dict(config_from_dict(TrainConfig, saved, where=str(folder / "config.json")))


def _state_dict(folder: Path) -> Any:
    found = read_state_dict(folder / "hubert.pt")
    return [found.config, found.model_type, found.do_normalize, found.tensors]


def _training(name: str, step: int) -> dict[str, Any]:
    model = {"w": torch.arange(6.0).view(2, 3) + step, "n": torch.tensor(step)}
    adam = {"step": torch.tensor(float(step)), "exp_avg": torch.ones(2, 3)}
    return {
        "model": model,
        "model_avg": {key: x.double() for key, x in model.items()},
        "optimizer": {"state": {0: adam}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "scheduler": {"step": step, "epoch": 1},
        "grad_scaler": {},
        "train": {**TrainState(step=step, average_period=1).to_dict(), "valid": {"loss": 2.0}},
        "config": {"name": name, "seed": 42},
        "tokenizer_hash": HASH,
    }


def make_kinds(root: Path) -> dict[str, Kind]:
    """Make all files below ``root`` and return the kinds by name."""
    torch.set_num_threads(1)  # before a fork
    torch.manual_seed(0)
    kinds: dict[str, Kind] = {}

    def add(
        name: str,
        folder: Path,
        layers: dict,
        read: Callable[[Path], Any],
        covered: tuple[str, ...] = ("bytes",),
        may_ask: bool = False,
    ) -> None:
        kinds[name] = Kind(_contents(folder), layers, read, covered, may_ask)

    cuts = write_part(root / "corpus", "train", [0.5, 0.7, 0.9], speeds=["1", "9/10"])
    labels = write_labels(root / "labels", cuts)
    shards = [p.name for p in labels.glob("shard-*")]
    everything = ("bytes", "json", "safetensors")
    add("shards", labels, {name: ("bytes", "safetensors") for name in shards}, _read_labels, everything)
    add("label_set", labels, {"label_set.json": ("bytes", "json", "json")}, _read_labels, everything)
    manifest = {"cuts_train.jsonl.gz": ("bytes", "lines", "lines")}
    add("cuts", root / "corpus/fbank", manifest, _read_cuts)

    write_labels(root / "corpus/codes", cuts)
    shar = write_shar(root / "corpus", num_shards=1, feature_codec="lilcom")
    data = [f"shards/{name}.000000.tar" for name in ("features", "recording", "codebook_indexes")]
    layers = {"shards.jsonl": ("json",), "shar.json": ("json",), "shards/cuts.000000.jsonl.gz": ("bytes", "lines")}
    layers |= dict.fromkeys(data, ("bytes",))
    kinds["shar"] = Kind(_contents(shar, "**/*"), layers, _read_shar, ("bytes", "lines"))

    for number in (1, 2):
        save_checkpoint(root / "exp" / f"epoch-{number}.pt", _training("a", 3 * number))
    one = root / "one/checkpoint-5.pt"
    save_checkpoint(one, _training("b", 5))
    add("checkpoint", one.parent, {one.name: ("bytes", "bytes", "saved")}, _read_newest)
    files = dict.fromkeys(("epoch-1.pt", "epoch-2.pt"), ("bytes", "saved"))
    add("trained", root / "exp", files, lambda folder: load_trained(folder)[:2])
    save_weights(root / "weights/w.safetensors", {**_training("c", 7)})
    layers = ("bytes", "safetensors")
    add("weights", root / "weights", {"w.safetensors": layers}, lambda f: load_weights(f / "w.safetensors", HASH)[:2])

    Quantizer(4, 2, 4).save(root / "q/q.safetensors", {"teacher": {"layer": 3}})
    add("quantizer", root / "q", {"q.safetensors": layers}, _read_quantizer)
    Clusters(torch.randn(5, 3), {"teacher": {"layer": 3}}).save(root / "c/c.safetensors")
    add("clusters", root / "c", {"c.safetensors": layers}, _read_clusters)
    statistics = {"mean": torch.randn(NUM_BINS), "std": torch.rand(NUM_BINS) + 0.5}
    (root / "cmvn").mkdir()
    stated = {"metadata": json.dumps({"frames": 9, "sha256": state_sha256(statistics)})}
    write_tensors(root / "cmvn/cmvn.safetensors", statistics, stated)
    add("cmvn", root / "cmvn", {"cmvn.safetensors": layers}, _read_cmvn)
    sizes = LmConfig(lm_embedding_dim=4, lm_hidden_dim=4)
    save_lm(root / "lm/lm.safetensors", TokenLm(sizes, 9), HASH, {})
    add("lm", root / "lm", {"lm.safetensors": layers},
        lambda folder: dict(load_lm(folder / "lm.safetensors", HASH).state_dict()))  # fmt: skip

    write_ct2(root / "ct2", whisper_model(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                          decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8,
                                          max_source_positions=10))  # fmt: skip
    add("ctranslate2", root / "ct2", {"model.bin": ("bytes",)},
        lambda folder: dict(hf.whisper_model(folder).state_dict()), ())  # fmt: skip
    state = {"model": export(tiny("base"), "fairseq", "base")}
    for name, options in (("fairseq", {}), ("old_fairseq", {"_use_new_zipfile_serialization": False})):
        (root / name).mkdir()
        stream = io.BytesIO()
        torch.save(state, stream, **options)
        (root / name / "hubert.pt").write_bytes(stream.getvalue())
        (root / name / "hubert.json").write_text('{"num_attention_heads": 2}')
    layers = {"hubert.pt": ("bytes", "bytes", "saved"), "hubert.json": ("bytes", "json")}
    add("fairseq", root / "fairseq", layers, _state_dict, ())
    add("old_fairseq", root / "old_fairseq", layers, _state_dict, (), may_ask=True)  # torch's unpickler

    Tokenizer.train_char(TEXTS).save(root / "char")
    Tokenizer.train_bpe(TEXTS, 16).save(root / "bpe")
    layers = {"tokenizer.json": ("bytes", "json")}
    read = lambda folder: [Tokenizer.load(folder).hash, Tokenizer.load(folder).encode("one")]  # noqa: E731
    add("tokenizer", root / "char", layers, read, ("bytes", "json"))
    add("bpe", root / "bpe", {**layers, "bpe.model": ("bytes",)}, read, ("bytes", "json"))

    flat = config_to_dict(TrainConfig())
    (root / "config").mkdir()
    (root / "config/config.json").write_text(json.dumps({"config": flat}))
    add("config", root / "config", {"config.json": ("bytes", "json", "json")}, _read_config, ())
    (root / "yaml").mkdir()
    lines = (f"{name}: {json.dumps(value)}\n" for name, value in flat.items() if value is not None)
    (root / "yaml/train.yaml").write_text("".join(lines))
    add("yaml", root / "yaml", {"train.yaml": ("bytes",)}, _read_yaml, ())
    return kinds
