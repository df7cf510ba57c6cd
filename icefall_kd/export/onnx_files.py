"""ONNX files: write, quantize, run.  The only module that imports onnx and onnxruntime.

The graphs come from torch's tracing exporter: with a batch and a time axis of any length, the exporter of
torch.export takes minutes for what this one does in seconds, and needs onnxscript.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from icefall_kd.errors import ConfigError
from icefall_kd.export.graphs import Graph

# LayerNormalization is an operator of its own since 17; every ONNX Runtime since 1.12 (2022) knows it.
OPSET = 17


def require_onnx():
    """Return the modules onnx and onnxruntime.

    Raises:
        ConfigError: one of them is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"exporting to ONNX needs onnx and onnxruntime ({error}): pip install -e '.[export]' -c constraints.txt"
        ) from error
    return onnx, onnxruntime


def write_onnx(graph: Graph, path: Path, metadata: dict[str, str | int]) -> None:
    """Trace ``graph`` and write it to ``path`` with ``metadata`` in its properties."""
    onnx, _ = require_onnx()
    with warnings.catch_warnings():
        # What the tracer doubts is compared with the model afterwards; that this exporter is old is known.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module,
            graph.example,
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={name: axes for name, axes in (graph.inputs | graph.outputs).items() if axes},
        )
    model = onnx.load(path)
    onnx.checker.check_model(model)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, str(value)
    onnx.save(model, path)


def quantize_onnx(source: Path, target: Path) -> None:
    """Write ``source`` with the weights of its matrix products in 8 bits (dynamic quantization, one scale a column).

    Activations are quantized as they come, by ONNX Runtime; convolutions, norms and attention stay in float32.  The
    weights are unsigned: products with signed ones overflow on CPUs that have AVX2 but no VNNI, and there the encoder
    was three times as far from the model.
    """
    require_onnx()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
    try:
        quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QUInt8, per_channel=True
        )
    finally:
        root.setLevel(level)


def open_onnx(path: Path, num_threads: int = 1) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function from tensors, in the order of the graph's inputs, to a tuple of its outputs."""
    _, onnxruntime = require_onnx()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = num_threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(array) for array in session.run(None, feed))

    return run
