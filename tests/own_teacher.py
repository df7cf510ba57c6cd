"""The teacher that docs/own_teacher.md shows, written to a folder with random weights."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

PAGE = Path(__file__).resolve().parent.parent / "docs/own_teacher.md"


def write_own_teacher(folder: Path) -> str:
    """Write the page's code and its weights; return the name of the teacher."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    file = folder / "my_teacher.py"
    file.write_text(code, encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (64, 1, 400), "0.bias": (64,), "2.weight": (32, 64, 3), "2.bias": (32,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # A mean over three frames, of which neighbours share one: the teacher check wants neighbours to be alike.
    weights["2.weight"] = weights["2.weight"][:, :, :1].repeat(1, 1, 3)
    save_file(weights, folder / "my_weights.safetensors")
    return f"{file}:MyTeacher"
