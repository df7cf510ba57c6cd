#!/usr/bin/env python3
"""Recognise audio with an exported CIF recogniser, ONNX Runtime and NumPy, without this project's code.

    local/onnx_cif.py exported speech1.flac speech2.wav        (16 kHz, one channel)

The best token at every vector that fired, and the second where it was spoken: docs/decoding.md.
"""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile
from lhotse import Fbank, FbankConfig

# Every graph is opened once, however many files there are.
graph = cache(lambda path: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))


def recognise(folder: Path, samples: np.ndarray) -> tuple[str, list[float]]:
    """Return the text of (S,) float32 samples, and the second of each token."""
    facts, tokens = (json.loads((folder / name).read_text()) for name in ("export.json", "tokenizer.json"))
    encoder, decoder = (graph(folder / f"{name}.onnx") for name in ("encoder", "decoder_step"))
    if len(samples) < 400:  # not one window of 25 ms
        return "", []
    x = np.asarray(Fbank(FbankConfig(sampling_rate=16000, num_filters=80)).extract(samples, 16000))[None]
    c, lens, frames = encoder.run(None, {"x": x, "x_lens": np.array([x.shape[1]])})
    layers, heads, width = facts["cache"]
    keys = values = np.zeros((layers, 1, heads, 0, width), np.float32)
    y, before, found = facts["sos_id"], np.zeros_like(c[:, 0]), []
    for u in range(lens[0]):
        past = {"y": np.array([y]), "c_before": before, "c": c[:, u], "keys": keys, "values": values}
        logits, keys, values = decoder.run(None, past)
        logits[0, [facts[f"{name}_id"] for name in ("blank", "unk", "mask")]] = -np.inf
        y, before = int(logits[0].argmax()), c[:, u]
        if y == facts["sos_id"]:  # the end of the text
            break
        found.append(y)
    text = (" " if tokens["kind"] == "pinyin" else "").join(tokens["tokens"][i] for i in found)
    return " ".join(text.replace("\u2581", " ").split()), (facts["frame_seconds"] * frames[0, : len(found)]).tolist()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        samples, rate = soundfile.read(name, dtype="float32")
        if rate != 16000 or samples.ndim != 1:
            sys.exit(f"{name} has {rate} samples a second and shape {samples.shape}; give it 16000 and one channel")
        print(name, recognise(Path(sys.argv[1]), samples)[0])
