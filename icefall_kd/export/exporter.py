"""Export a trained recogniser: trace or store, quantize, compare with the model, put into place."""

import dataclasses
import logging
import warnings
from pathlib import Path

import torch

from icefall_kd.config import DecodeConfig, ExportConfig
from icefall_kd.data.features import FRAME_SHIFT, NUM_BINS
from icefall_kd.errors import ConfigError
from icefall_kd.export.check import (
    Run,
    check_graph,
    check_stream,
    label_cases,
    masked_cases,
    offline_cases,
    step_cases,
)
from icefall_kd.export.cif import cif_graphs
from icefall_kd.export.graphs import Graph, offline_graphs, streaming_graphs
from icefall_kd.export.hubert import hubert_cases, hubert_graphs
from icefall_kd.export.mask_ctc import mask_ctc_graphs
from icefall_kd.export.onnx_files import open_onnx, quantize_onnx, require_onnx, write_onnx
from icefall_kd.export.plain import check_mode, mask_facts, plain, write_plain
from icefall_kd.frames import pooled_seconds
from icefall_kd.models.cif import TAIL_THRESHOLD
from icefall_kd.models.cif_model import CifModel
from icefall_kd.models.ctc_attention import CtcAttentionModel
from icefall_kd.models.fbank_front import FbankFrontEnd
from icefall_kd.models.hubert import HubertEncoder
from icefall_kd.models.streaming import WHOLE_UTTERANCE, choose_chunks
from icefall_kd.models.waveform import WaveformFrontEnd
from icefall_kd.recipe import Trained, load_system
from icefall_kd.runtime.env import environment, package_version
from icefall_kd.runtime.files import atomic_folder, read_json, write_json, write_text
from icefall_kd.systems.hubert_encoder import hop_of
from icefall_kd.text.tokenizer import SPACE, Tokenizer

logger = logging.getLogger(__name__)

RECORD = "export.json"
# Options that say which model is exported, with the names that they have in decode.py.
_CHUNKS = ("decode_chunk_size", "left_context_frames")
PARAMETERS = ("epoch", "iter", "avg", "use_averaged_model", *_CHUNKS)
# Graphs with int8 weights; a transducer's decoder is an embedding and one small product.
_QUANTIZED = ("encoder", "joiner", "masked_decoder")


def export(config: ExportConfig) -> dict:
    """Export what ``config`` names and return what export.json holds.

    Raises:
        ConfigError: the model has no transducer or is an autoregressive teacher, a package is missing, out-dir holds
            something else, or the format or the training does not offer what is asked for.
        NumericError: an exported graph or model differs from the model.
    """
    config = dataclasses.replace(config, format=config.resolved_format)
    if config.format in ("onnx", "sherpa-onnx"):
        require_onnx()
    _refuse_other_files(config.out_dir)
    with atomic_folder(config.out_dir, RECORD) as folder:
        parameters = {name: getattr(config, name) for name in PARAMETERS}
        which = {name: value for name, value in parameters.items() if name not in _CHUNKS}
        trained = load_system(DecodeConfig(exp_dir=config.exp_dir, device="cpu", **which))
        trained.system.requires_grad_(False)
        _refuse_model(trained.system.model, config)
        check_mode(trained, config)
        dual = trained
        if config.mode != "auto":
            trained = plain(dual, config.mode)
        model, tokenizer = trained.system.model, trained.tokenizer
        feature_dim = trained.config.model.feature_dim
        if config.format == "sherpa-onnx" and feature_dim != NUM_BINS:
            raise ConfigError(f"{config.exp_dir} hears {feature_dim} bins; sherpa-onnx is told of {NUM_BINS}")
        if config.format == "safetensors":
            written, streaming = write_plain(dual, trained, config, folder), config.mode != "dense"
        else:
            # A seed of its own: the same model gives the same files and the same figures of the check.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                graphs, streaming = _graphs(trained, config, parameters)
                written = _write_graphs(graphs, config, folder, feature_dim)
            tokenizer.save(folder)
        if config.format == "sherpa-onnx":
            write_text(folder / "tokens.txt", sherpa_tokens(tokenizer))
        if config.mode == "sparse":
            written["masks"] = mask_facts(dual, config)
        record = {
            "format": config.format,
            "mode": config.mode,
            "streaming": streaming,
            **written,
            "parameters": parameters,
            "files_used": trained.files_used,
            "tokenizer_hash": tokenizer.hash,
            "vocab_size": tokenizer.vocab_size,
            **_search_facts(model, config),
            "features": {"bins": feature_dim, "frame_shift": FRAME_SHIFT, "sampling_rate": 16000},
            "environment": environment() | {name: package_version(name) for name in ("onnx", "onnxruntime")},
        }
        write_json(folder / RECORD, record)
    logger.info("wrote %s", config.out_dir)
    return record


