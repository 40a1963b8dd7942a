"""What a model can take: how long a unit of data may be and what becomes of a longer one; which tokens there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hpc_rl.training.data.columns import Rows, owners

TooLong = Literal["error", "drop"]


@dataclass(frozen=True)
class Limits:
    """Of a training.

    Attributes
    ----------
    max_length, too_long
        The config's: most tokens, None for any number; and whether what is longer is an error or dropped.
    vocabulary
        Rows of the model's embedding.
    """

    max_length: int | None = None
    too_long: TooLong = "error"
    vocabulary: int | None = None

    def keep(self, rows: Rows, column: str, lengths: NDArray[Any]) -> NDArray[np.bool_]:
        """(rows,) which rows are short enough.

        Raises
        ------
        UnusableData
            When one is not, and none may be dropped.
        """
        if self.max_length is None:
            return np.ones(len(rows), np.bool_)
        fits: NDArray[np.bool_] = lengths <= self.max_length
        if self.too_long == "error" and not fits.all():
            row = int(np.argmin(fits))
            rows.refuse(
                row, column, f"it ends at token {lengths[row]}, but max_length is {self.max_length}: raise max_length, "
                "shorten the data, or leave out what is too long with too_long: drop"
            )  # fmt: skip
        return fits

    def check(self, rows: Rows, columns: Mapping[str, pa.Array]) -> None:
        """Lists of token ids must be of the model's vocabulary; UnusableData names the first that is not."""
        if self.vocabulary is None:
            return
        for name, column in columns.items():
            values = column.flatten().to_numpy(zero_copy_only=False)
            outside = values >= self.vocabulary
            if outside.any():
                first = int(np.argmax(outside))
                rows.refuse(
                    int(owners(column)[first]), name,
                    f"it holds token {values[first]}, but the model's last one is {self.vocabulary - 1}: was it made "
                    "with another tokenizer?",
                )  # fmt: skip
