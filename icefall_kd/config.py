"""Every option of the project, as frozen dataclasses; one thin command line over them.

A command's configuration is a dataclass whose fields are groups (the dataclasses below); on the
command line and in YAML all fields are flat, since a field name occurs once among the groups of a command.
Precedence: defaults < ``--config conf/x.yaml`` < flags.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from icefall_kd.errors import ConfigError

Kd = Literal["none", "l1", "l2", "mvq"]


def _at_least(config: object, **minima: float) -> None:
    """Raise a ConfigError for the first field below its minimum."""
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is not None and not value >= minimum:  # NaN is below everything
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where training data is and how it is batched."""

    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz as prepare.sh writes it."""
    lang_dir: Path = Path("data/lang_bpe_500")
    """Folder of the tokenizer (tokenizer.json)."""
    train_parts: list[str] = field(default_factory=lambda: ["train"])
    """Parts to train on: names in manifest-dir, or paths of lhotse cut sets."""
    valid_parts: list[str] = field(default_factory=lambda: ["dev"])
    """Parts to validate on."""
    valid_utts: int | None = None
    """Validate on so many utterances, evenly spaced over the parts; None: on all."""
    features: Literal["precomputed", "on_the_fly"] = "precomputed"
    """Read stored Fbank features, or compute them from audio in the workers."""
    max_duration: float = 200.0
    """Seconds of audio a batch (and a rank)."""
    max_tokens: int | None = None
    """Upper limit of padded tokens (utterances x longest) a batch; None: no limit."""
    min_utt_duration: float = 0.3
    """Shorter utterances are left out, in seconds."""
    max_utt_duration: float = 20.0
    """Longer utterances are left out of training, in seconds."""
    num_buckets: int = 10
    """Buckets of similar duration."""
    num_workers: int = 2
    """Loader processes; 0 loads in the training process."""
    drop_last: bool = False
    """Drop the last, smaller batch of an epoch."""

    def __post_init__(self) -> None:
        _at_least(self, valid_utts=1, max_duration=0.1, max_tokens=1)
        _at_least(self, num_buckets=1, num_workers=0, min_utt_duration=0)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of the student's input; the teacher always hears clean audio."""

    spec_aug: bool = True
    """Apply SpecAugment."""
    spec_aug_time_warp_factor: int = 0
    """Time warp in frames, 0 or less: off.  Refused together with frame-level teacher labels."""
    spec_aug_p: float = 0.9
    """Probability of SpecAugment for an utterance."""
    num_frame_masks: int = 10
    """Most time masks an utterance."""
    max_frames_mask_fraction: float = 0.15
    """Largest fraction of masked frames."""
    frames_mask_size: int = 100
    """Longest time mask in frames."""
    num_feature_masks: int = 2
    """Frequency masks."""
    features_mask_size: int = 27
    """Widest frequency mask in bins."""
    musan_cuts: Path | None = None
    """Cut set of noises to mix in; None: no noise."""
    musan_p: float = 0.5
    """Probability of noise for an utterance."""
    musan_snr: tuple[float, float] = (10.0, 20.0)
    """Range of the signal-to-noise ratio in dB."""

    def __post_init__(self) -> None:
        _at_least(self, num_frame_masks=1, frames_mask_size=2, num_feature_masks=0, features_mask_size=1)
        for name in ("spec_aug_p", "musan_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; a probability is in 0 ... 1")
        if not 0 < self.max_frames_mask_fraction <= 1:
            raise ConfigError(
                f"--max-frames-mask-fraction is {self.max_frames_mask_fraction}; it must be above 0 and at most 1"
            )


