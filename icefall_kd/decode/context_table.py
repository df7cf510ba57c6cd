"""Projected outputs of a stateless decoder, once for each context."""

import torch
from torch import Tensor

# Contexts kept from one call to the next: with a joiner of 512 channels at most 32 MB a state, however
# long its streams are.
MAX_CONTEXTS = 1 << 14


class ContextTable:
    """Projected decoder outputs of the contexts seen, one row each."""

    def __init__(self, model) -> None:
        self.model = model
        self.context_size = model.decoder.context_size
        self.blank_id = model.decoder.blank_id
        self.index: dict[tuple[int, ...], int] = {}
        self.pending: list[tuple[int, ...]] = []
        self.rows: Tensor | None = None
        self.used = 0

    @property
    def start(self) -> tuple[int, ...]:
        return (-1,) * (self.context_size - 1) + (self.blank_id,)

    def row(self, context: tuple[int, ...]) -> int:
        """Return the row of a context; a new one is computed at the next :meth:`gather`."""
        row = self.index.get(context)
        if row is None:
            row = self.index[context] = len(self.index)
            self.pending.append(context)
        return row

    def forget(self) -> bool:
        """Empty a table that holds too many contexts; return whether it did, as all rows are void then."""
        if len(self.index) <= MAX_CONTEXTS:
            return False
        self.index, self.pending, self.rows, self.used = {}, [], None, 0
        return True

    def after(self, context: tuple[int, ...], token: int) -> tuple[int, ...]:
        """Return the context that follows ``context`` when ``token`` is emitted."""
        return (*context[1:], token)

    def gather(self, rows: list[int], device: torch.device) -> Tensor:
        """Return the projected decoder outputs (len(rows), C) of the given rows."""
        if self.pending:
            y = torch.tensor(self.pending, dtype=torch.int64, device=device)
            new = self.model.joiner.decoder_proj(self.model.decoder(y)[:, -1])
            need = self.used + len(new)
            if self.rows is None or need > len(self.rows):
                grown = new.new_empty((max(64, 2 * need), new.size(1)))
                if self.rows is not None:
                    grown[: self.used] = self.rows[: self.used]
                self.rows = grown
            self.rows[self.used : need] = new
            self.used = need
            self.pending = []
        return self.rows[torch.tensor(rows, dtype=torch.int64, device=device)]
