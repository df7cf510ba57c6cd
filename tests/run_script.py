"""Scripts of local/ in the process of the tests: starting Python anew costs seconds."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[1]


def script(name, *words) -> str:
    """Run local/<name> in this process; return what it printed."""
    spec = importlib.util.spec_from_file_location(f"local_{Path(name).stem}", REPO / "local" / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the command line reads the docstrings of fields
    spec.loader.exec_module(module)
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [name, *map(str, words)]), contextlib.redirect_stdout(printed):
        module.main()
    return printed.getvalue()