# Named encoder sizes: layers, dim, heads, feed-forward dim, convolution kernel.
ENCODER_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (6, 144, 4, 576, 15),
    "small": (12, 144, 4, 576, 31),
    "medium": (12, 256, 4, 1024, 31),
    "large": (12, 512, 8, 2048, 31),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student: Conformer encoder, stateless decoder, joiner, optional CTC head."""

    encoder_size: Literal["tiny", "small", "medium", "large"] = "medium"
    """Named size; the overrides below replace single numbers of it."""
    num_encoder_layers: int | None = None
    """Override of the number of layers."""
    encoder_dim: int | None = None
    """Override of the model dimension."""
    num_heads: int | None = None
    """Override of the attention heads."""
    feedforward_dim: int | None = None
    """Override of the feed-forward dimension."""
    cnn_kernel: int | None = None
    """Override of the convolution kernel (odd)."""
    feature_dim: int = 80
    """Mel bins of the input."""
    subsampling_channels: tuple[int, int, int] = (8, 32, 128)
    """Channels of the three subsampling convolutions; fewer make a tiny model faster."""
    dropout: float = 0.1
    """Dropout of the encoder."""
    layer_dropout: float = 0.0
    """Probability that a layer is bypassed in training."""
    decoder_dim: int = 256
    """Dimension of the stateless decoder."""
    joiner_dim: int = 256
    """Dimension of the joiner."""
    context_size: int = 2
    """Tokens of context of the stateless decoder."""
    streaming: bool = False
    """A student that hears chunk by chunk; each training batch draws a chunk size and a left context from these:"""
    chunk_size: list[int] = field(default_factory=lambda: [16, 8, 32, -1])
    """Chunk sizes in encoder frames of 40 ms, -1: the whole utterance.  The first serves validation and, unless
    decode.py is told otherwise, decoding."""
    left_context_frames: list[int] = field(default_factory=lambda: [64, 32, 128, -1])
    """Encoder frames before its chunk that a frame sees, -1: all; the first as above."""
    convolution: Literal["causal", "chunk"] = "causal"
    """Of a streaming student: causal (no later frame), or chunk (later frames of the same chunk, Li et al. 2023)."""

    def __post_init__(self) -> None:
        for name in ("chunk_size", "left_context_frames"):
            values = getattr(self, name)
            if not values or any(value < 1 and value != -1 for value in values):
                raise ConfigError(f"--{name.replace('_', '-')} is {values}; give frames of 40 ms, -1 for no limit")


@dataclass(frozen=True, kw_only=True)
class AsrLossConfig:
    """Transducer and CTC losses."""

    rnnt_backend: Literal["auto", "torch", "k2", "fast_rnnt"] = "auto"
    """Which implementation computes the pruned transducer loss."""
    prune_range: int = 5
    """Symbols a frame that the full joiner sees."""
    lm_scale: float = 0.25
    """Smoothing with the decoder alone."""
    am_scale: float = 0.0
    """Smoothing with the encoder alone."""
    simple_loss_scale: float = 0.5
    """Scale of the simple loss after the warm-up."""
    rnnt_warm_step: int = 2000
    """Steps over which the simple loss fades to its scale and the pruned loss grows from 0.1 to 1."""
    transducer_scale: float = 1.0
    """Scale of the transducer losses; 0 builds no transducer (CTC alone)."""
    ctc_scale: float = 0.2
    """Scale of the CTC loss; 0 builds no CTC head."""

    def __post_init__(self) -> None:
        _at_least(self, prune_range=2, lm_scale=0, am_scale=0, transducer_scale=0, ctc_scale=0, rnnt_warm_step=0)
        if self.lm_scale + self.am_scale > 1:
            raise ConfigError(f"--lm-scale {self.lm_scale} and --am-scale {self.am_scale} add up to more than 1")
        if self.transducer_scale == 0 and self.ctc_scale == 0:
            raise ConfigError("--transducer-scale and --ctc-scale are both 0: there is nothing to train")


@dataclass(frozen=True, kw_only=True)
class KdConfig:
    """Distillation: whether and how, and where the labels come from."""

    kd: Kd = "none"
    """none, l1 or l2 embedding regression, or mvq codebook indexes."""
    teacher_labels: Literal["stored", "online"] = "stored"
    """Read labels from label-dir, or run the teacher (and the quantizer) in training."""
    label_dir: list[Path] = field(default_factory=list)
    """One or several stored label sets."""
    kd_layer: list[int] = field(default_factory=lambda: [0])
    """Student layer (1-based) of each label set; 0: the middle layer, num_layers // 2."""
    kd_scale: list[float] = field(default_factory=lambda: [0.1])
    """Scale of each label set's loss (summed over frames and codebooks)."""
    codebook_head: Literal["independent", "joint"] = "independent"
    """Independent classifiers, or each codebook conditioned on the earlier ones."""
    min_coverage: float = 1.0
    """Least fraction of training utterances that must have labels."""
    quantizer: Path | None = None
    """Quantizer file, needed for mvq with online labels."""
    online_refine_iters: int = 5
    """Refinement searches of online codes; as many as the stored labels had."""
    kd_delay: int = 0
    """Student frames of 40 ms by which teacher labels come late: a streaming layer has not heard yet what they tell."""

    def __post_init__(self) -> None:
        _at_least(self, kd_delay=0)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which teacher, which layer, and how it is run."""

    teacher: str = "whisper-tiny.en"
    """Hub id, local folder (transformers or CTranslate2 Whisper), state dict of fairseq or torchaudio, an exp_dir of
    ours, FILE.py:CLASS, or the name of a pip-supplied model (whisper-tiny.en, whisper-base)."""
    layer: int = -1
    """Transformer block whose output is taken, 1-based; -1: the last block."""
    normalize_embeddings: bool = False
    """Apply LayerNorm without parameters to the embeddings."""
    long_utterances: Literal["window", "reject"] = "window"
    """Utterances longer than the teacher's limit: overlapping windows, or reject."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    teacher_device: str = "auto"
    """auto: the GPU when there is one."""


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Multi-codebook quantizer and its training."""

    num_codebooks: int = 8
    """Codebooks, i.e. bytes a frame: 1, 2, 4, 8, 16 or 32."""
    phase1_steps: int = 10000
    """Steps with 2 x num-codebooks codebooks of 16 entries."""
    phase2_steps: int = 10000
    """Steps with num-codebooks codebooks of 256 entries."""
    frames_per_step: int = 512
    """Frames of a training step."""
    quantizer_utts: int = 1000
    """Utterances of the training sample, drawn with the seed, stratified by duration."""
    entropy_scale: float = 0.01
    """Weight of the entropy term."""
    refine_iters: int = 5
    """Refinement searches at extraction."""
    quantizer_seed: int = 42
    """Seed of sample and initialisation."""
    quantizer_init: Literal["random", "data"] = "data"
    """Start from k-means in balanced subspaces of the data, or from random numbers, as multi_quantization does."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to extract, from which cuts, into which label set."""

    cuts: list[Path]
    """Cut sets (cuts_*.jsonl.gz), several as a,b."""
    label_dir: Path
    """Folder of the label set."""
    kind: Literal["codebook_indexes", "embeddings"] = "codebook_indexes"
    """Codes of a quantizer, or the embeddings themselves."""
    quantizer: Path | None = None
    """Quantizer file; needed for codebook_indexes."""
    refine_iters: int = 5
    """Refinement searches of the quantizer."""
    embeddings_dtype: Literal["float16", "float32"] = "float16"
    """Type in which embeddings are stored."""
    shard: int = 0
    """Which shard to extract, from 0."""
    num_shards: int = 1
    """Into how many shards the set is divided."""
    extract_max_duration: float = 100.0
    """Seconds of padded audio a batch."""
    part_utterances: int = 100
    """Utterances a part: what a kill can cost at most."""
    load_workers: int = 2
    """Threads that read audio ahead."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    max_reject_ratio: float = 0.05
    """Largest fraction of utterances that may be rejected before the shard fails."""
    teacher: TeacherConfig = TeacherConfig()

    def __post_init__(self) -> None:
        if self.kind == "codebook_indexes" and self.quantizer is None:
            raise ConfigError("--kind codebook_indexes needs --quantizer FILE (or choose --kind embeddings)")
        if not 0 <= self.shard < self.num_shards:
            raise ConfigError(f"--shard is {self.shard}; with --num-shards {self.num_shards} it runs from 0")
        if self.part_utterances < 1 or self.extract_max_duration <= 0 or self.load_workers < 1:
            raise ConfigError("--part-utterances, --extract-max-duration and --load-workers must be positive")


@dataclass(frozen=True, kw_only=True)
class LayersConfig(TeacherConfig):
    """Which teacher, which layers, and how it is run."""

    layer: list[int] = field(default_factory=lambda: [-1])
    """Transformer blocks whose outputs are taken, 1-based, several as 6,12; -1: the last block."""


@dataclass(frozen=True, kw_only=True)
class ExtractLayersConfig(ExtractConfig):
    """What to extract, from which cuts, into which label sets: one for each layer."""

    label_dir: list[Path]
    """Folder of the label set of each layer, several as a,b."""
    quantizer: list[Path] = field(default_factory=list)
    """Quantizer file of each layer; needed for codebook_indexes."""
    teacher: LayersConfig = LayersConfig()

    def __post_init__(self) -> None:
        self.each()  # the checks of each label set

    def each(self) -> list[ExtractConfig]:
        """Return the configuration of every label set.

        Raises:
            ConfigError: layers, label sets and quantizers are not equally many, or one label set is named twice.
        """
        layers, codes = self.teacher.layer, self.kind == "codebook_indexes"
        quantizers = self.quantizer if self.quantizer or codes else [None] * len(layers)
        if not len(layers) == len(self.label_dir) == len(quantizers) or not layers:
            raise ConfigError(
                f"--layer names {len(layers)} layers, --label-dir {len(self.label_dir)} folders, --quantizer "
                f"{len(self.quantizer)} files; give one of each for every label set (a,b), no quantizers for embeddings"
            )
        if len({folder.resolve() for folder in self.label_dir}) < len(self.label_dir):
            raise ConfigError(f"--label-dir names one folder twice: {', '.join(map(str, self.label_dir))}")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        teacher = {f.name: getattr(self.teacher, f.name) for f in fields(self.teacher)}
        return [
            ExtractConfig(
                **values
                | {"label_dir": folder, "quantizer": quantizer, "teacher": TeacherConfig(**teacher | {"layer": layer})}
            )
            for layer, folder, quantizer in zip(layers, self.label_dir, quantizers, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Import of codebook indexes that icefall published."""

    indexes: list[Path]
    """Published manifests (cuts with codebook_indexes, jsonl.gz), several as a,b."""
    cuts: list[Path]
    """Your own cut sets of the same utterances (cuts_*.jsonl.gz), several as a,b."""
    label_dir: Path
    """Folder of the label set."""
    h5_dir: Path | None = None
    """Folder of the .h5 archives; None: where the manifests say, else beside them."""
    frames: Literal["floor", "hubert"] = "floor"
    """Frames stored of n samples at 16 kHz: floor, n // 320, which is what the archives hold; hubert, what HuBERT's
    convolutions give, which keeps the utterances of which an archive holds only so many."""
    num_codebooks: int | None = None
    """Codebooks that the archives must have; None: as many as they have."""
    codebook_size: int = 256
    """Entries of a codebook."""
    num_shards: int = 1
    """Into how many shards the set is divided; one is held in memory at a time."""
    min_coverage: float = 1.0
    """Least fraction of the utterances of cuts that must get labels."""
    teacher: str = "unknown"
    """Name of the teacher, for people."""
    teacher_sha256: str = "unknown"
    """SHA-256 of its weights."""
    layer: int | None = None
    """Layer whose output was quantized; None: unknown."""
    layer_convention: str = "unknown"
    """How the layer is counted, for instance 1-based."""
    normalization: str = "unknown"
    """Normalisation of audio and embeddings."""
    dim: int = 0
    """Channels of the teacher's embeddings; 0: unknown."""
    quantizer_sha256: str = "unknown"
    """SHA-256 of the quantizer's tensors."""

    def __post_init__(self) -> None:
        _at_least(self, num_codebooks=1, codebook_size=2, num_shards=1, min_coverage=0, dim=0)
        if self.codebook_size > 256:
            raise ConfigError(f"--codebook-size is {self.codebook_size}; indexes are stored as bytes, so at most 256")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    optimizer: Literal["scaled_adam", "adamw"] = "scaled_adam"
    """ScaledAdam with Eden, or AdamW with warm-up and Eden decay."""
    base_lr: float = 0.045
    """Peak learning rate."""
    lr_batches: float = 7500.0
    """Eden: batches until the rate falls."""
    lr_epochs: float = 3.5
    """Eden: epochs until the rate falls."""
    lr_warmup_steps: int = 500
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW only."""
    grad_clip: float = 5.0
    """AdamW only: largest gradient norm."""

    def __post_init__(self) -> None:
        _at_least(self, base_lr=0, lr_batches=1, lr_epochs=0.1, lr_warmup_steps=0, weight_decay=0, grad_clip=0)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The training loop."""

    exp_dir: Path = Path("exp")
    """Everything that a training writes lies here."""
    num_epochs: int = 30
    """Epochs to train."""
    max_steps: int | None = None
    """Stop after so many steps (a test or a benchmark); None: only num-epochs counts."""
    seed: int = 42
    """Seed of initialisation, sampling, augmentation and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the model; losses stay in float32."""
    accum_grad: int = 1
    """Batches a step."""
    device: str = "auto"
    """auto: the GPU when there is one."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    log_interval: int = 50
    """Steps between two log lines."""
    valid_interval: int | None = None
    """Steps between two validations; None: only at the end of an epoch."""
    save_every_n: int = 4000
    """Steps between two checkpoint-N.pt."""
    keep_last_k: int = 10
    """checkpoint-N.pt files kept."""
    keep_epochs: int | None = None
    """epoch-N.pt files kept, the last ones; None: all."""
    keep_best: int = 0
    """Besides those, so many epoch-N.pt with the lowest validation loss are kept, for local/average.py --best."""
    average_period: int = 100
    """Steps between two updates of the running averaged model."""
    max_skips: int = 10
    """Non-finite batches in a row that are skipped before the training stops with exit code 3."""
    oom_scan: bool = True
    """Run the memory-worst batches once, with all losses, before step one."""
    start_epoch: int = 1
    """Kept for icefall users: training resumes by itself from the newest checkpoint of exp-dir."""
    init_from: Path | None = None
    """Another exp_dir: parameters of the same name and shape start from its newest (averaged) ones."""

    def __post_init__(self) -> None:
        _at_least(self, num_epochs=1, accum_grad=1, log_interval=1, save_every_n=1, keep_last_k=1, average_period=1)
        _at_least(self, max_steps=1, valid_interval=1, keep_epochs=1, keep_best=0, max_skips=0, start_epoch=1)


DecodingMethod = Literal[
    "greedy_search", "modified_beam_search", "ctc_greedy_search",
    "fast_beam_search", "fast_beam_search_nbest", "fast_beam_search_LG", "fast_beam_search_nbest_LG",
    "ctc_decoding", "ctc_decoding_HLG", "ctc_decoding_nbest_HLG",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decoding and scoring."""

    exp_dir: Path = Path("exp")
    """exp_dir of the training."""
    test_parts: list[str] = field(default_factory=lambda: ["test"])
    """Parts of manifest-dir, paths of lhotse cut sets, or folders of audio with *.trans.txt."""
    manifest_dir: Path = Path("data/fbank")
    """Folder of cuts_<part>.jsonl.gz."""
    decoding_method: DecodingMethod = "greedy_search"
    """Search; those over graphs (fast_beam_search..., ctc_decoding...) need k2."""
    beam_size: int = 4
    """Beam of modified_beam_search."""
    nbest: int = 1
    """Hypotheses a utterance written with their scores (modified_beam_search: at most beam-size)."""
    blank_penalty: float = 0.0
    """Subtracted from the blank's logit in transducer searches; above 0: fewer deletions."""
    temperature: float = 1.0
    """Divides the logits in modified_beam_search and fast_beam_search."""
    lm: Path | None = None
    """Language model over tokens for modified_beam_search: an ARPA file (local/make_ngram.py --lang-dir) or the folder
    of local/train_lm.py; see docs/decoding.md."""
    lm_scale: float = 0.3
    """Scale of its log-probabilities."""
    lodr_arpa: Path | None = None
    """ARPA file of a low-order token n-gram of the training text that is subtracted beside --lm (LODR)."""
    lodr_scale: float = -0.16
    """Scale of that n-gram's log-probabilities, below 0."""
    hotwords: Path | None = None
    """File of phrases that modified_beam_search prefers, one a line; "NEW YORK :2.5" gives a score of its own."""
    hotwords_score: float = 1.5
    """Score of each token of a phrase that has none of its own."""
    ctm: bool = False
    """Write ctm-<part>-<suffix>.ctm: begin and length of every word."""
    lang_dir: Path | None = None
    """Folder of LG.safetensors and HLG.safetensors, for the methods named after them."""
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
        _at_least(self, beam_size=1, nbest=1, epoch=1, iter=1, avg=1, max_duration=0.1, bootstrap=0, tail_padding=0)
        _at_least(self, lm_scale=0)
        _at_least(self, max_contexts=1, max_states=1, ngram_lm_scale=0, hlg_scale=0, num_paths=1)
        for name in ("temperature", "nbest_scale", "beam", "output_beam"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0")
        added = [f"--{name}" for name in ("lm", "hotwords") if getattr(self, name) is not None]
        if added and self.decoding_method != "modified_beam_search":
            raise ConfigError(
                f"{' and '.join(added)} with --decoding-method {self.decoding_method}: only modified_beam_search "
                "weighs hypotheses that they could change; add --decoding-method modified_beam_search"
            )
        if self.lodr_arpa is not None and (self.lm is None or not self.lodr_scale < 0):
            raise ConfigError(f"--lodr-arpa goes with --lm, and --lodr-scale (now {self.lodr_scale}) is below 0")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which model is exported, into which format."""

    exp_dir: Path
    """exp_dir of the training."""
    out_dir: Path
    """Folder of the export; an earlier export there is replaced."""
    format: Literal["torchscript", "onnx", "sherpa-onnx"] = "sherpa-onnx"
    """torchscript: three traced modules; onnx: the same three graphs; sherpa-onnx: those with the metadata and the
    tokens.txt that sherpa-onnx reads."""
    quantize: Literal["none", "int8"] = "none"
    """int8: encoder and joiner once more with 8-bit weights (onnx and sherpa-onnx)."""
    epoch: int | None = None
    """Export epoch-N.pt; None (and no --iter): the newest."""
    iter: int | None = None
    """Export checkpoint-N.pt instead."""
    avg: int = 1
    """Epochs (or checkpoints) averaged."""
    use_averaged_model: bool = True
    """Use the running averages of the two end points of the range."""
    decode_chunk_size: int | None = None
    """Streaming models: encoder frames of 40 ms a chunk, -1: a model of whole utterances; None: the first trained
    with."""
    left_context_frames: int | None = None
    """Streaming models: encoder frames seen before a chunk; None: the first trained with."""

    def __post_init__(self) -> None:
        _at_least(self, epoch=1, iter=1, avg=1)
        if self.left_context_frames == -1 and self.decode_chunk_size != -1:
            raise ConfigError("--left-context-frames is -1; the caches of an exported model have one size: name it")
        if self.format == "torchscript" and self.quantize != "none":
            raise ConfigError(
                f"--quantize {self.quantize} with --format torchscript: TorchScript is offered in float32 alone; "
                "use --format onnx or sherpa-onnx"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of train.py."""

    system: Literal["mvq"] = "mvq"
    """The distillation system."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    asr: AsrLossConfig = AsrLossConfig()
    kd: KdConfig = KdConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
