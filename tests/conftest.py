"""What every test shares: one torch thread, fixed seeds, no network, markers for what a machine lacks."""

import os
import random
import socket
import sys
from pathlib import Path

# Before any import of a hub client: tests never reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
# Tests of the thin command lines import local/ and egs/ scripts by path, and subprocesses find the package.
sys.path.insert(0, str(REPO))
# Toys that several test folders share.
sys.path.insert(0, str(REPO / "tests"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not config.getoption("--slow"):
        reasons["slow"] = "slow; run with --slow"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):  # not the keywords, which hold the folder tests/gpu too
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("k2") and not _k2_works():
            item.add_marker(pytest.mark.skip(reason="k2 does not import"))


def _k2_works() -> bool:
    try:
        import k2  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError):
        return False
    return True


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator before each test, and return the seed."""
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    return 42


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost", ""):
            raise OSError(f"tests must not use the network: {address}")
        connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO
