"""The one module that imports transformers: builds the pre-trained modules that teachers run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.teachers import ctranslate2


@functools.cache
def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"this teacher needs transformers ({error}); type: pip install transformers") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def version() -> str:
    """Return the version of transformers."""
    return _transformers().__version__


def mel_filters(num_mel_bins: int) -> Tensor:
    """Return Whisper's mel filters (num_mel_bins, 201) float32 for 16 kHz and an FFT of 400."""
    _transformers()
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=201,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=16000,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float().T.contiguous()


def _pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """Return what a class of transformers reads from a folder, whose own code, if it has any, is not run.

    Raises:
        ConfigError: nothing but its own code makes a model of it.
        DataError: its files are damaged or missing.
    """
    try:
        # Left out, trust_remote_code asks whoever sits at the keyboard.
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (SafetensorError, OSError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"teacher {folder} cannot be loaded ({reason}); fetch or copy its files again") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{folder} is of no kind that transformers knows, but of code that comes with it, which is not run; if you "
            "trust it, wrap it into a class of yours: --teacher FILE.py:CLASS (docs/own_teacher.md)"
        ) from error


def load_config(folder: Path) -> Any:
    """Return the transformers configuration of a model folder."""
    return _pretrained(_transformers().AutoConfig, folder)


def whisper_encoder(folder: Path) -> nn.Module:
    """Return a float32 ``WhisperEncoder`` from a transformers or a CTranslate2 folder."""
    transformers = _transformers()
    if ctranslate2.is_whisper_folder(folder):
        model = ctranslate2.read_model(folder / "model.bin")
        config = transformers.WhisperConfig(**ctranslate2.whisper_config(model), **_WHISPER_TOKENS)
        encoder = _empty(transformers.models.whisper.modeling_whisper.WhisperEncoder, config)
        _assign(encoder, ctranslate2.encoder_state_dict(model, config.encoder_layers), folder)
        return encoder
    config = load_config(folder)
    if config.model_type != "whisper":
        raise ConfigError(f"{folder} holds a {config.model_type} model, not Whisper")
    return _pretrained(transformers.WhisperModel, folder, dtype=torch.float32).encoder.eval()


def whisper_model(folder: Path) -> nn.Module:
    """Return a whole float32 ``WhisperForConditionalGeneration``, for decoding in the teacher check."""
    transformers = _transformers()
    if not ctranslate2.is_whisper_folder(folder):
        return _pretrained(transformers.WhisperForConditionalGeneration, folder, dtype=torch.float32).eval()
    source = ctranslate2.read_model(folder / "model.bin")
    config = transformers.WhisperConfig(**ctranslate2.whisper_config(source), **_WHISPER_TOKENS)
    model = _empty(transformers.WhisperForConditionalGeneration, config)
    encoder = ctranslate2.encoder_state_dict(source, config.encoder_layers)
    decoder = ctranslate2.decoder_state_dict(source, config.decoder_layers)
    state = {f"model.encoder.{k}": v for k, v in encoder.items()}
    state |= {f"model.decoder.{k}": v for k, v in decoder.items()}
    state["proj_out.weight"] = source.tensor("decoder/projection/weight")
    _assign(model, state, folder)
    return model


def speech_ssl_model(folder: Path) -> nn.Module:
    """Return a float32 HuBERT, WavLM, wav2vec 2.0 or data2vec model, without any task's head.

    SDPA attention is asked for where the family has it; both attention kernels are exact.
    """
    return _pretrained(_transformers().AutoModel, folder, dtype=torch.float32).eval()


def speech_ssl_from_tensors(
    model_type: str, options: dict[str, Any], state: dict[str, Tensor], path: Path
) -> nn.Module:
    """Return a float32 model of the given configuration and weights.

    Args:
        model_type: transformers' name of the family.
        options: of its configuration.
        state: all weights, by transformers' names.
        path: their file, for messages.
    Raises:
        DataError: names or shapes of the weights are not those of the configuration.
    """
    transformers = _transformers()
    # Without masking in training there is no embedding of masked frames.
    config = transformers.AutoConfig.for_model(model_type, **options, mask_time_prob=0.0, mask_feature_prob=0.0)
    model = _empty(transformers.AutoModel.from_config, config)
    _assign(model, state, path)
    return model