def _refuse_model(model: torch.nn.Module, config: ExportConfig) -> None:
    """Raise a ConfigError for a model that is not exported, or not in this format."""
    if isinstance(model.encoder, HubertEncoder):
        _refuse_hubert(config)
        return
    if isinstance(getattr(model.encoder, "subsampling", None), WaveformFrontEnd):
        raise ConfigError(f"{config.exp_dir} hears samples (--front-end waveform), which is not exported")
    if config.tail_threshold != TAIL_THRESHOLD and not isinstance(model, CifModel):
        raise ConfigError(f"--tail-threshold is of --system hkd; leave it out for {config.exp_dir}")
    if not isinstance(model, CtcAttentionModel | CifModel):
        if model.joiner is None and config.format != "safetensors":
            raise ConfigError(f"{config.exp_dir} has no transducer (--transducer-scale 0); nothing is exported")
        return
    if isinstance(model, CifModel):
        what, driver = "CIF recogniser", "onnx_cif.py"
        if config.quantize != "none":
            raise ConfigError(
                f"--quantize {config.quantize}: {config.exp_dir} is a {what}, and other weights would change how many "
                "tokens it hears; leave --quantize out"
            )
    elif model.decoder.causal:
        raise ConfigError(
            f"{config.exp_dir} is an autoregressive teacher (--attention-decoder ar); its Mask-CTC student is exported"
        )
    else:
        what, driver = "Mask-CTC student", "onnx_mask_predict.py"
    if config.format == "sherpa-onnx":
        raise ConfigError(
            f"--format sherpa-onnx: {config.exp_dir} is a {what}, which sherpa-onnx does not run; use "
            f"--format onnx (and local/{driver}) or torchscript"
        )


def _refuse_hubert(config: ExportConfig) -> None:
    if config.format not in ("onnx", "torchscript"):
        raise ConfigError(
            f"--format {config.format}: {config.exp_dir} is a HuBERT model with CTC, which is exported with --format "
            "onnx or torchscript"
        )
    if config.quantize != "none":
        raise ConfigError(f"--quantize {config.quantize}: HuBERT models are exported in float32; leave it out")
    if config.tail_threshold != TAIL_THRESHOLD:
        raise ConfigError(f"--tail-threshold is of --system hkd; leave it out for {config.exp_dir}")


def _graphs(trained: Trained, config: ExportConfig, parameters: dict) -> tuple[list[Graph], bool]:
    """Return the graphs of a model, and whether they go chunk by chunk; the chunks are noted in ``parameters``."""
    model, feature_dim = trained.system.model, trained.config.model.feature_dim
    if isinstance(model.encoder, HubertEncoder):
        return hubert_graphs(model), False
    if isinstance(model, CifModel):
        return cif_graphs(model, feature_dim, config.tail_threshold), False
    masked = isinstance(model, CtcAttentionModel)  # its decoder looks at whole utterances
    if config.mode == "dense":
        model.encoder.chunks = WHOLE_UTTERANCE
        return offline_graphs(model, feature_dim), False
    streaming = trained.config.model.streaming and config.decode_chunk_size != -1 and not masked
    options = trained.config.model
    if config.mode != "auto":  # its streaming mode was never trained on whole utterances
        options = dataclasses.replace(options, chunk_size=[size for size in options.chunk_size if size > 0])
    wanted = (parameters[name] for name in _CHUNKS)
    chunks = choose_chunks(options, *wanted, chunk_by_chunk=streaming)
    model.encoder.chunks = chunks
    if model.encoder.look_ahead(chunks):
        raise ConfigError(
            f"{config.exp_dir} was trained with --right-context {trained.config.model.right_context}, which is not "
            "exported; decode.py and local/stream_wav.py run it, --decode-chunk-size -1 exports whole utterances if it "
            "was trained on them, too"
        )
    if masked:
        return mask_ctc_graphs(model, feature_dim), False
    if not streaming:
        return offline_graphs(model, feature_dim), False
    parameters |= dict(zip(_CHUNKS, chunks, strict=True))
    return streaming_graphs(model, feature_dim, chunks), True


