"""Tiny corpora on disk."""

from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def write_trans(tmp_path):
    """Return a function that writes a trans corpus: ``{part: {utt: (num_samples, text)}}``."""

    def write(parts: dict, rate: int = 16000, root: Path | None = None) -> Path:
        root = root or tmp_path / "corpus"
        for part, rows in parts.items():
            for i, (utt, (num_samples, _)) in enumerate(rows.items()):
                path = root / part / "spk" / f"{utt}.flac"
                path.parent.mkdir(parents=True, exist_ok=True)
                wave = np.random.default_rng(i).standard_normal(num_samples) * 0.1
                soundfile.write(path, wave, rate, subtype="PCM_16")
            lines = [f"{utt} {text}\n" for utt, (_, text) in rows.items() if text is not None]
            (root / part / "x.trans.txt").write_text("".join(lines), encoding="utf-8")
        return root

    return write


@pytest.fixture
def corpus_dir(write_trans) -> Path:
    """Two parts: five utterances to train on, two to validate."""
    words = ["one two", "three", "four five six", "two two", "it's one"]
    train = {f"t{i}": (16000 + 1601 * i, text) for i, text in enumerate(words)}
    return write_trans({"train": train, "dev": {"d0": (16080, "two one"), "d1": (12345, "six")}})
