"""The C++ kernel of the refinement search gives the codes of the search in PyTorch, or says why it cannot."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icefall_kd.quantization import native
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.search import refine

SIZES = [(1, 2), (1, 256), (2, 4), (2, 256), (4, 64), (8, 2), (16, 16), (8, 256), (32, 16), (16, 256)]


@pytest.fixture(autouse=True)
def forget_kernel():
    yield
    native.kernel.cache_clear()


@pytest.fixture
def kernel():
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    function = native.kernel()
    assert function is not None
    return function


def both(monkeypatch, quantizer: Quantizer, x: torch.Tensor, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return refined codes of the kernel and of PyTorch, from random codes."""
    tables = quantizer.tables()
    products = tables.products(x)
    codes = torch.randint(quantizer.codebook_size, (len(x), quantizer.num_codebooks))
    before = codes.clone()
    found = refine(tables, products, codes, rounds)
    assert torch.equal(codes, before)
    with monkeypatch.context() as context:
        context.setattr(native, "kernel", lambda: None)
        return found, refine(tables, products, codes, rounds)


@pytest.mark.parametrize(("num_codebooks", "codebook_size"), SIZES)
def test_codes_are_equal(kernel, monkeypatch, num_codebooks, codebook_size):
    torch.manual_seed(num_codebooks)
    quantizer = Quantizer(24, num_codebooks, codebook_size)
    x = torch.randn(150, 24) * quantizer.centers.std().item() * num_codebooks**0.5
    found, expected = both(monkeypatch, quantizer, x, 3)
    assert torch.equal(found, expected)


def test_product_codebooks(kernel, monkeypatch):
    # Entries in rows and columns, as the second phase of training starts with.
    torch.manual_seed(1)
    quantizer = Quantizer(24, 16, 16).to_product()
    found, expected = both(monkeypatch, quantizer, torch.randn(200, 24), 3)
    assert torch.equal(found, expected)


def test_equal_entries_do_no_harm(kernel, monkeypatch):
    # Which of two equal candidates is kept is free, that as many as the beam are kept is not.
    torch.manual_seed(2)
    quantizer = Quantizer(8, 4, 256)
    with torch.no_grad():
        quantizer.centers[:, 128:] = quantizer.centers[:, :128]
    x = torch.randn(1000, 8)
    found, expected = both(monkeypatch, quantizer, x, 3)
    errors = [(quantizer.decode(codes) - x).square().sum(dim=1).mean().item() for codes in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_scores_that_are_no_numbers_do_no_harm(kernel):
    # Products that overflowed leave more of them in a slot than a beam keeps.
    torch.manual_seed(5)
    quantizer = Quantizer(8, 16, 16)
    products = torch.randn(400, 256)
    products[torch.rand(400, 256) < 0.6] = float("nan")
    codes = refine(quantizer.tables(), products, torch.randint(16, (400, 16)), 3)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 16


def test_nothing_outside_of_the_tables_is_read(kernel):
    torch.manual_seed(6)
    quantizer, x = Quantizer(8, 4, 16), torch.randn(100, 8)
    tables = quantizer.tables()
    for wrong in (-1, 16):
        with pytest.raises(IndexError, match=r"not in 0\.\.15"):
            refine(tables, tables.products(x), torch.full((100, 4), wrong), 1)
    # Products of another type, and those that do not follow each other in memory.
    products = tables.products(x).bfloat16()
    wide = torch.stack([products, products], dim=2).float()[:, :, 0]
    codes = torch.zeros(100, 4, dtype=torch.int64)
    assert torch.equal(refine(tables, products, codes.int(), 2), refine(tables, wide, codes, 2))


def test_threads_share_the_frames(kernel, monkeypatch):
    torch.manual_seed(3)
    quantizer, x = Quantizer(12, 4, 16), torch.randn(1000, 12)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([quantizer.encode(part, 3) for part in (x, x[:1], x[:0], x[:129])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_without_room_for_threads_one_does_the_work(kernel):
    # In a process of its own, since the limit on memory stays.
    code = """
import resource, torch
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.search import refine
torch.manual_seed(7)
torch.set_num_threads(1)
quantizer, x = Quantizer(12, 4, 16), torch.randn(1000, 12)
tables, codes = quantizer.tables(), torch.zeros(1000, 4, dtype=torch.int64)
products = tables.products(x)
expected = refine(tables, products, codes, 2)
torch.set_num_threads(3)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**22, -1))
assert torch.equal(refine(tables, products, codes, 2), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("broken", ["compiler", "folder", "home"])
def test_without_a_compiler_pytorch_searches_and_says_so(broken, monkeypatch, tmp_path, caplog):
    native.kernel.cache_clear()
    folder = tmp_path / "extensions"
    if broken == "compiler":
        monkeypatch.setenv("CXX", "false")
    elif broken == "folder":
        folder.write_text("a file, not a folder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    if broken == "home":  # of a container's user whom the system does not know
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setattr(Path, "home", lambda: Path("~no-such-user").expanduser())
    torch.manual_seed(4)
    quantizer, x = Quantizer(12, 4, 16), torch.randn(50, 12)
    with caplog.at_level(logging.INFO, logger=native.__name__):
        codes = [quantizer.encode(x, 2) for _ in range(2)]
    assert torch.equal(*codes)
    said = [r.message for r in caplog.records if "cannot be built" in r.message]
    assert len(said) == 1 and "ninja" in said[0] and "TORCH_EXTENSIONS_DIR" in said[0], caplog.text
    assert broken != "compiler" or list(folder.iterdir()) == []


def test_the_environment_switches_it_off(monkeypatch):
    native.kernel.cache_clear()
    monkeypatch.setenv("ICEFALL_KD_NATIVE", "0")
    assert native.kernel() is None
