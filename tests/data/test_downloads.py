"""Archives of corpora: nothing is written outside of their folder, and damaged ones are named."""

import io
import tarfile

import lhotse.recipes
import pytest
from lhotse.recipes import musan

from icefall_kd.data.corpora import download
from icefall_kd.errors import ConfigError, DataError

checked = pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="Python before 3.11.4 has no filter")


def write_archive(path, kind, outside):
    """Write a corpus whose archive would write ``outside / "evil"``, if it is of such a kind."""
    with tarfile.open(path, "w:gz") as archive:

        def add(name, content=b"sound", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))

        add("musan/noise/a.wav")
        if kind == "dots":
            add(f"musan/../../{outside.name}/evil")
        elif kind == "absolute":
            add(str(outside / "evil"))
        elif kind == "link":
            add("musan/away", b"", type=tarfile.SYMTYPE, linkname=str(outside))
            add("musan/away/evil")
        elif kind == "device":
            add("musan/null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A function that says what the download of MUSAN fetches, and gives its folder and one outside of it."""
    (tmp_path / "outside").mkdir()

    def fetch(kind):
        archive = tmp_path / "fetched.tar.gz"
        write_archive(archive, kind, tmp_path / "outside")
        copy = lambda url, filename, force_download: filename.write_bytes(archive.read_bytes())  # noqa: E731
        monkeypatch.setattr(musan, "resumable_download", copy)
        return tmp_path / "corpora", tmp_path / "outside"

    return fetch


@checked
def test_a_sound_archive_is_unpacked(fetched):
    folder, _ = fetched("sound")
    before = tarfile.TarFile.extraction_filter
    download("musan", folder)
    assert (folder / "musan/noise/a.wav").read_bytes() == b"sound"
    assert tarfile.TarFile.extraction_filter is before


@checked
@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "device", "truncated"])
def test_an_unfit_archive_is_refused(fetched, kind):
    folder, outside = fetched(kind)
    with pytest.raises(DataError, match=r"an archive in .*corpora is damaged, or would write outside of it"):
        download("musan", folder)
    assert not list(outside.iterdir())
    assert not (folder / ".musan_completed").exists() and not (folder / "musan/null").exists()


def test_a_python_without_a_filter_unpacks_nothing(fetched, monkeypatch):
    folder, _ = fetched("sound")
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(ConfigError, match=r"3\.11\.4 is the first that has them"):
        download("musan", folder)
    assert not (folder / "musan").exists()


def test_lhotse_by_itself_follows_links_of_an_archive(fetched):
    """The reason for our filter; fails when it is needed no more."""
    folder, outside = fetched("link")
    lhotse.recipes.download_musan(folder)
    assert (outside / "evil").exists()
