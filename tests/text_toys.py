"""Language models, cut sets and texts small enough for tests."""

import json
import random
from pathlib import Path

import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from torch.nn import functional as F

from icefall_kd.labels.keys import speed_copy
from icefall_kd.text.wordpiece import WordPieces

RATE = 16_000
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PARTS = ["the", "th", "he", "cat", "ca", "at", "sat", "mat", "on", "it", "s", "ing", "neil", "ill", "cafe", "o"]
HANZI = "今天我们去北京网络"


def write_bert(folder: Path, hidden=16, positions=40, letters="abcdefghijklmnopqrstuvwxyz'5") -> Path:
    """Write a tiny BERT with an uncased WordPiece vocabulary as its authors would: config, weights, vocab.txt."""
    import transformers

    table = [*SPECIALS, *letters, *(f"##{c}" for c in letters), *PARTS, *(f"##{p}" for p in PARTS), *HANZI]
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(dict.fromkeys(table)), hidden_size=hidden, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=positions, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(table)) + "\n")
    facts = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def write_gpt2(folder: Path, positions=40) -> Path:
    """Write a tiny GPT-2 with byte-level pieces."""
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [" the cat sat on the mat", "the cats hat it's"] * 9, vocab_size=290, special_tokens=["<|endoftext|>"]
    )
    end = "<|endoftext|>"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, model_max_length=positions
    ).save_pretrained(folder)
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=bpe.get_vocab_size(), n_positions=positions, n_embd=16, n_layer=3, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def write_xlmr(folder: Path, positions=40) -> Path:
    """Write a tiny XLM-RoBERTa, in which a space in front of a word is often a piece of its own."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    table = [*((name, 0.0) for name in specials), *((c, -4.0) for c in ["\u2581", *"aceht", "\u2581cat", *HANZI])]
    pieces = Tokenizer(models.Unigram(table, unk_id=3))
    pieces.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), specials, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, cls_token="<s>", sep_token="</s>", model_max_length=positions, **names
    ).save_pretrained(folder)
    torch.manual_seed(5)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(table), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions + 2, initializer_range=0.5,
    )  # fmt: skip
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def bert_by_hand(state: dict[str, torch.Tensor], ids: list[int], heads: int, layers: int) -> list[torch.Tensor]:
    """Return the states (T, C) behind every layer of BERT for one text, computed from its weights alone."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    table = {name: state[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = norm(table["word"][ids] + table["position"][: len(ids)] + table["token_type"][0], "embeddings.LayerNorm")
    found = []
    for i in range(layers):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{name}").view(len(ids), heads, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        attention = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (attention @ v).transpose(0, 1).reshape(len(ids), -1)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        found.append(x)
    return found


def text_cuts(path: Path, texts, speeds=("1",), seconds=1.0) -> Path:
    """Write a cut set of recordings that are nowhere, with these texts, at each speed."""
    cuts = []
    for i, text in enumerate(texts):
        samples = round(seconds * RATE)
        source = AudioSource("file", [0], f"rec{i}.wav")
        recording = Recording(f"rec{i}", [source], RATE, samples, samples / RATE)
        cut = MonoCut(f"utt{i}", 0.0, recording.duration, 0, recording=recording)
        cut.supervisions = [SupervisionSegment(f"utt{i}", f"rec{i}", 0.0, recording.duration, text=text)]
        cuts += [speed_copy(cut, speed) for speed in speeds]
    path.parent.mkdir(parents=True, exist_ok=True)
    CutSet.from_cuts(cuts).to_file(path)
    return path


def random_texts(count: int, spaced=True, seed=1) -> list[str]:
    """Return normalised texts of words that a toy vocabulary cuts up in many ways."""
    draw = random.Random(seed)

    def word() -> str:
        made = "".join(draw.choices([*PARTS, *"abcdefghijklmnopqrstuvwxyz"], k=draw.randint(1, 4)))
        made += draw.choice(["", "", "'s", "'neill", "5"])
        if draw.random() < 0.1 or not spaced:
            made = draw.choice(HANZI) + made * (draw.random() < 0.4) + draw.choice(HANZI)
        return made.upper().replace("CAFE", draw.choice(["CAFE", "CAFÉ"]))

    return [("" if not spaced else " ").join(word() for _ in range(draw.randint(1, 6))) for _ in range(count)]


def halved_words(texts) -> WordPieces:
    """Return word pieces as of a language model that cuts every word in two."""
    pieces = []
    for text in texts:
        spans, place = [], 0
        for word in text.split(" "):
            middle = place + (len(word) + 1) // 2
            spans += [(a, b, True) for a, b in ((place, middle), (middle, place + len(word))) if a < b]
            place += len(word) + 1
        pieces.append(spans)
    return WordPieces.collect(texts, pieces)
