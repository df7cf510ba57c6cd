"""The searches give the same hypotheses on a GPU as on the CPU."""

import copy

import pytest
import torch
from cif_search_toys import cif_model
from cif_search_toys import ragged_batch as cif_batch
from nar_search_toys import nar_model, ragged_batch

from icefall_kd.config import ModelConfig
from icefall_kd.decode.cif_beam import CifBeamSearch, CifGreedySearch
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.ctc_prefix import CtcPrefixBeamSearch
from icefall_kd.decode.joint_beam import JointBeamSearch
from icefall_kd.decode.mask_ctc import MaskPredict
from icefall_kd.decode.nar_beam import NarBeamSearch
from icefall_kd.decode.transducer import GreedySearch, ModifiedBeamSearch
from icefall_kd.models.transducer import TransducerModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("search", [GreedySearch, CtcGreedySearch, lambda m: ModifiedBeamSearch(m, 4, nbest=4)])
def test_a_search_on_a_gpu_equals_the_cpu(search):
    torch.manual_seed(0)
    dims = ModelConfig(encoder_size="tiny", num_encoder_layers=1, decoder_dim=32, joiner_dim=48)
    model = TransducerModel(dims, 60).eval().double()
    with torch.no_grad():
        for proj in (model.joiner.encoder_proj, model.joiner.output_linear):
            proj.weight.mul_(8)
    x = torch.randn(7, 50, model.encoder.dim, dtype=torch.float64)
    lens = torch.tensor([50, 3, 0, 49, 20, 11, 1])
    cpu = search(model).decode(x, lens)
    gpu = search(copy.deepcopy(model).cuda()).decode(x.cuda(), lens.cuda())
    assert any(hyps[0].tokens for hyps in cpu)
    for a, b in zip(cpu, gpu, strict=True):
        assert [(h.tokens, h.timestamps) for h in a] == [(h.tokens, h.timestamps) for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(
    ("decoder", "search"),
    [
        ("mlm", lambda m: MaskPredict(m, mask_threshold=0.8)),
        ("mlm", lambda m: NarBeamSearch(m, 5, nbest=5, mask_threshold=0.8, rescore_ctc_weight=0.3)),
        ("mlm", lambda m: NarBeamSearch(m, 3, nbest=3, passes=2, mask_threshold=0.8, seeds="prefix_beam")),
        ("mlm", lambda m: CtcPrefixBeamSearch(m, 5, nbest=5)),
        ("ar", lambda m: JointBeamSearch(m, 5, nbest=5)),
    ],
)
def test_a_search_of_the_nar_system_on_a_gpu_equals_the_cpu(decoder, search):
    model = nar_model(0, vocab_size=40, decoder=decoder)
    x, lens = ragged_batch(0, n=7, longest=40, shortest=0)
    cpu = search(model).decode(x, lens)
    gpu = search(copy.deepcopy(model).cuda()).decode(x.cuda(), lens.cuda())
    assert any(hyps[0].tokens for hyps in cpu)
    for a, b in zip(cpu, gpu, strict=True):
        assert [(h.tokens, h.timestamps, h.masked) for h in a] == [(h.tokens, h.timestamps, h.masked) for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("search", [CifGreedySearch, lambda m: CifBeamSearch(m, 5, nbest=5)])
def test_a_search_of_the_cif_recogniser_on_a_gpu_equals_the_cpu(search):
    model = cif_model(0, vocab_size=12)
    x, lens = cif_batch(0, n=7, longest=40)
    lens[3] = 0
    cpu = search(model).decode(x, lens)
    gpu = search(copy.deepcopy(model).cuda()).decode(x.cuda(), lens.cuda())
    assert any(hyps[0].tokens for hyps in cpu)
    for a, b in zip(cpu, gpu, strict=True):
        assert [(h.tokens, h.timestamps) for h in a] == [(h.tokens, h.timestamps) for h in b]
        assert [h.score for h in a] == pytest.approx([h.score for h in b], rel=1e-5, abs=1e-4)
