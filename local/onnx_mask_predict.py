#!/usr/bin/env python3
"""Recognise audio with an exported Mask-CTC student, ONNX Runtime and NumPy, without this project's code.

    local/onnx_mask_predict.py exported speech1.flac speech2.wav        (16 kHz, one channel)

K passes of easy-first mask-predict over the greedy CTC string (Higuchi et al. 2020): docs/nar.md.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
from lhotse import Fbank, FbankConfig

PASSES, THRESHOLD = 10, 0.99
# Every graph is opened once, however many files there are.
graph = cache(lambda path: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


def recognise(folder: Path, samples: np.ndarray) -> str:
    """Return the text of (S,) float32 samples."""
    facts, tokens = (json.loads((folder / name).read_text()) for name in ("export.json", "tokenizer.json"))
    encoder, decoder = (graph(folder / f"{name}.onnx") for name in ("encoder", "masked_decoder"))
    if len(samples) < 400:  # not one window of 25 ms
        return ""
    x = np.asarray(Fbank(FbankConfig(sampling_rate=16000, num_filters=80)).extract(samples, 16000))[None]
    memory, lens, log_probs = encoder.run(None, {"x": x, "x_lens": np.array([x.shape[1]])})
    best = log_probs[0, : lens[0]].argmax(axis=1)
    prob = np.exp(log_probs[0, : lens[0]].max(axis=1))
    runs = np.split(np.arange(len(best)), np.flatnonzero(np.diff(best)) + 1) if len(best) else []
    runs = [run for run in runs if best[run[0]] not in (facts["blank_id"], facts["unk_id"])]
    y = np.array([[best[run[0]] if prob[run].max() >= THRESHOLD else facts["mask_id"] for run in runs]], np.int64)
    left = int((y == facts["mask_id"]).sum())
    count = max(left // PASSES, 1)
    while left:
        passes = {"encoder_out": memory, "encoder_out_lens": lens, "y": y, "y_lens": np.array([len(runs)])}
        logits = decoder.run(None, passes)[0][0].astype(np.float64)
        logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        logits[:, [facts[f"{name}_id"] for name in ("blank", "sos", "unk", "mask")]] = -np.inf
        masked = np.flatnonzero(y[0] == facts["mask_id"])
        count = left if left < 2 * count else count  # the last pass takes what is left
        easiest = masked[np.argsort(-logits[masked].max(axis=1), kind="stable")][:count]
        y[0, easiest] = logits[easiest].argmax(axis=1)
        left -= len(easiest)
    text = (" " if tokens["kind"] == "pinyin" else "").join(tokens["tokens"][i] for i in y[0])
    return " ".join(text.replace("\u2581", " ").split())


if __name__ == "__main__":
    for name in sys.argv[2:]:
        samples, rate = soundfile.read(name, dtype="float32")
        if rate != 16000 or samples.ndim != 1:
            sys.exit(f"{name} has {rate} samples a second and shape {samples.shape}; give it 16000 and one channel")
        print(name, recognise(Path(sys.argv[1]), samples))
