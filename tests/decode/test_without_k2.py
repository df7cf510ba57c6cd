"""Where k2 is absent or broken, the searches over graphs say in one line what to install."""

import sys

import pytest

from icefall_kd.config import DecodeConfig, ModelConfig, TrainConfig
from icefall_kd.decode.runner import build_decoder
from icefall_kd.errors import ConfigError
from icefall_kd.runtime import optional
from icefall_kd.systems import build_system
from icefall_kd.text.graphs import GraphConfig, make_graphs

METHODS = [
    "fast_beam_search", "fast_beam_search_nbest", "fast_beam_search_LG", "fast_beam_search_nbest_LG",
    "ctc_decoding", "ctc_decoding_HLG", "ctc_decoding_nbest_HLG",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_probe():
    optional.probe_import.cache_clear()
    yield
    optional.probe_import.cache_clear()


@pytest.fixture(scope="module")
def system():
    model = ModelConfig(encoder_size="tiny", num_encoder_layers=1, encoder_dim=16, feedforward_dim=16, decoder_dim=16)
    return build_system(TrainConfig(model=model), 8, inference=True)


def plant(monkeypatch, tmp_path, source):
    (tmp_path / "k2.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "k2", raising=False)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_says_what_to_install(system, monkeypatch, tmp_path, method):
    plant(monkeypatch, tmp_path, "raise ModuleNotFoundError(\"No module named 'k2'\", name='k2')")
    with pytest.raises(ConfigError) as error:
        build_decoder(system, DecodeConfig(decoding_method=method))
    message = str(error.value)
    assert message.startswith(f"--decoding-method {method} needs k2, but it is not installed: ")
    assert "local/make_k2_env.sh" in message and "\n" not in message


def test_a_broken_k2_is_named_with_its_reason(system, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "raise OSError('libk2.so: undefined symbol _ZN3c10\\nmore of it')")
    with pytest.raises(ConfigError, match=r"needs k2, but OSError: libk2\.so: undefined symbol _ZN3c10: local/make_k2"):
        build_decoder(system, DecodeConfig(decoding_method="fast_beam_search"))
    with pytest.raises(ConfigError, match="the stage of decoding graphs needs k2, but OSError"):
        make_graphs(GraphConfig(lang_dir=tmp_path, arpa=tmp_path / "lm.arpa"))


def test_a_transducer_without_a_ctc_head_has_no_ctc_search_and_the_other_way_round():
    model = ModelConfig(encoder_size="tiny", num_encoder_layers=1, encoder_dim=16, feedforward_dim=16, decoder_dim=16)
    for option, rest in (("transducer_scale", "ctc"), ("ctc_scale", "search")):
        config = TrainConfig(model=model)
        config = TrainConfig(model=model, asr=type(config.asr)(**{option: 0.0}))
        names = set(build_system(config, 8, inference=True).decoders())
        assert {name.startswith("ctc_") for name in names} == {rest == "ctc"}
