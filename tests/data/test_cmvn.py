"""Statistics of log-mel features."""

import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording
from safetensors.torch import load_file
from ssl_toys import speech_like, write_speech

from icefall_kd.data.cmvn import compute_cmvn
from icefall_kd.data.features import snipped_fbank
from icefall_kd.errors import DataError
from icefall_kd.models.fbank_front import FbankFrontEnd


def test_statistics_are_those_of_all_frames(tmp_path):
    durations = [0.7, 1.1, 0.02, 0.9]  # one of which has no frame of 25 ms
    write_speech(tmp_path, "train", durations, features=False)
    out = tmp_path / "made" / "cmvn.safetensors"
    count = compute_cmvn(tmp_path / "manifests", ["train"], out)
    waves = [torch.from_numpy(soundfile.read(f, dtype="float32")[0]) for f in sorted((tmp_path / "audio").iterdir())]
    frames = torch.cat([snipped_fbank(w.unsqueeze(0))[0] for w in waves if len(w) >= 400])
    assert count == len(frames) and len(waves[0]) == len(speech_like(0.7, 0))
    found = load_file(out)
    torch.testing.assert_close(found["mean"], frames.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["std"], frames.std(dim=0, correction=0), rtol=1e-4, atol=1e-4)
    front = FbankFrontEnd(8)
    front.load_cmvn(out)
    features, lens = front.features(waves[0].unsqueeze(0), torch.tensor([len(waves[0])]))
    assert features.shape[1] == int(lens[0]) and features.abs().mean() < 2
    some = compute_cmvn(tmp_path / "manifests", ["train"], out, utterances=2)  # the first and the third
    assert some == (len(waves[0]) - 400) // 160 + 1


def test_silence_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", torch.zeros(16000).numpy(), 16000)
    recording = Recording.from_file(tmp_path / "a.wav", recording_id="a")
    CutSet.from_cuts([MonoCut("a", 0.0, 1.0, 0, recording=recording)]).to_file(tmp_path / "cuts_train.jsonl.gz")
    with pytest.raises(DataError, match="never changes: train is silent"):
        compute_cmvn(tmp_path, ["train"], tmp_path / "cmvn.safetensors")
