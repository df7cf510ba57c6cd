"""Greedy transcripts of teachers that can decode: Whisper's own decoder, and CTC heads of fine-tuned SSL models."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from icefall_kd.errors import DataError
from icefall_kd.runtime.files import read_json
from icefall_kd.teachers import hf
from icefall_kd.teachers.ctranslate2 import is_whisper_folder

# Whisper's multilingual vocabularies are this large at least; the English ones are smaller by one.
_MULTILINGUAL_VOCAB = 51865
_MAX_TOKENS = 200


def collapse_ctc(ids: Sequence[int], blank_id: int) -> list[int]:
    """Merge repeated labels, then drop blanks (Graves et al. 2006, the map B)."""
    merged = [x for i, x in enumerate(ids) if i == 0 or x != ids[i - 1]]
    return [x for x in merged if x != blank_id]


def can_transcribe(folder: Path) -> bool:
    """Tell whether the model of a folder has what greedy decoding needs."""
    if is_whisper_folder(folder):
        return (folder / "tokenizer.json").is_file()
    config = read_json(folder / "config.json")
    if config.get("model_type") == "whisper":
        return (folder / "tokenizer.json").is_file()
    is_ctc = any(name.endswith("ForCTC") for name in config.get("architectures") or [])
    return is_ctc and (folder / "vocab.json").is_file()


class WhisperTranscriber:
    """Greedy decoding with a whole Whisper model, float32, one utterance at a time."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the model, its tokenizer and the tokens that are never put out."""
        self.model = hf.whisper_model(folder).to(device)
        self.tokenizer = hf.tokenizer(folder)
        self.device = device
        # CTranslate2 keeps the lists in config.json, transformers in generation_config.json.
        settings: dict = {}
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                settings |= read_json(folder / name)
        self.suppress = settings.get("suppress_ids") or settings.get("suppress_tokens") or []
        self.suppress_first = settings.get("suppress_ids_begin") or settings.get("begin_suppress_tokens") or []
        # All vocabularies of Whisper have the languages between these two.
        first, last = self._token("<|startoftranscript|>") + 1, self._token("<|translate|>")
        self.languages = list(range(first, last)) if self.model.config.vocab_size >= _MULTILINGUAL_VOCAB else []
        self.end = self._token("<|endoftext|>")

    def _token(self, text: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(text)
        if not isinstance(found, int) or found >= self.model.config.vocab_size:
            raise DataError(f"the tokenizer has no {text}; tokenizer.json is not Whisper's")
        return found

    @torch.no_grad()
    def transcribe(self, features: Sequence[Tensor]) -> list[str]:
        """Return the texts of utterances of one language from their log-mel features, (1, M, 3000) each."""
        encoded = [self.model.model.encoder(x.to(self.device)) for x in features]
        prompt = [self._token("<|startoftranscript|>")]
        if self.languages and encoded:
            prompt += [self._language(prompt, encoded), self._token("<|transcribe|>")]
        prompt.append(self._token("<|notimestamps|>"))
        return [self._greedy(prompt, x) for x in encoded]

    def _language(self, prompt: list[int], encoded: Sequence) -> int:
        """Return the token of the language that is the most probable of all utterances together.

        One word does not tell its language: of isolated Mandarin words Whisper base takes a fifth for Thai,
        Korean or Portuguese, and writes them down as such.
        """
        logits = torch.stack([self._step(prompt, x, None)[0][self.languages] for x in encoded])
        return self.languages[int(logits.log_softmax(dim=1).sum(dim=0).argmax())]

    def _greedy(self, prompt: list[int], encoded) -> str:
        limit = min(_MAX_TOKENS, self.model.config.max_target_positions - len(prompt))
        tokens: list[int] = []
        cache, fed = None, prompt
        while len(tokens) < limit:
            logits, cache = self._step(fed, encoded, cache)
            logits[self.suppress] = -torch.inf
            if not tokens:
                logits[self.suppress_first] = -torch.inf
            best = int(logits.argmax())
            if best == self.end:
                break
            tokens.append(best)
            fed = [best]
        return self.tokenizer.decode([t for t in tokens if t < self.end]).strip()

    def _step(self, tokens: list[int], encoded, cache) -> tuple[Tensor, object]:
        """Feed tokens and return the last one's logits (V,) and the cache."""
        ids = torch.tensor([tokens], device=self.device)
        out = self.model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        return out.logits[0, -1].float(), out.past_key_values


class CtcTranscriber:
    """Greedy decoding with the CTC head of a fine-tuned HuBERT, WavLM or wav2vec 2.0."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the model with its head, and its vocabulary."""
        self.model = hf.ctc_model(folder).to(device)
        self.symbols = {index: symbol for symbol, index in read_json(folder / "vocab.json").items()}
        self.blank_id = self.model.config.pad_token_id
        self.device = device

    @torch.no_grad()
    def transcribe(self, audio: Tensor) -> str:
        """Return the text of one utterance (1, S), normalised as the model wants it."""
        ids = self.model(audio.to(self.device)).logits[0].argmax(dim=-1).tolist()
        symbols = [self.symbols.get(i, "") for i in collapse_ctc(ids, self.blank_id)]
        text = "".join(s for s in symbols if not (s.startswith("<") and s.endswith(">")))
        return " ".join(text.replace("|", " ").split())
