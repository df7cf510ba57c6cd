"""The optional C++ kernel of the refinement search: the codes of :mod:`icefall_kd.quantization.search`, sooner.

Scores are equal bit for bit, and of equal ones the first wins; which of equal ones at the edge of a beam are kept
may differ.

It is compiled once for a machine's kind of processor, by ``torch.utils.cpp_extension``, and kept in
``TORCH_EXTENSIONS_DIR`` (else ``~/.cache/torch_extensions``).  Without a compiler or ninja the search in PyTorch
goes on alone and says so once.  ``ICEFALL_KD_NATIVE=0`` in the environment switches the kernel off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "search.cpp"
# Without contraction every sum is that of PyTorch, bit for bit.
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17"]


def refine(gram: Tensor, products: Tensor, codes: Tensor, beams: list[int], rounds: int) -> Tensor | None:
    """Return refined codes (N, Q) int64, or None where the kernel cannot work.

    Args:
        gram: (Q*K, Q*K) float32, of :class:`icefall_kd.quantization.search.SearchTables`.
        products: (N, Q*K) float32.
        codes: (N, Q) int64 present indexes.
        beams: how many candidates a slot of 1, 2, 4, ... codebooks keeps.
        rounds: number of searches.
    Raises:
        IndexError: a code is no entry of its codebook.
    """
    function = None if gram.device.type != "cpu" else kernel()
    if function is None:
        return None
    num_codebooks = codes.shape[1]
    size = gram.shape[0] // num_codebooks
    # The kernel reads where it is told to.
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise IndexError(f"codes lie in {int(codes.min())}..{int(codes.max())}, not in 0..{size - 1}")
    gram, products = gram.float().contiguous(), products.float().contiguous()  # autocast makes others of them
    codes = codes.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    table = (ctypes.c_int32 * len(beams))(*beams)
    function(gram.data_ptr(), products.data_ptr(), codes.data_ptr(), len(codes), num_codebooks, size, table, rounds,
             torch.get_num_threads())  # fmt: skip
    return codes


@functools.cache
def kernel() -> Callable | None:
    """Return the compiled function, built when needed; None, with a message, where that fails."""
    if os.environ.get("ICEFALL_KD_NATIVE", "1") == "0":
        return None
    try:
        path = _library()
        if not path.exists():
            _build(path)
        function = ctypes.CDLL(str(path)).icefall_kd_refine
    except Exception as error:  # of a compiler, a full disk, a user without a home: the search goes on without
        reason = str(error).strip().splitlines()
        logger.info("the C++ search of the quantizer cannot be built (%s: %s); the one in PyTorch is used: "
                    "the same codes but for exact ties, later.  It needs a C++ compiler, ninja (pip install ninja) "
                    "and a folder to be kept in (TORCH_EXTENSIONS_DIR)",
                    type(error).__name__, reason[0] if reason else "no message")  # fmt: skip
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int32
    function.argtypes = [pointer, pointer, pointer, ctypes.c_int64, size, size, pointer, size, size]
    function.restype = None
    return function


def _library() -> Path:
    """Return where the kernel of this source, these flags and this kind of processor lies."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join([*FLAGS, _processor()]).encode())
    return folder / f"icefall_kd_search-{digest.hexdigest()[:16]}.so"


def _processor() -> str:
    """Return what tells apart processors for which -march=native compiles differently."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return " ".join([platform.machine(), *features[:2]])


def _build(path: Path) -> None:
    from torch.utils import cpp_extension

    # ninja lies beside this Python, whose folder need not be on the path.
    programs = os.environ.get("PATH", "")
    logger.info("building the C++ search of the quantizer, once for this machine: %s", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder for each process and a rename at the end: a build that is killed leaves no lock that others wait for.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".icefall_kd_search-") as folder:
        try:
            os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), programs])
            cpp_extension.load(path.stem.replace("-", "_"), [str(SOURCE)], extra_cflags=FLAGS, build_directory=folder,
                               is_python_module=False)  # fmt: skip
        finally:
            os.environ["PATH"] = programs
        os.replace(next(Path(folder).glob("*.so")), path)
