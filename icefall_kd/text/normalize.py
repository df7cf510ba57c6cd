"""The one text normalisation: transcripts pass through it in data preparation, references in scoring."""

import unicodedata
from typing import Literal

from icefall_kd.errors import ConfigError

Language = Literal["en", "zh"]
# Recorded in corpus.json, tokenizer.json and errs files; a change of the rules changes the version.
NORMALIZATION = {
    "en": "en-v1: NFKC, upper case, apostrophes inside words kept, other punctuation becomes a space",
    "zh": "zh-v1: NFKC, upper case, punctuation and all spaces removed",
}


def normalize_text(text: str, language: Language) -> str:
    """Return the normalised form of a transcript, which is its own normalised form.

    Args:
        text: any transcript.
        language: "en" for languages written with spaces, "zh" for Mandarin.
    """
    if language not in NORMALIZATION:
        raise ConfigError(f"language is {language!r}; text normalisation knows {', '.join(NORMALIZATION)}")
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").upper()
    text = unicodedata.normalize("NFKC", text)
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LNM" else " " for c in text)
    words = [w for w in (word.strip("'") for word in kept.split()) if w]
    return (" " if language == "en" else "").join(words)
