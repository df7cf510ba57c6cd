#!/usr/bin/env python3
"""Time an autoregressive recogniser and its Mask-CTC students, from features to text, in one process.

    benchmarks/nar_rtf.py --sizes big,small --out benchmarks/results/nar_rtf/cpu.json
    benchmarks/nar_rtf.py --exp-dirs exp/teacher,exp/student --manifest-dir data/fbank --test-part dev

Without exp-dirs the models are random, of the sizes "A1-big" (ESPnet's AISHELL-1 recipe) and "A1-small a" (about a
ninth) but for fewer channels of the subsampling, with V = 4233 and <mask>, and a script is planted in them.  Numbers
are added to the logits of the CTC head, so that an utterance of --seconds has --tokens tokens, of which --masked-share
have a probability of about 0.7 and are masked, the others one above 0.99; and to those of the autoregressive decoder,
so that it expects the same tokens with probabilities of about 0.9, then the end.  All that the models compute is
computed.  The masked decoder is left alone: what it fills in does not change its time.

Times are those of the encoder and of the search; computing fbanks is not among them.  Searches take turns utterance by
utterance, so that another load on the machine hits all of them; CPU seconds are measured beside those of the clock.
"""

import dataclasses
import importlib.util
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from icefall_kd.cli import parse_config
from icefall_kd.config import AttentionDecoderConfig, DecodeConfig, ModelConfig
from icefall_kd.config.checks import at_least
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.decode.joint_beam import JointBeamSearch
from icefall_kd.decode.mask_ctc import MaskPredict
from icefall_kd.decode.nar_beam import NarBeamSearch
from icefall_kd.decode.runner import build_decoder, decode_batches
from icefall_kd.errors import ConfigError, run_main
from icefall_kd.frames import conv2d_subsampled_len
from icefall_kd.models.ctc_attention import CtcAttentionModel
from icefall_kd.runtime.env import measured_on, package_version, pick_device
from icefall_kd.runtime.files import write_json

VOCAB = 4234
# Layers of encoder and decoder, dimension, feed-forward dimension, subsampling channels.
SIZES = {"big": (12, 6, 256, 2048, (8, 32, 128)), "small": (6, 3, 128, 512, (8, 32, 128))}
BASELINE = "AR beam 10"


@dataclass(frozen=True, kw_only=True)
class RtfConfig:
    """Time an autoregressive recogniser and its Mask-CTC students, from features to text."""

    sizes: list[str] = field(default_factory=lambda: ["big", "small"])
    """Of big and small; ratios are to the first one's AR beam search too."""
    seconds: float = 4.5
    """Length of an utterance (AISHELL-1: about 4.5 s)."""
    tokens: int = 14
    """Tokens of an utterance, on average (AISHELL-1: 14.3); utterances of a batch of one have two more or less."""
    masked_share: float = 0.15
    """Share of tokens that CTC is unsure of."""
    utterances: int = 10
    """Different utterances."""
    batch: int = 1
    """Utterances decoded at once; above 1, all those of a batch have the same script."""
    repeats: int = 5
    """Timed rounds; the median counts, a warm-up round does not."""
    espnet: bool | None = None
    """Time ESPnet's searches too, with the same weights; None: where it is installed (local/make_espnet_env.sh)."""
    exp_dirs: list[Path] = field(default_factory=list)
    """Time these trainings of --system nar on a part instead, each with the searches that it offers."""
    manifest_dir: Path = Path("data/fbank")
    """Of exp-dirs: folder of cuts_<part>.jsonl.gz."""
    test_part: str = "dev"
    """Of exp-dirs: the part."""
    num_cuts: int = 100
    """Of exp-dirs: at most so many utterances."""
    device: str = "cpu"
    """cpu or cuda."""
    num_threads: int = 1
    """torch threads on a CPU."""
    out: Path | None = None
    """JSON file of the times."""

    def __post_init__(self) -> None:
        at_least(self, tokens=3, utterances=1, batch=1, repeats=1, num_cuts=1, num_threads=1)
        for size in self.sizes:
            if size not in SIZES:
                raise ConfigError(f"--sizes names {size!r}; there are {', '.join(SIZES)}")
        if not 0 <= self.masked_share <= 1:
            raise ConfigError(f"--masked-share is {self.masked_share}; it must lie in 0 ... 1")
        frames, most = conv2d_subsampled_len(max(round(100 * self.seconds), 0)), self.tokens + 2 * (self.batch == 1)
        if frames < most:
            raise ConfigError(
                f"--seconds {self.seconds} are {frames} encoder frames, too few for {most} tokens; "
                "more --seconds or fewer --tokens"
            )
        if self.exp_dirs and (self.batch != 1 or self.espnet):
            raise ConfigError(
                "--exp-dirs times trainings with our searches, utterances one at a time; leave out --batch and --espnet"
            )
        if self.espnet and importlib.util.find_spec("espnet2") is None:
            raise ConfigError(
                "--espnet true: ESPnet is not installed here; local/make_espnet_env.sh makes an environment that has it"
            )


