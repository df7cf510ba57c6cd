"""The searches of --system nar through the runner: files, masked share, n-best lines."""

import json

import pytest
import torch

from icefall_kd.config import AttentionDecoderConfig, DecodeConfig, ModelConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.decode.runner import build_decoder, decode_parts
from icefall_kd.decode.suffix import decode_suffix
from icefall_kd.errors import ConfigError
from icefall_kd.systems.nar import NarSystem
from icefall_kd.text.tokenizer import Tokenizer

METHODS = {
    "ar": ["ctc_greedy_search", "ctc_prefix_beam_search", "joint_beam_search"],
    "mlm": ["ctc_greedy_search", "ctc_prefix_beam_search", "mask_predict", "nar_beam_search"],
}


@pytest.fixture
def tokenizer():
    return Tokenizer.train_char(["THE CAT SAT", "A DOG RAN"])


def make_system(tokenizer, kind):
    torch.manual_seed(0)
    model = ModelConfig(encoder_size="tiny", num_encoder_layers=1, encoder_dim=16, num_heads=2, feedforward_dim=16)
    attention = AttentionDecoderConfig(attention_decoder=kind, num_decoder_layers=1, decoder_feedforward_dim=16)
    system = NarSystem(TrainConfig(model=model, attention=attention), tokenizer.vocab_size)
    with torch.no_grad():
        system.model.ctc_output.weight.mul_(12)
    return system


def batches():
    g = torch.Generator().manual_seed(0)
    for ids in (["u3", "u1"], ["u2"]):
        x = torch.randn(len(ids), 90, 80, generator=g)
        yield Batch(ids=ids, texts=["THE CAT"] * len(ids), durations=[0.9] * len(ids), features=x,
                    x_lens=torch.tensor([90, 61][: len(ids)]))  # fmt: skip


def decode(tmp_path, tokenizer, method, kind, **options):
    config = DecodeConfig(exp_dir=tmp_path, decoding_method=method, epoch=1, bootstrap=10, **options)
    result = decode_parts(make_system(tokenizer, kind), tokenizer, {"test": batches()}, config)["test"]
    (path,) = (tmp_path / method).glob("nbest-*.jsonl")
    return result, [json.loads(line)["nbest"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("kind", "method"), [(kind, method) for kind, names in METHODS.items() for method in names])
def test_every_search_leaves_its_files(tmp_path, tokenizer, kind, method, capsys):
    result, nbest = decode(tmp_path, tokenizer, method, kind, nbest=3, mask_threshold=0.6)
    assert result["decoding_method"] == method and result["rtf"] > 0
    assert all(1 <= len(hyps) <= (3 if "beam" in method else 1) for hyps in nbest)
    printed = capsys.readouterr().out
    if method in ("mask_predict", "nar_beam_search"):
        best = [hyps[0] for hyps in nbest]
        share = sum(h["masked"] for h in best) / sum(len(h["tokens"]) for h in best)
        assert result["masked_share"] == pytest.approx(share) and 0 < share < 1
        assert f"{100 * share:.1f} % of the tokens masked" in printed
    else:
        assert "masked_share" not in result and "masked" not in printed
        keys = ["tokens", "score", "timestamps", "text", "times"]  # nbest files of other searches are as before
        assert all(list(h) == keys for hyps in nbest for h in hyps)


def test_a_system_offers_what_its_decoder_can_do(tokenizer):
    for kind, methods in METHODS.items():
        assert sorted(make_system(tokenizer, kind).decoders()) == sorted(methods)
    with pytest.raises(ConfigError, match="this model offers ctc_greedy_search, ctc_prefix_beam_search, mask_predict"):
        build_decoder(make_system(tokenizer, "mlm"), DecodeConfig(decoding_method="joint_beam_search"))


@pytest.mark.parametrize(
    ("method", "options", "remedy"),
    [
        ("mask_predict", {"rescore_ctc_weight": 0.3}, "nar_beam_search"),
        ("ctc_prefix_beam_search", {"nar_seeds": "prefix_beam"}, "nar_beam_search"),
        ("ctc_greedy_search", {"rank_masks_by": "logit"}, "mask_predict or nar_beam_search"),
        ("joint_beam_search", {"ctm": True}, "ctc_prefix_beam_search"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(method, options, remedy):
    ((name, value),) = options.items()
    said = f"--{name.replace('_', '-')} {str(value).lower()} with --decoding-method {method}: .*{remedy}"
    with pytest.raises(ConfigError, match=said):
        DecodeConfig(decoding_method=method, **options)


@pytest.mark.parametrize(
    ("method", "expected", "others"),
    [
        ("ctc_prefix_beam_search", "ctc_prefix_beam_search_beam-size-4", {"beam_size": 5}),
        ("joint_beam_search", "joint_beam_search_beam-size-4_ctc-weight-0.3", {"beam_size": 5, "joint_ctc_weight": 0}),
        (
            "mask_predict",
            "mask_predict_passes-10_threshold-0.99",
            {"passes": 0, "mask_threshold": 0.9, "rank_masks_by": "logit"},
        ),
        (
            "nar_beam_search",
            "nar_beam_search_beam-size-4_passes-10_threshold-0.99",
            {
                "beam_size": 5, "passes": 3, "mask_threshold": 0.5, "rank_masks_by": "logit",
                "rescore_ctc_weight": 0.3, "nar_seeds": "prefix_beam",
            },
        ),
    ],
)  # fmt: skip
def test_file_names_say_the_parameters(method, expected, others):
    def suffix(**options):
        return decode_suffix(DecodeConfig(decoding_method=method, epoch=3, **options))

    assert suffix() == f"epoch-3_avg-1_{expected}_use-averaged-model"
    assert len({suffix(), *(suffix(**{name: value}) for name, value in others.items())}) == 1 + len(others)
