"""Options of decode.py and of the export."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icefall_kd.config.checks import at_least
from icefall_kd.errors import ConfigError

DecodingMethod = Literal[
    "greedy_search", "modified_beam_search", "ctc_greedy_search",
    "fast_beam_search", "fast_beam_search_nbest", "fast_beam_search_LG", "fast_beam_search_nbest_LG",
    "ctc_decoding", "ctc_decoding_HLG", "ctc_decoding_nbest_HLG",
    "ctc_prefix_beam_search", "joint_beam_search", "mask_predict", "nar_beam_search",
    "cif_greedy_search", "cif_beam_search", "ctc_lexicon_beam",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decoding and scoring."""

    exp_dir: Path = Path("exp")
    """exp_dir of the training."""
    test_parts: list[str] = field(default_factory=lambda: ["test"])
    """Parts of manifest-dir, paths of lhotse cut sets, or folders of audio with *.trans.txt."""
    shard: int = 0
    """Which share of the parts to decode, from 0: every num-shards-th part."""
    num_shards: int = 1
    """Shares that the parts are divided into, as by the tasks of an array."""
    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz."""
    decoding_method: DecodingMethod = "greedy_search"
    """Search; those over graphs (fast_beam_search..., ctc_decoding...) need k2, ctc_lexicon_beam flashlight-text."""
    beam_size: int = 4
    """Beam of modified_beam_search, ctc_prefix_beam_search, joint_beam_search, nar_beam_search, cif_beam_search."""
    nbest: int = 1
    """Hypotheses a utterance written with their scores (beam searches: at most beam-size)."""
    joint_ctc_weight: float = 0.3
    """joint_beam_search: weight of the CTC prefix score; the attention decoder's has the rest."""
    passes: int = 10
    """mask_predict and nar_beam_search: most passes K of the masked decoder; 0: one for each masked token."""
    mask_threshold: float = 0.99
    """mask_predict and nar_beam_search: CTC tokens with a lower probability are masked; 0: none."""
    rescore_ctc_weight: float = 0.0
    """nar_beam_search: weight of the CTC score with which finished hypotheses are ranked again; 0: they are not."""
    nar_seeds: Literal["greedy", "prefix_beam"] = "greedy"
    """nar_beam_search starts from the greedy CTC string, or from the beam-size best ones of a CTC prefix beam search,
    whose lengths differ (finished hypotheses then have the score of their string added, unless rescore-ctc-weight)."""
    rank_masks_by: Literal["probability", "logit"] = "probability"
    """What makes a masked token easy to fill in: its best probability, or the best raw logit as in ESPnet."""
    tail_threshold: float = 0.4
    """cif_greedy_search and cif_beam_search: weight left behind the last whole token above which it makes one more;
    1: never."""
    blank_penalty: float = 0.0
    """Subtracted from the blank's logit in transducer searches; above 0: fewer deletions."""
    temperature: float = 1.0
    """Divides the logits in modified_beam_search and fast_beam_search."""
    lm: Path | None = None
    """Language model over tokens for modified_beam_search and cif_beam_search: an ARPA file (local/make_ngram.py
    --lang-dir) or the folder of local/train_lm.py; see docs/decoding.md."""
    lm_scale: float = 0.3
    """Scale of its log-probabilities."""
    lodr_arpa: Path | None = None
    """ARPA file of a low-order token n-gram of the training text that is subtracted beside --lm (LODR)."""
    lodr_scale: float = -0.16
    """Scale of that n-gram's log-probabilities, below 0."""
    hotwords: Path | None = None
    """File of phrases that these two searches prefer, one a line; "NEW YORK :2.5" gives a score of its own."""
    hotwords_score: float = 1.5
    """Score of each token of a phrase that has none of its own."""
    ctm: bool = False
    """Write ctm-<part>-<suffix>.ctm: begin and length of every word."""
    lang_dir: Path | None = None
    """Folder of LG.safetensors and HLG.safetensors, for the methods named after them; of lexicon.txt for
    ctc_lexicon_beam."""
    word_lm: Path | None = None
    """ctc_lexicon_beam: n-gram of the words in ARPA format (LANG_DIR/lm.arpa of prepare.sh --graphs true); None: all
    words are equally likely."""
    word_lm_weight: float = 2.0
    """ctc_lexicon_beam: weight of its log10-probability."""
    word_score: float = -1.0
    """ctc_lexicon_beam: added a word."""
    silence_score: float = 0.0
    """ctc_lexicon_beam: added a frame of the token between words."""
    lexicon_beam_size: int = 50
    """ctc_lexicon_beam: hypotheses a frame."""
    lexicon_beam_tokens: int = 32
    """ctc_lexicon_beam: likeliest tokens of a frame that continue a hypothesis."""
    lexicon_beam_threshold: float = 32.0
    """ctc_lexicon_beam: score behind the best hypothesis at which one is dropped."""
    beam: float = 20.0
    """Graph searches: log-probability behind the best state at which a state is dropped."""
    max_contexts: int = 8
    """fast_beam_search: different decoder contexts a frame."""
    max_states: int = 64
    """fast_beam_search: states a frame."""
    output_beam: float = 8.0
    """ctc_decoding: the beam of the lattice, behind its best path."""
    ngram_lm_scale: float = 0.01
    """Scale of LG's scores."""
    hlg_scale: float = 0.6
    """Scale of HLG's scores."""
    num_paths: int = 200
    """Methods with nbest: paths drawn from the lattice."""
    nbest_scale: float = 0.5
    """Methods with nbest: scale of the scores that paths are drawn with; smaller: more different ones."""
    epoch: int | None = None
    """Decode epoch-N.pt; None (and no --iter): the newest."""
    iter: int | None = None
    """Decode checkpoint-N.pt instead."""
    avg: int = 1
    """Epochs (or checkpoints) averaged."""
    use_averaged_model: bool = True
    """Use the running averages of the two end points of the range."""
    weights: Path | None = None
    """Decode this file of local/average.py --out NAME.safetensors; no option about epochs then counts."""
    max_duration: float = 200.0
    """Seconds of audio a batch."""
    decode_chunk_size: int | None = None
    """Streaming models: encoder frames of 40 ms a chunk, -1: the whole utterance; None: the first trained with."""
    left_context_frames: int | None = None
    """Streaming models: encoder frames seen before a chunk, -1: all; None: the first trained with."""
    encoder_mode: Literal["auto", "full", "streaming"] = "auto"
    """Models of --system dualmode: auto is streaming with a chunk size, left context or chunk-by-chunk, else full."""
    sparse: Literal["auto", "true", "false"] = "auto"
    """The same models: without the masked weights; auto: in the streaming mode of a model that has masks."""
    chunk_by_chunk: bool = False
    """Streaming models: go through utterances chunk by chunk with caches, not once under a chunk mask; same results."""
    tail_padding: float = 0.0
    """Streaming models: seconds of silence put behind each utterance, as clients of a recogniser do (without stored
    features, as zeros behind the samples)."""
    unit: Literal["auto", "word", "char", "mixed", "token"] = "auto"
    """Scoring unit; auto: the tokenizer's (word for bpe and char, char for hanzi, token for pinyin);
    mixed: Chinese characters and whole words of other scripts."""
    bootstrap: int = 1000
    """Bootstrap samples of the confidence interval."""
    device: str = "auto"
    """auto: the GPU when there is one."""
    num_threads: int | None = None
    """torch threads on a CPU."""

    def __post_init__(self) -> None:
        at_least(self, beam_size=1, nbest=1, epoch=1, iter=1, avg=1, max_duration=0.1, bootstrap=0, tail_padding=0)
        at_least(self, num_shards=1)
        if not 0 <= self.shard < self.num_shards:
            raise ConfigError(
                f"--shard is {self.shard}; with --num-shards {self.num_shards} it must be from 0 to "
                f"{self.num_shards - 1}"
            )
        at_least(self, lm_scale=0, passes=0, word_lm_weight=0, lexicon_beam_size=1, lexicon_beam_tokens=1)
        at_least(self, max_contexts=1, max_states=1, ngram_lm_scale=0, hlg_scale=0, num_paths=1)
        for name in ("joint_ctc_weight", "mask_threshold", "rescore_ctc_weight", "tail_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must lie in 0 ... 1")
        for name in ("temperature", "nbest_scale", "beam", "output_beam", "lexicon_beam_threshold"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        added = [f"--{name}" for name in ("lm", "hotwords") if getattr(self, name) is not None]
        if added and self.decoding_method not in ("modified_beam_search", "cif_beam_search"):
            raise ConfigError(
                f"{' and '.join(added)} with --decoding-method {self.decoding_method}: only modified_beam_search and "
                "cif_beam_search weigh hypotheses that they could change; add --decoding-method modified_beam_search, "
                "or cif_beam_search for --system hkd"
            )
        self._refuse_what_does_nothing()
        if self.lodr_arpa is not None and (self.lm is None or not self.lodr_scale < 0):
            raise ConfigError(f"--lodr-arpa goes with --lm, and --lodr-scale (now {self.lodr_scale}) is below 0")

    def _refuse_what_does_nothing(self) -> None:
        for name, default, methods in (
            ("rescore_ctc_weight", 0, ["nar_beam_search"]),
            ("nar_seeds", "greedy", ["nar_beam_search"]),
            ("rank_masks_by", "probability", ["mask_predict", "nar_beam_search"]),
            ("tail_threshold", 0.4, ["cif_greedy_search", "cif_beam_search"]),
            ("word_lm", None, ["ctc_lexicon_beam"]),
        ):
            if getattr(self, name) != default and self.decoding_method not in methods:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} with --decoding-method {self.decoding_method}: "
                    f"it is an option of {' and '.join(methods)}; add --decoding-method {' or '.join(methods)}"
                )
        if self.ctm and self.decoding_method == "joint_beam_search":
            raise ConfigError(
                "--ctm true with --decoding-method joint_beam_search: this search knows no frames of tokens; "
                "take the times of ctc_greedy_search or ctc_prefix_beam_search"
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which model is exported, into which format."""

    exp_dir: Path
    """exp_dir of the training."""
    out_dir: Path
    """Folder of the export; an earlier export there is replaced."""
    mode: Literal["auto", "dense", "streaming", "sparse"] = "auto"
    """Models of --system dualmode, which of them: dense, of whole utterances; sparse, of chunks and without the masked
    weights; streaming, of chunks, of a training without masks."""
    format: Literal["auto", "torchscript", "onnx", "sherpa-onnx", "safetensors"] = "auto"
    """torchscript: three traced modules; onnx: the same three graphs; sherpa-onnx: those with the metadata and the
    tokens.txt that sherpa-onnx reads; safetensors: the model of --mode for decode.py --weights, a sparse one by its
    kept blocks.  auto: safetensors with --mode, else sherpa-onnx."""
    quantize: Literal["none", "int8", "fp16"] = "none"
    """int8: encoder and joiner once more with 8-bit weights (onnx and sherpa-onnx); fp16: the model once more with
    16-bit floats (safetensors)."""
    epoch: int | None = None
    """Export epoch-N.pt; None (and no --iter): the newest."""
    iter: int | None = None
    """Export checkpoint-N.pt instead."""
    avg: int = 1
    """Epochs (or checkpoints) averaged."""
    use_averaged_model: bool = True
    """Use the running averages of the two end points of the range."""
    tail_threshold: float = 0.4
    """CIF recognisers: weight left behind the last whole token above which it makes one more."""
    decode_chunk_size: int | None = None
    """Streaming models: encoder frames of 40 ms a chunk, -1: a model of whole utterances; None: the first trained
    with."""
    left_context_frames: int | None = None
    """Streaming models: encoder frames seen before a chunk; None: the first trained with."""

    def __post_init__(self) -> None:
        at_least(self, epoch=1, iter=1, avg=1)
        if not 0 <= self.tail_threshold <= 1:
            raise ConfigError(f"--tail-threshold is {self.tail_threshold}; it must lie in 0 ... 1")
        if self.left_context_frames == -1 and self.decode_chunk_size != -1:
            raise ConfigError("--left-context-frames is -1; the caches of an exported model have one size: name it")
        if self.format == "torchscript" and self.quantize != "none":
            raise ConfigError(
                f"--quantize {self.quantize} with --format torchscript: TorchScript is offered in float32 alone; "
                "use --format onnx or sherpa-onnx"
            )
        if self.quantize == ("int8" if self.resolved_format == "safetensors" else "fp16"):
            raise ConfigError(
                f"--quantize {self.quantize} with --format {self.resolved_format}: int8 is of onnx and sherpa-onnx, "
                "fp16 of safetensors"
            )
        if self.resolved_format == "safetensors" and self.mode == "auto":
            raise ConfigError(
                "--format safetensors stores one --mode of a training of --system dualmode; for others use "
                "local/average.py --out NAME.safetensors"
            )
        chunks = (self.decode_chunk_size, self.left_context_frames)
        if chunks != (None, None) and (self.resolved_format == "safetensors" or self.mode == "dense"):
            why = "--mode dense hears whole utterances" if self.mode == "dense" else "decode.py --weights chooses them"
            raise ConfigError(
                f"options of chunks with --mode {self.mode} and --format {self.resolved_format}: {why}; leave them out"
            )

    @property
    def resolved_format(self) -> str:
        """Return the format that "auto" stands for."""
        if self.format != "auto":
            return self.format
        return "sherpa-onnx" if self.mode == "auto" else "safetensors"