def hubert_layers(**options: Any) -> nn.Module:
    """Return positional convolution, LayerNorm, dropout and layers (post-norm) of a new HuBERT model.

    Their initial values are transformers', those of BERT; the convolution's are torch's own, of about the size that
    wav2vec 2.0 has, because its weight norm hides the weight from transformers.

    Args:
        options: of transformers' configuration.
    """
    transformers = _transformers()
    config = transformers.HubertConfig(**options, layerdrop=0.0, conv_dim=(1,) * 7, feat_extract_norm="layer")
    return transformers.HubertModel(config).encoder


def ctc_model(folder: Path) -> nn.Module:
    """Return a float32 HuBERT, WavLM, wav2vec 2.0 or data2vec model with its CTC head."""
    return _pretrained(_transformers().AutoModelForCTC, folder, dtype=torch.float32).eval()


def tokenizer(folder: Path) -> Any:
    """Return the fast tokenizer of a Whisper folder (its ``tokenizer.json``)."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; decoding with the teacher needs it")
    return _transformers().PreTrainedTokenizerFast(tokenizer_file=str(path))


def language_model(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return a masked or causal language model of a folder, without its head.

    Raises:
        ConfigError: it is no model of transformers, or an encoder and a decoder.
        DataError: its files are damaged, or lack weights.
    """
    try:
        config = load_config(folder)
    except ValueError as error:
        raise ConfigError(f"{folder} holds no language model of transformers ({error})") from error
    if config.is_encoder_decoder:
        raise ConfigError(f"{folder} holds an encoder and a decoder; a language model here is either of them")
    # Models with a head for words have no pooler: nobody asks for its output, and nobody need read that it is missing.
    messages = _transformers().utils.logging
    verbosity = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        model, loaded = _pretrained(_transformers().AutoModel, folder, dtype=dtype, output_loading_info=True)
    finally:
        messages.set_verbosity(verbosity)
    if lacking := sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler.")):
        raise DataError(f"{folder} has no weights for {', '.join(lacking[:5])}; is it a language model?")
    return model.eval().requires_grad_(False)


def text_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a language model's folder, which tells the characters of every piece.

    Raises:
        ConfigError: it cannot tell them.
    """
    found = _pretrained(_transformers().AutoTokenizer, folder)
    if not found.is_fast:
        raise ConfigError(
            f"{folder} has a {type(found).__name__} that does not tell which characters a piece stands for; use a "
            "model with a tokenizer.json, or a vocab.txt of WordPiece"
        )
    return found


def random_language_model(causal: bool) -> tuple[nn.Module, Any]:
    """Return a tiny model with random weights and its tokenizer, a piece a character: it has learnt nothing.

    It knows letters, digits, the apostrophe and the 20992 common ideographs.
    """
    transformers = _transformers()
    letters = [chr(c) for c in range(33, 127)]
    table = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    table += [chr(c) for c in range(0x4E00, 0xA000)]
    names = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(table)}, model_max_length=512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if causal:
            config = transformers.GPT2Config(
                vocab_size=len(table), n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2
            )
            model = transformers.GPT2Model(config)
        else:
            config = transformers.BertConfig(
                vocab_size=len(table), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
            )
            model = transformers.BertModel(config, add_pooling_layer=False)
    return model.eval().requires_grad_(False), names


# Token ids of the configuration are not used by the encoder; the class' defaults are out of range for tiny
# vocabularies in tests, so they are pinned to 0.
_WHISPER_TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}


def _empty(cls: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """Build a module without spending time on initial values."""
    with torch.device("meta"):
        return cls(config).eval()


def _assign(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in state.items()}
    problems = [f"no weights for {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [
        f"{name} has shape {shape}, the model wants {expected.get(name)}"
        for name, shape in found.items()
        if expected.get(name) != shape
    ]
    if problems:
        raise DataError(f"{folder} does not fit its model: {'; '.join(problems)}")
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
