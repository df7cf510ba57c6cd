"""The part of the names of result files that says which parameters and which search."""

import re
from pathlib import Path

from icefall_kd.config import DecodeConfig
from icefall_kd.models.cif import TAIL_THRESHOLD
from icefall_kd.models.streaming import WHOLE_UTTERANCE, Chunks


def decode_suffix(
    config: DecodeConfig, files_used: str = "", context_size: int | None = None, chunks: Chunks = WHOLE_UTTERANCE
) -> str:
    """Return the part of the file names that says which parameters and which search, as in icefall.

    Args:
        config: options of decode.py.
        files_used: what load_for_decoding says it took; its last file counts when no option names one.
        context_size: of the stateless decoder; None: left out.
        chunks: what the encoder sees.
    """
    found = re.findall(r"(epoch|checkpoint)-(\d+)", files_used)
    kind, number = found[-1] if found else ("epoch", "newest")
    if config.iter is not None or config.epoch is not None:
        kind, number = ("checkpoint", config.iter) if config.iter is not None else ("epoch", config.epoch)
    where = f"{'iter' if kind == 'checkpoint' else 'epoch'}-{number}_avg-{config.avg}"
    parts = [where if config.weights is None else f"weights-{_plain_name(config.weights)}"]
    if config.decoding_method == "greedy_search":
        if context_size is not None:
            parts.append(f"context-{context_size}")
        parts.append("max-sym-per-frame-1")
    elif config.decoding_method == "modified_beam_search":
        parts[0] += "__modified_beam_search__beam-size-" + str(config.beam_size)
        if config.temperature != 1.0:
            parts.append(f"temperature-{config.temperature}")
        parts += _fusion_suffix(config)
    elif config.decoding_method.startswith(("fast_beam_search", "ctc_decoding")):
        parts += _graph_suffix(config)
    elif config.decoding_method == "ctc_lexicon_beam":
        parts += _lexicon_suffix(config)
    elif config.decoding_method.startswith("cif"):
        parts += _cif_suffix(config)
    else:
        parts += [config.decoding_method, *_nar_suffix(config)]
    if chunks != WHOLE_UTTERANCE:
        parts[0] += f"_chunk-{chunks.chunk_size}_left-context-{chunks.left_context_frames}"
        parts[0] += "_streaming" if config.chunk_by_chunk else ""
    if config.encoder_mode != "auto":
        parts.append(config.encoder_mode)
    if config.sparse != "auto":
        parts.append("sparse" if config.sparse == "true" else "dense")
    if config.tail_padding:
        parts.append(f"tail-padding-{config.tail_padding}")
    if config.blank_penalty:
        parts.append(f"blank-penalty-{config.blank_penalty}")
    if config.use_averaged_model and config.weights is None:
        parts.append("use-averaged-model")
    return "_".join(parts)


def _fusion_suffix(config: DecodeConfig) -> list[str]:
    parts = []
    if config.lm is not None:
        parts.append(f"lm-{_plain_name(config.lm)}-scale-{config.lm_scale}")
    if config.lodr_arpa is not None:
        parts.append(f"lodr-{_plain_name(config.lodr_arpa)}-scale-{config.lodr_scale}")
    if config.hotwords is not None:
        parts.append(f"hotwords-{_plain_name(config.hotwords)}-score-{config.hotwords_score}")
    return parts


def _plain_name(path: Path) -> str:
    """Return the name of a file or folder as part of another file's name."""
    if path.name == "lm.safetensors":  # every neural language model has this name
        path = path.parent
    name = path.resolve().name.removesuffix(".gz")
    return re.sub(r"[^\w.-]+", "-", re.sub(r"\.(arpa|txt|safetensors)$", "", name))


def _nar_suffix(config: DecodeConfig) -> list[str]:
    """Return the parameters of the searches of --system nar, none of other searches."""
    method, parts = config.decoding_method, []
    if method in ("ctc_prefix_beam_search", "joint_beam_search", "nar_beam_search"):
        parts.append(f"beam-size-{config.beam_size}")
    if method == "joint_beam_search":
        parts.append(f"ctc-weight-{config.joint_ctc_weight}")
    if method in ("mask_predict", "nar_beam_search"):
        parts += [f"passes-{config.passes}", f"threshold-{config.mask_threshold}"]
        parts += [f"rank-by-{config.rank_masks_by}"] if config.rank_masks_by != "probability" else []
    if method == "nar_beam_search":
        parts += [f"seeds-{config.nar_seeds}"] if config.nar_seeds != "greedy" else []
        parts += [f"rescore-ctc-weight-{config.rescore_ctc_weight}"] if config.rescore_ctc_weight else []
    return parts


def _cif_suffix(config: DecodeConfig) -> list[str]:
    """Return the parts of the suffix of a search of --system hkd."""
    parts = [config.decoding_method]
    if config.decoding_method == "cif_beam_search":
        parts += [f"beam-size-{config.beam_size}", *_fusion_suffix(config)]
    return [*parts, *([f"tail-{config.tail_threshold}"] if config.tail_threshold != TAIL_THRESHOLD else [])]


def _lexicon_suffix(config: DecodeConfig) -> list[str]:
    """Return the parts of the suffix of the search over a lexicon."""
    parts = [config.decoding_method, f"beam-size-{config.lexicon_beam_size}", f"tokens-{config.lexicon_beam_tokens}"]
    parts += [f"threshold-{config.lexicon_beam_threshold}", f"word-score-{config.word_score}"]
    if config.lang_dir is not None:
        parts.append(f"lang-{_plain_name(config.lang_dir)}")
    if config.word_lm is not None:
        parts.append(f"lm-{_plain_name(config.word_lm)}-weight-{config.word_lm_weight}")
    return [*parts, *([f"silence-score-{config.silence_score}"] if config.silence_score else [])]


def _graph_suffix(config: DecodeConfig) -> list[str]:
    """Return the parts of the suffix of a search over a graph."""
    method = config.decoding_method
    parts = [method, f"beam-{config.beam}"]
    if method.startswith("fast"):
        parts += [f"max-contexts-{config.max_contexts}", f"max-states-{config.max_states}"]
        parts += [f"temperature-{config.temperature}"] if config.temperature != 1.0 else []
    else:
        parts.append(f"output-beam-{config.output_beam}")
    if "nbest" in method:
        parts += [f"num-paths-{config.num_paths}", f"nbest-scale-{config.nbest_scale}"]
    if method.endswith("LG") and config.lang_dir is not None:
        parts.append(f"lang-{_plain_name(config.lang_dir)}")
    if method.endswith("_LG"):
        parts.append(f"ngram-lm-scale-{config.ngram_lm_scale}")
    return [*parts, f"hlg-scale-{config.hlg_scale}"] if method.endswith("_HLG") else parts
