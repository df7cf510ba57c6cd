"""The quantizer: search against a direct float64 form and brute force, product switch, files."""

import itertools
import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.quantization import native, search
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.search import SearchTables, refine, refine_once
from tests.quantization.reference import refine_reference


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that the operations inside have made and that live still."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known |= {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, result if isinstance(result, (tuple, list)) else [result]):
            if tensor.untyped_storage().data_ptr() not in self.known:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.known.add(pointer)
        self.live += size
        weakref.finalize(storage, self._drop, pointer, size)

    def _drop(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.live -= size


def make(dim: int = 24, num_codebooks: int = 8, codebook_size: int = 16, scale: float = 1.0) -> Quantizer:
    quantizer = Quantizer(dim, num_codebooks, codebook_size)
    with torch.no_grad():
        quantizer.centers.copy_(torch.randn_like(quantizer.centers) * scale + 0.3)
        quantizer.centers_scale.fill_(0.02)
        quantizer.logits_scale.fill_(-0.03)
    return quantizer


def squared_errors(quantizer: Quantizer, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    centers = quantizer.scaled_centers().detach().double()
    decoded = centers[torch.arange(quantizer.num_codebooks), codes.long()].sum(dim=1)
    return (decoded - x.double()).square().sum(dim=1)


def near_ties(quantizer: Quantizer, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """Assert that every frame whose codes differ is a near tie; return the fraction of equal frames."""
    differ = (a != b).any(dim=-1)
    left, right = squared_errors(quantizer, x, a)[differ], squared_errors(quantizer, x, b)[differ]
    assert torch.allclose(left, right, rtol=1e-3)
    return 1.0 - differ.double().mean().item()


@pytest.mark.parametrize(
    ("num_codebooks", "codebook_size"), [(1, 16), (2, 4), (4, 2), (4, 16), (8, 16), (16, 16), (4, 64), (8, 256)]
)
def test_one_search_equals_the_direct_form(num_codebooks, codebook_size):
    quantizer = make(20, num_codebooks, codebook_size)
    x = torch.randn(60 if codebook_size > 16 else 200, 20) * 2 + 1
    codes = torch.randint(codebook_size, (len(x), num_codebooks))
    tables = SearchTables(quantizer.scaled_centers())
    ours = refine_once(tables, tables.products(x), codes)
    expected = refine_reference(quantizer.scaled_centers().detach().double(), x.double(), codes)
    assert near_ties(quantizer, x, ours, expected) > 0.98


@pytest.fixture
def pytorch_search(monkeypatch):
    """Search in PyTorch even where the C++ kernel works."""
    monkeypatch.setattr(native, "kernel", lambda: None)


@pytest.mark.parametrize("kernel", ["native", "pytorch"])
def test_finished_frames_and_chunks_change_nothing(kernel, request):
    if kernel == "pytorch":
        request.getfixturevalue("pytorch_search")
    quantizer = make(20, 8, 16)
    x = torch.randn(150, 20)
    tables = SearchTables(quantizer.scaled_centers())
    products = tables.products(x)
    codes = torch.randint(16, (len(x), 8))
    expected = codes
    for _ in range(4):
        expected = refine_once(tables, products, expected)
    assert torch.equal(refine(tables, products, codes, 4), expected)
    assert torch.equal(refine(tables, products, codes, 4, chunk_bytes=7 * tables.bytes_per_frame()), expected)


def test_the_search_needs_the_products_alone_and_leaves_finished_frames(monkeypatch, pytorch_search):
    quantizer, searched = make(20, 8, 16), []
    x = torch.randn(300, 20)
    tables = SearchTables(quantizer.scaled_centers())
    products = tables.products(x)
    codes = torch.randint(16, (len(x), 8))
    changed, old = [len(x)], codes
    for _ in range(4):
        new = refine_once(tables, products, old)
        # A finished frame stays as it is: only those of the round before can change.
        changed.append(int((new != old).any(dim=1).sum()))
        old = new
    # Nothing of the embedding dimension is left to the search.
    del tables.centers, tables.offset

    def spy(tables, products, codes):
        searched.append(len(codes))
        return refine_once(tables, products, codes)

    monkeypatch.setattr(search, "refine_once", spy)
    assert torch.equal(refine(tables, products, codes, 5, chunk_bytes=2**30), refine_once(tables, products, old))
    assert searched == changed and changed[0] > changed[2] > changed[3] > changed[4] > 0


@pytest.mark.parametrize(("num_codebooks", "codebook_size"), [(4, 16), (4, 256)])
def test_chunks_bound_the_memory_of_encoding(num_codebooks, codebook_size, pytorch_search):
    quantizer = make(8, num_codebooks, codebook_size)
    budget = 40 * quantizer.tables().bytes_per_frame()
    for frames in (80, 240):
        x = torch.randn(frames, 8)
        with LiveBytes() as live:
            quantizer.encode(x, 1, chunk_bytes=budget)
        # The products of a chunk and the search in it; what else grows with the frames is their codes.
        assert 0.3 * budget < live.peak < 2 * budget


def test_a_large_common_offset_does_not_spoil_the_search():
    quantizer = make(16, 4, 16)
    x = torch.randn(100, 16)
    codes = quantizer.encode(x, 3)
    with torch.no_grad():
        shift = 300.0 / quantizer.num_codebooks
        quantizer.centers += shift / (10 * quantizer.centers_scale).exp()
        # The classifier sees the shifted frames too: undo it in the bias.
        scale = (10 * quantizer.logits_scale).exp()
        quantizer.to_logits.bias -= scale * 300.0 * quantizer.to_logits.weight.sum(dim=1)
    moved = quantizer.encode(x + 300.0, 3)
    assert (codes == moved).all(dim=1).float().mean() > 0.95


def test_a_single_codebook_finds_the_nearest_center():
    quantizer = make(10, 1, 256)
    x = torch.randn(300, 10)
    nearest = torch.cdist(x.double(), quantizer.scaled_centers().detach()[0].double()).argmin(dim=1)
    assert torch.equal(quantizer.encode(x, 1).long().squeeze(1), nearest)


def test_two_codebooks_of_four_are_close_to_brute_force():
    quantizer = make(6, 2, 4)
    x = torch.randn(500, 6) * 1.5
    choices = torch.tensor(list(itertools.product(range(4), repeat=2)))
    every = torch.stack([squared_errors(quantizer, x, c.expand(len(x), 2)) for c in choices])
    found = squared_errors(quantizer, x, quantizer.encode(x, 5))
    assert found.mean() <= 1.03 * every.min(dim=0).values.mean()


def test_refinement_lowers_the_error():
    quantizer = make(32, 8, 16)
    x = torch.randn(400, 32) * 2
    errors = [quantizer.relative_error(x, rounds) for rounds in (0, 1, 2, 5)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]


def test_the_product_switch_keeps_decoded_frames_and_logits():
    small = make(12, 8, 16)
    large = small.to_product()
    assert (large.num_codebooks, large.codebook_size) == (4, 256)
    x, codes = torch.randn(50, 12), torch.randint(16, (50, 8))
    pairs = codes[:, 0::2] * 16 + codes[:, 1::2]
    assert torch.allclose(small.decode(codes), large.decode(pairs), atol=1e-5)

    def chosen(quantizer, indexes):
        return quantizer.logits(x).gather(2, indexes.unsqueeze(2)).sum(dim=(1, 2))

    assert torch.allclose(chosen(small, codes), chosen(large, pairs), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="no product form"):
        large.to_product()


def test_encode_keeps_leading_shape_and_takes_any_float_type():
    quantizer = make(12, 4, 256)
    x = torch.randn(3, 7, 12)
    codes = quantizer.encode(x)
    assert codes.shape == (3, 7, 4) and codes.dtype == torch.uint8
    assert quantizer.decode(codes).shape == (3, 7, 12)
    assert torch.equal(quantizer.encode(x.half()), quantizer.encode(x.half().float()))
    assert quantizer.encode(x[:, :0]).shape == (3, 0, 4)


def test_codes_do_not_depend_on_batch_size_or_chunks():
    quantizer = make(24, 8, 256, scale=0.4)
    x = torch.randn(24, 24)
    whole = quantizer.encode(x)
    alone = torch.cat([quantizer.encode(frame) for frame in x.split(1)])
    chunks = quantizer.encode(x, chunk_bytes=1)
    assert near_ties(quantizer, x, whole, alone) > 0.95
    assert near_ties(quantizer, x, whole, chunks) > 0.95


def test_encode_follows_changed_centers():
    quantizer = make(8, 2, 16)
    x = torch.randn(40, 8)
    quantizer.encode(x)
    with torch.no_grad():
        quantizer.centers.mul_(-1)
    fresh = Quantizer.from_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer.encode(x), fresh.encode(x))


def test_losses_are_what_their_definitions_say():
    quantizer = make(12, 4, 16)
    x = torch.randn(64, 12)
    losses = quantizer.losses(x, refine_iters=2)
    codes = quantizer.encode(x, 2).long()
    assert torch.equal(losses.codes, codes)
    x_double = x.double()
    variance = (x_double - quantizer.mean().double()).square().sum()
    assert losses.reconstruction.item() == pytest.approx(
        (squared_errors(quantizer, x, codes).sum() / variance).item(), rel=1e-4
    )
    probs = quantizer.logits(x).double().softmax(dim=-1)
    logprob = -probs.gather(2, codes.unsqueeze(2)).log().mean()
    assert losses.logprob.item() == pytest.approx(logprob.item(), rel=1e-4)
    mean_probs = probs.mean(dim=0)
    entropy = -(mean_probs * mean_probs.log()).sum(dim=1).mean()
    assert losses.entropy.item() == pytest.approx((1 - entropy / torch.tensor(16.0).double().log()).item(), rel=1e-3)
    losses.reconstruction.backward(retain_graph=True)
    assert quantizer.to_logits.weight.grad is None and quantizer.centers.grad.abs().sum() > 0
    before = quantizer.centers.grad.clone()
    (losses.logprob + losses.entropy).backward()
    assert torch.equal(quantizer.centers.grad, before) and quantizer.to_logits.weight.grad.abs().sum() > 0


def test_a_saved_quantizer_comes_back_with_its_metadata_and_identity(tmp_path):
    quantizer = make(12, 4, 16)
    quantizer.stamp_id()
    path = tmp_path / "quantizer.safetensors"
    quantizer.save(path, {"teacher": {"layer": 4}, "seed": 1})
    loaded = Quantizer.load(path, dim=12)
    assert set(loaded.state_dict()) == {
        "centers", "logits_scale", "centers_scale", "id_buf", "to_logits.weight", "to_logits.bias",
    }  # fmt: skip
    assert loaded.sha256 == quantizer.sha256
    assert bytes(loaded.id_buf.tolist()).decode() == quantizer.sha256[:8]
    assert loaded.metadata["teacher"] == {"layer": 4}
    assert json.dumps(loaded.metadata)
    x = torch.randn(30, 12)
    assert torch.equal(loaded.encode(x), quantizer.encode(x))
    first = path.read_bytes()
    quantizer.save(path)
    assert path.read_bytes() == first


def test_another_dimension_is_refused_with_both_values(tmp_path):
    path = tmp_path / "quantizer.safetensors"
    make(12, 4, 16).save(path)
    with pytest.raises(DataError, match=r"12.*13"):
        Quantizer.load(path, dim=13)
    with pytest.raises(DataError, match=r"13.*12"):
        Quantizer.load(path).encode(torch.randn(2, 13))


def test_a_teacher_that_it_was_not_trained_on_is_refused_with_both_values():
    quantizer = make(12, 4, 16)
    teacher = {"weights_sha256": "aa", "layer": 4, "normalization": "none", "dtype": "float32"}
    quantizer.check_teacher(teacher)  # a quantizer that names no teacher
    quantizer.metadata = {"teacher": teacher}
    quantizer.check_teacher({**teacher, "dtype": "bfloat16", "long_utterances": "window"})
    for name, value in (("weights_sha256", "bb"), ("layer", 3), ("normalization", "layer_norm")):
        with pytest.raises(DataError, match=f"{name} is {teacher[name]!r}, this one's is {value!r}"):
            quantizer.check_teacher({**teacher, name: value})


def test_embeddings_that_are_not_finite_and_codes_of_no_entry_are_refused():
    quantizer, x = make(12, 4, 16), torch.randn(9, 12)
    for value in (float("nan"), float("inf")):
        x[7, 3] = value
        with pytest.raises(DataError, match=f"embedding 7 is {value:g} in channel 3"):
            quantizer.encode(x, chunk_bytes=1)
    for code in (16, -100):
        with pytest.raises(DataError, match=f"code {code} lies outside 0..15"):
            quantizer.decode(torch.tensor([[0, 1, code, 2]]))


def test_damaged_and_missing_files_are_data_errors(tmp_path):
    path = tmp_path / "quantizer.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        Quantizer.load(path)
    make(12, 4, 16).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        Quantizer.load(path)
    middle = len(whole) * 3 // 4
    path.write_bytes(whole[:middle] + b"12345678" + whole[middle + 8 :])
    with pytest.raises(DataError, match="damaged"):
        Quantizer.load(path)


def test_sizes_that_are_no_powers_of_two_are_refused():
    with pytest.raises(ConfigError, match=r"num_codebooks.*6"):
        Quantizer(8, 6)
    with pytest.raises(ConfigError, match="512"):
        Quantizer(8, 4, 512)
