"""Pruned matrices as they are stored: the weights of the kept blocks, and 16 bits a block for its place (our design).

A matrix of which blocks are kept becomes two tensors: ``values``, the weights of the kept blocks, block after block in
rows of blocks, and ``gaps``, for each of them the number of pruned blocks between it and the one before.  65535 stands
for 65535 pruned blocks in a row without a block behind them, so any mask can be stored, and no row needs a pointer.
The last blocks of a matrix that is no multiple of a block hold the weights that exist alone.  This is the size that
:func:`icefall_kd.models.pruning.sparse_size` counts.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.models.pruning import PrunableLinear

# A gap that is no place of a block.
_SKIP = 0xFFFF
VALUES, GAPS = ".values", ".gaps"


def pack_layers(
    state: Mapping[str, Tensor], layers: Mapping[str, PrunableLinear], block: tuple[int, int]
) -> tuple[dict[str, Tensor], dict]:
    """Return a state dict with the weights of pruned layers in blocks, and what :func:`unpack_layers` must know.

    Args:
        state: of the model without masks.
        layers: the pruned layers by name.
        block: rows and columns of a block.
    Raises:
        ConfigError: a mask is not made of such blocks.
    """
    packed, matrices = dict(state), {}
    for name, layer in layers.items():
        key = f"{name}.weight"
        weight = packed.pop(key)
        try:
            packed[key + VALUES], packed[key + GAPS] = pack_blocks(weight, layer.mask, block, layer.matrices)
        except ConfigError as error:
            raise ConfigError(f"the mask of {name}: {error}") from error
        matrices[key] = [*weight.shape, layer.matrices]
    return packed, {"block": list(block), "matrices": matrices}


def unpack_layers(packed: Mapping[str, Tensor], about: dict) -> dict[str, Tensor]:
    """Return the state dict that :func:`pack_layers` took, with zeros for pruned weights.

    Raises:
        DataError: tensors are missing, or do not fit what is said about them.
    """
    state = dict(packed)
    try:
        for key, (rows, columns, matrices) in about["matrices"].items():
            values, gaps = state.pop(key + VALUES), state.pop(key + GAPS)
            state[key] = unpack_blocks(values, gaps, (rows, columns), tuple(about["block"]), matrices)
    except KeyError as error:
        raise DataError(f"there is no {error}") from error
    return state


def pack_blocks(weight: Tensor, mask: Tensor, block: tuple[int, int], matrices: int = 1) -> tuple[Tensor, Tensor]:
    """Return the values (kept weights,) and the gaps (blocks,) int16, to be read as unsigned, of a matrix.

    Args:
        weight: (O, I).
        mask: (O, I) bool, True where a weight is kept.
        block: rows and columns of a block.
        matrices: how many matrices of equal size are stacked along O.
    Raises:
        ConfigError: a block is kept in part.
    """
    there = _blocks(torch.ones_like(mask), block, matrices)
    masked = _blocks(mask, block, matrices)
    kept = masked.any(1)
    if not torch.equal(masked, kept.unsqueeze(1) & there):
        raise ConfigError(
            f"it keeps parts of blocks of {block[0]} x {block[1]}; name the --prune-block that it was made with"
        )
    places = kept.nonzero().squeeze(1)
    gaps = places.diff(prepend=places.new_tensor([-1])) - 1
    counts = gaps // _SKIP + 1
    stored = torch.full((int(counts.sum()),), _SKIP)
    stored[counts.cumsum(0) - 1] = gaps % _SKIP
    values = _blocks(weight, block, matrices)[masked]
    return values, torch.where(stored > 0x7FFF, stored - 0x10000, stored).to(torch.int16)


def unpack_blocks(
    values: Tensor, gaps: Tensor, shape: tuple[int, int], block: tuple[int, int], matrices: int = 1
) -> Tensor:
    """Return the matrix (O, I) of :func:`pack_blocks`, zero where nothing was kept.

    Raises:
        DataError: values, gaps and shape do not fit each other.
    """
    there = _blocks(torch.ones(shape, dtype=torch.bool), block, matrices)
    stored = gaps.long() & 0xFFFF
    places = torch.where(stored == _SKIP, stored, stored + 1).cumsum(0) - 1
    places = places[stored != _SKIP]
    if len(places) and int(places[-1]) >= len(there):
        raise DataError(f"a matrix of {len(there)} blocks has one at place {int(places[-1]) + 1}")
    kept = torch.zeros(len(there), dtype=torch.bool)
    kept[places] = True
    kept = kept.unsqueeze(1) & there
    if int(kept.sum()) != len(values):
        raise DataError(f"{len(values)} weights are stored for blocks that hold {int(kept.sum())}")
    blocks = values.new_zeros(there.shape)
    blocks[kept] = values
    return _matrix(blocks, shape, block, matrices)


def _blocks(x: Tensor, block: tuple[int, int], matrices: int) -> Tensor:
    """Return the blocks (B, rows * columns) of stacked matrices (O, I), filled up with zeros (False)."""
    rows, columns = block
    parts = []
    for part in x.chunk(matrices):
        part = F.pad(part, (0, -part.shape[1] % columns, 0, -part.shape[0] % rows))
        part = part.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # (O, I) -> (O/r, r, I/c, c)
        parts.append(part.transpose(1, 2).reshape(-1, rows * columns))
    return torch.cat(parts)


def _matrix(blocks: Tensor, shape: tuple[int, int], block: tuple[int, int], matrices: int) -> Tensor:
    """Undo :func:`_blocks`."""
    rows, columns = block
    out_dim = shape[0] // matrices
    grid = -(-out_dim // rows), -(-shape[1] // columns)
    parts = []
    for part in blocks.chunk(matrices):
        part = part.view(*grid, rows, columns).transpose(1, 2)  # (O/r, I/c, r, c) -> (O/r, r, I/c, c)
        parts.append(part.reshape(grid[0] * rows, grid[1] * columns)[:out_dim, : shape[1]])
    return torch.cat(parts)
