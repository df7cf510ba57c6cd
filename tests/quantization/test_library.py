"""Quantizers of multi_quantization 0.1.1, the package of MVQ-KD's authors, load here and give the same indexes."""

import pytest
import torch

from icefall_kd.errors import DataError
from icefall_kd.quantization.quantizer import Quantizer

library = pytest.importorskip("multi_quantization", reason="pip install multi_quantization==0.1.1 h5py")


def trained(dim: int, num_bytes: int) -> tuple["library.Quantizer", torch.Tensor]:
    """Return a quantizer after some steps of the library's own trainer, and further frames."""
    torch.manual_seed(0)
    x = torch.randn(3000, 8) @ torch.randn(8, dim) + 0.3 * torch.randn(3000, dim) + 2
    trainer = library.QuantizerTrainer(
        dim=dim, bytes_per_frame=num_bytes, device=torch.device("cpu"), phase_one_iters=15, phase_two_iters=10
    )
    step = 0
    while not trainer.done():
        trainer.step(x[step * 64 : (step + 1) * 64])
        step += 1
    return trainer.get_quantizer().eval(), x[-1200:]


@pytest.mark.parametrize(("dim", "num_bytes"), [(24, 4), (40, 8)])
def test_a_file_of_the_library_gives_its_indexes(tmp_path, dim, num_bytes):
    theirs, x = trained(dim, num_bytes)
    # What icefall writes: num_utts-1000-layer-36-num_codebooks_8-quantizer.pt
    path = tmp_path / "quantizer.pt"
    torch.save(theirs.state_dict(), path)
    ours = Quantizer.load(path, dim)
    assert (ours.num_codebooks, ours.codebook_size) == (num_bytes, 256)
    for rounds in (0, 1, 5):
        with torch.no_grad():
            expected = theirs.encode(x, refine_indexes_iters=rounds, as_bytes=True)
        found = ours.encode(x, rounds)
        same = (found == expected).all(dim=1).double().mean().item()
        assert same >= 0.999, f"{rounds} refinements: {same}"
        torch.testing.assert_close(ours.decode(found), theirs.decode(found), rtol=1e-5, atol=1e-5)
    # Saved here, it is the same quantizer with its identity tag kept.
    ours.save(tmp_path / "quantizer.safetensors")
    again = Quantizer.load(tmp_path / "quantizer.safetensors", dim)
    assert again.sha256 == ours.sha256 and torch.equal(again.id_buf, theirs.id_buf)


def test_another_files_tensors_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"other\.pt is no quantizer.*weight"):
        Quantizer.load(tmp_path / "other.pt")
    theirs, _ = trained(24, 4)
    torch.save(theirs.state_dict(), tmp_path / "quantizer.pt")
    with pytest.raises(DataError, match="24 channels, these have 32"):
        Quantizer.load(tmp_path / "quantizer.pt", dim=32)