class Planted(torch.nn.Module):
    """A linear layer to whose output something is added: at the i-th call of a search the i-th thing."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear, self.parts, self.call = linear, [], 0

    def say(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Set what is added: columns and values of the flattened output of one row."""
        self.parts, self.call = parts, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits; the last part serves all later calls."""
        y = self.linear(x)
        columns, values = self.parts[min(self.call, len(self.parts) - 1)]
        self.call += 1
        y.flatten(1).index_add_(1, columns, values.expand(len(y), -1))
        return y


@dataclass(frozen=True)
class Script:
    """What an utterance is made to say."""

    tokens: list[int]
    unsure: list[bool]

    def ctc(
        self, frames: int, device: torch.device, vocab: int | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what is added to CTC logits: blanks, and a token every few frames."""
        vocab = vocab or VOCAB
        at = [(2 * i + 1) * frames // (2 * len(self.tokens)) for i in range(len(self.tokens))]
        rows = [(t * vocab, 15.0) for t in range(frames) if t not in at]
        for t, token, unsure in zip(at, self.tokens, self.unsure, strict=True):
            other = 3 + (token + 7) % (vocab - 4)
            rows += [(t * vocab + token, 15.0)] + [(t * vocab + other, 14.0)] * unsure
        return [_part(rows, device)]

    def attention(self, end: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what is added to the decoder's logits, position by position."""
        return [_part([(token, 11.0)], device) for token in [*self.tokens, end]]


def _part(rows: list[tuple[int, float]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    columns, values = zip(*rows, strict=True)
    return torch.tensor(columns, device=device), torch.tensor(values, device=device)


def scripts(config: RtfConfig) -> list[Script]:
    """Return one script an utterance; over all of them the share of unsure tokens is the one asked for."""
    g = torch.Generator().manual_seed(1)
    lens = [config.tokens + ((i % 5) - 2 if config.batch == 1 else 0) for i in range(config.utterances)]
    total = sum(lens)
    unsure = torch.zeros(total, dtype=torch.bool)
    unsure[torch.randperm(total, generator=g)[: round(config.masked_share * total)]] = True
    tokens = torch.randperm(VOCAB - 4, generator=g).repeat(total // VOCAB + 1)[:total] + 3
    parts = zip(tokens.split(lens), unsure.split(lens), strict=True)
    return [Script(y.tolist(), some.tolist()) for y, some in parts]


def random_model(size: str, decoder: str, device: torch.device) -> CtcAttentionModel:
    """Return a random model with planted output layers."""
    torch.manual_seed(0)
    layers, decoder_layers, dim, feedforward, channels = SIZES[size]
    shape = ModelConfig(
        num_encoder_layers=layers, encoder_dim=dim, num_heads=4, feedforward_dim=feedforward, cnn_kernel=15,
        subsampling_channels=channels,
    )  # fmt: skip
    options = AttentionDecoderConfig(
        attention_decoder=decoder, num_decoder_layers=decoder_layers, decoder_feedforward_dim=feedforward
    )
    model = CtcAttentionModel(shape, options, VOCAB).to(device).eval()
    model.ctc_output = Planted(model.ctc_output)
    if decoder == "ar":
        model.decoder.output = Planted(model.decoder.output)
    return model


def searches_of(size: str, config: RtfConfig, device: torch.device) -> dict[str, tuple]:
    """Return (model, search) by name."""
    teacher, student = (random_model(size, kind, device) for kind in ("ar", "mlm"))
    found = {
        BASELINE: (teacher, JointBeamSearch(teacher, 10)),
        "CTC greedy": (student, CtcGreedySearch(student)),
        "NAR greedy, K 10": (student, MaskPredict(student)),
        "NAR beam 5, K 10": (student, NarBeamSearch(student, 5)),
        "NAR beam 10, K 10": (student, NarBeamSearch(student, 10)),
    }
    if config.espnet or (config.espnet is None and importlib.util.find_spec("espnet2") is not None):
        from espnet_models import espnet_searches

        found |= espnet_searches(teacher, student, Planted)
    return found


@torch.no_grad()
def run(model, search, features: torch.Tensor, script: Script) -> tuple[torch.Tensor, list]:
    """Return the seconds of encoder and search, (2, 2) by the clock and of the CPU, and what was found."""
    device = features.device
    lens = torch.full((len(features),), features.shape[1], device=device)
    frames = conv2d_subsampled_len(features.shape[1])
    model.ctc_output.say(script.ctc(frames, device))
    if isinstance(model.decoder.output, Planted):
        model.decoder.output.say(script.attention(model.sos_id, device))
    if hasattr(search, "say"):
        search.say(script, frames, device)
    times = [_now(device)]
    out = model.encoder(features, lens)
    times.append(_now(device))
    found = search.decode(out.encoder_out, out.encoder_out_lens)
    times.append(_now(device))
    return torch.tensor(times, dtype=torch.float64).diff(dim=0), found


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def measure_random(config: RtfConfig, device: torch.device) -> list[dict]:
    """Return a row for every search of every size."""
    systems = {(size, name): x for size in config.sizes for name, x in searches_of(size, config, device).items()}
    parts, g = scripts(config), torch.Generator().manual_seed(2)
    x = torch.randn(len(parts), config.batch, round(100 * config.seconds), 80, generator=g).to(device)
    rounds: dict[tuple, list[torch.Tensor]] = {key: [] for key in systems}
    texts: dict[tuple, list] = {}
    for _ in range(config.repeats + 1):
        sums = {key: torch.zeros(2, 2, dtype=torch.float64) for key in systems}
        texts = {key: [] for key in systems}
        for features, script in zip(x, parts, strict=True):
            for key, (model, search) in systems.items():
                seconds, found = run(model, search, features, script)
                sums[key] += seconds
                texts[key] += found
                for hyps in found:
                    if len(hyps[0].tokens) != len(script.tokens):
                        raise ConfigError(f"{key}: {len(hyps[0].tokens)} tokens instead of {len(script.tokens)}")
        for key, seconds in sums.items():
            rounds[key].append(seconds)
    count = len(parts) * config.batch
    audio = count * config.seconds
    rows = []
    for (size, name), (model, _) in systems.items():
        (encoder, encoder_cpu), (search, search_cpu) = torch.stack(rounds[size, name][1:]).median(dim=0).values.tolist()
        row = {"size": size, "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6, "search": name}
        rows.append({**row, **_times(encoder, search, count, audio), **_said(texts[size, name])})
        if device.type == "cpu":
            rows[-1] |= {"cpu_seconds": (encoder_cpu + search_cpu) / count, "search_cpu_seconds": search_cpu / count}
    return rows


def _times(encoder: float, search: float, count: int, audio: float) -> dict[str, float]:
    whole = encoder + search
    return {
        "seconds": whole / count,
        "encoder_seconds": encoder / count,
        "search_seconds": search / count,
        "encoder_share": encoder / whole,
        "rtf": whole / audio,
    }


def _said(nbest: list) -> dict[str, float]:
    best = [hyps[0] for hyps in nbest]
    tokens = sum(len(h.tokens) for h in best)
    said = {"tokens": tokens / len(best)}
    masked = [h.masked for h in best if h.masked is not None]
    return said | ({"masked_share": sum(masked) / tokens} if masked else {})


def measure_trained(config: RtfConfig, device: torch.device) -> list[dict]:
    """Return a row for every search of every training."""
    from icefall_kd.data.datamodule import decoding_batches
    from icefall_kd.recipe import load_system, part_cuts

    rows = []
    for exp_dir in config.exp_dirs:
        options = DecodeConfig(exp_dir=exp_dir, manifest_dir=config.manifest_dir, device=str(device))
        trained = load_system(options)
        trained.system.eval()
        cuts = part_cuts(config.manifest_dir, config.test_part).subset(first=config.num_cuts)
        features = "precomputed" if all(c.has_features for c in cuts) else "on_the_fly"
        offered = trained.system.decoders()
        for name, method, beam in (
            (BASELINE, "joint_beam_search", 10),
            ("CTC greedy", "ctc_greedy_search", 1),
            ("NAR greedy, K 10", "mask_predict", 1),
            ("NAR beam 5, K 10", "nar_beam_search", 5),
            ("NAR beam 10, K 10", "nar_beam_search", 10),
        ):
            if method not in offered:
                continue
            decoder = build_decoder(
                trained.system, dataclasses.replace(options, decoding_method=method, beam_size=beam), trained.tokenizer
            )
            timed = []
            for _ in range(config.repeats):
                batches = decoding_batches(cuts, trained.tokenizer, max_duration=0.1, features=features, num_workers=0)
                timed.append(decode_batches(trained.system, decoder, batches))
            encoder, search = (
                statistics.median(getattr(d, f"{part}_seconds") for d in timed) for part in ("encoder", "search")
            )
            row = {"size": exp_dir.name, "search": name}
            row["million_parameters"] = sum(p.numel() for p in trained.system.parameters()) / 1e6
            rows.append({**row, **_times(encoder, search, len(timed[0].ids), timed[0].audio_seconds)})
            rows[-1] |= _said(timed[0].nbest)
    return rows


def main() -> None:
    """Measure and print seconds, real-time factors and ratios."""
    config = parse_config(RtfConfig, description=__doc__)
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    rows = measure_trained(config, device) if config.exp_dirs else measure_random(config, device)
    first = next((row for row in rows if row["search"] == BASELINE), None)
    base = first
    print(f"batch {config.batch}, {config.num_threads} thread, {device}, without fbank")
    for row in rows:
        base = row if row["search"] == BASELINE else base
        line = f"{row['size']:10s} {row['million_parameters']:5.1f} M  {row['search']:28s}"
        line += f"{1000 * row['seconds']:9.1f} ms  RTF {row['rtf']:.4f}  encoder {100 * row['encoder_share']:3.0f} %"
        if base is not None:
            row["ratio"] = base["seconds"] / row["seconds"]
            row["search_ratio"] = base["search_seconds"] / row["search_seconds"]
            row["ratio_to_first"] = first["seconds"] / row["seconds"]
            if "cpu_seconds" in row:
                row["cpu_ratio"] = base["cpu_seconds"] / row["cpu_seconds"]
                row["cpu_ratio_to_first"] = first["cpu_seconds"] / row["cpu_seconds"]
            line += f"  faster {row['ratio']:5.1f} x, search alone {row['search_ratio']:5.1f} x, than the first one's"
            line += f" {BASELINE} {row['ratio_to_first']:5.1f} x"
            line += f" (CPU {row['cpu_ratio_to_first']:5.1f} x)" if "cpu_seconds" in row else ""
        print(line + (f"  masked {100 * row['masked_share']:.1f} %" if "masked_share" in row else ""))
    if config.out is not None:
        options = {
            k: str(v) if isinstance(v, Path) else v
            for k, v in dataclasses.asdict(config).items()
            if k not in ("out", "exp_dirs", "manifest_dir")
        }
        record = {**measured_on(device), "espnet": package_version("espnet"), "options": options, "rows": rows}
        write_json(config.out, record)


if __name__ == "__main__":
    run_main(main)