def _search_facts(model: torch.nn.Module, config: ExportConfig) -> dict:
    """Return what a search over the graphs must know beside the tokens."""
    if isinstance(model, CifModel):
        decoder = model.decoder
        return {
            "blank_id": model.blank_id,
            "sos_id": model.sos_id,
            "unk_id": Tokenizer.unk_id,
            "mask_id": model.vocab_size - 1,
            "cache": [len(decoder.layers), decoder.num_heads, decoder.dim // decoder.num_heads],
            "frame_seconds": pooled_seconds(1, model.encoder.num_pools),
            "tail_threshold": config.tail_threshold,
        }
    if isinstance(model.encoder, HubertEncoder):
        encoder = model.encoder
        heard = "log_mel" if isinstance(encoder.subsampling, FbankFrontEnd) else "samples"
        seconds = hop_of(encoder) / 16000
        return {"blank_id": model.blank_id, "unk_id": Tokenizer.unk_id, "frame_seconds": seconds, "hears": heard}
    if isinstance(model, CtcAttentionModel):
        unk_id = Tokenizer.unk_id
        return {"blank_id": model.blank_id, "sos_id": model.sos_id, "unk_id": unk_id, "mask_id": model.mask_id}
    return {"context_size": model.decoder.context_size} if model.decoder is not None else {}


def _refuse_other_files(out_dir: Path) -> None:
    """Raise a ConfigError where an earlier export was joined by files of somebody else, which would be deleted."""
    if not (out_dir / RECORD).is_file():
        return
    files = read_json(out_dir / RECORD).get("files", {}).values()
    ours = {RECORD, "tokens.txt", "tokenizer", "tokenizer.json", "bpe.model"}.union(*(f.values() for f in files))
    others = sorted(path.name for path in out_dir.iterdir() if path.name not in ours)
    if others:
        raise ConfigError(
            f"{out_dir} holds {', '.join(others[:3])} beside an earlier export, so it is left as it is; move that away "
            "or name another folder"
        )


def _write_graphs(graphs: list[Graph], config: ExportConfig, folder: Path, feature_dim: int) -> dict:
    """Write and check every graph; return files by precision, graphs, and the outcomes of the checks by file."""
    suffix = ".pt" if config.format == "torchscript" else ".onnx"
    files: dict[str, dict[str, str]] = {"fp32": {}}
    checks = {}
    if config.quantize == "int8":
        files["int8"] = {}
    for graph in graphs:
        path = folder / f"{graph.name}{suffix}"
        if config.format == "torchscript":
            _write_torchscript(graph, path)
        else:
            write_onnx(graph, path, graph.metadata if config.format == "sherpa-onnx" else {})
        for precision, found in files.items():
            if precision == "int8" and graph.name in _QUANTIZED:
                fp32, path = path, path.with_suffix(f".int8{suffix}")
                quantize_onnx(fp32, path)
            found[graph.name] = path.name
            if path.name not in checks:
                checks[path.name] = _check(graph, _open(path), feature_dim, int8=precision == "int8")
                _report(path, checks[path.name])
    facts = {g.name: {"inputs": g.inputs, "outputs": g.outputs, "metadata": g.metadata} for g in graphs}
    return {"files": files, "graphs": facts, "checks": checks}


def _check(graph: Graph, run: Run, feature_dim: int, int8: bool) -> dict[str, float]:
    if "cached_attn" in graph.inputs:
        return check_stream(graph, run, feature_dim, int8)
    if graph.name == "encoder":
        cases = offline_cases(feature_dim)
    else:
        made = {"masked_decoder": masked_cases, "decoder_step": step_cases, "ctc": hubert_cases}
        cases = made.get(graph.name, label_cases)(graph)
    return check_graph(graph, run, cases, int8)


def _open(path: Path) -> Run:
    if path.suffix == ".onnx":
        return open_onnx(path)
    module = torch.jit.load(path)

    def run(*inputs):
        out = module(*inputs)
        return out if isinstance(out, tuple) else (out,)

    return run


def _write_torchscript(graph: Graph, path: Path) -> None:
    with warnings.catch_warnings():
        # What the tracer doubts is compared with the model afterwards; that torch.jit is old is known.
        warnings.simplefilter("ignore")
        torch.jit.trace(graph.module, graph.example, check_trace=False).save(path)


def _report(path: Path, check: dict[str, float]) -> None:
    logger.info(
        "%s: %.1f MB, differs from the model by at most %.1e (relative root mean square %.1e)",
        path.name,
        path.stat().st_size / 1e6,
        check["largest_difference"],
        check["relative_rms_difference"],
    )


def sherpa_tokens(tokenizer: Tokenizer) -> str:
    """Return tokens.txt as sherpa-onnx reads it, which joins tokens and makes a space of each leading U+2581.

    Pinyin tokens, which our texts separate by spaces, get that mark in front.
    """
    special = {tokenizer.blank_id, tokenizer.sos_id, tokenizer.unk_id, tokenizer.mask_id}
    mark = SPACE if tokenizer.kind == "pinyin" else ""
    return "".join(f"{'' if i in special else mark}{token} {i}\n" for i, token in enumerate(tokenizer.tokens))
