"""Text normalisation: stated, and idempotent."""

import pytest

from icefall_kd.errors import ConfigError
from icefall_kd.text.normalize import NORMALIZATION, normalize_text


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("it's  a well-known thing.", "en", "IT'S A WELL KNOWN THING"),
        ("it\u2019s", "en", "IT'S"),
        ("'tis the dogs' bowl", "en", "TIS THE DOGS BOWL"),
        ("café № 5", "en", "CAFÉ NO 5"),
        ("straße", "en", "STRASSE"),
        ("我 爱，ＡＢＣ！", "zh", "我爱ABC"),
        ("", "en", ""),
        ("...", "zh", ""),
    ],
)
def test_golden_cases(text, language, expected):
    assert normalize_text(text, language) == expected
    assert normalize_text(expected, language) == expected


def test_every_language_is_described_and_others_are_refused():
    assert all(NORMALIZATION[language].startswith(f"{language}-v") for language in ("en", "zh"))
    with pytest.raises(ConfigError, match="knows en, zh"):
        normalize_text("a", "fr")
