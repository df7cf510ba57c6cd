"""Model folders that bring Python along: it is not run, and nobody is asked whether it may be."""

import json
import sys

import pytest

from icefall_kd.errors import ConfigError
from icefall_kd.teachers import hf

CODE = """
open({mark!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedModel

class EvilConfig(PretrainedConfig):
    model_type = "evil"

class EvilModel(PreTrainedModel):
    config_class = EvilConfig
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder whose code would make a file; and that file."""
    folder, mark = tmp_path / "evil", tmp_path / "it_ran"
    folder.mkdir()
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    names = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    class Yes:
        @staticmethod
        def readline():
            return "y\n"

    monkeypatch.setattr(sys, "stdin", Yes())
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder, mark


@pytest.mark.parametrize("reader", [hf.load_config, hf.speech_ssl_model, hf.ctc_model, hf.text_tokenizer])
def test_code_of_a_model_folder_is_not_run(evil, reader):
    folder, mark = evil
    with pytest.raises(ConfigError, match=r"which is not run; .* --teacher FILE\.py:CLASS"):
        reader(folder)
    assert not mark.exists()


def test_transformers_by_itself_runs_it_when_somebody_says_yes(evil):
    """The reason for our argument; fails when it is needed no more."""
    import transformers

    folder, mark = evil
    transformers.AutoConfig.from_pretrained(folder)
    assert mark.exists()
