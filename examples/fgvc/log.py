"""Where a run is reported while it trains: a bar or lines, a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fgvc.data import require

LOG = "log.csv"
Row = dict[str, float]


class Log:
    """The log of one run in `folder`; `history` holds the rows of before it was interrupted."""

    def __init__(
        self,
        folder: Path,
        title: str,
        columns: Sequence[str],
        history: Sequence[Row],
        step: int,
        total: int,
        tensorboard: bool,
    ) -> None:
        self._title, self._total = title, total
        self._board: Any = None
        if tensorboard:
            require("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=step + 1)
        self._bar: Any = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, desc=title, unit="step", dynamic_ncols=True)
        self._file = (folder / LOG).open("w", newline="")
        self._csv = csv.DictWriter(self._file, columns)
        self._csv.writeheader()
        self._csv.writerows(history)

    def advance(self) -> None:
        """One step is done."""
        if self._bar is not None:
            self._bar.update()

    def write(self, row: Row) -> None:
        self._csv.writerow(row)
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name.replace(" ", "/"), value, int(row["step"]))
        text = describe(row)
        if self._bar is None:
            print(f"{self._title}: step {int(row['step'])} of {self._total}, {text}", flush=True)
        elif "val_accuracy" in row:
            self._bar.write(f"{self._title}: epoch {int(row['epoch'])}, {text}")
        else:
            self._bar.set_postfix_str(text)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        for writer in (self._board, self._bar):
            if writer is not None:
                writer.close()


def describe(row: Row) -> str:
    """A row in words."""
    if "val_accuracy" in row:
        return f"validation accuracy {row['val_accuracy']:.1%}"
    overlaps = ", ".join(
        f"{name.removeprefix('rho ')} {value:.2g}"
        for name, value in row.items()
        if name.startswith("rho ")
    )
    return (
        f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}, "
        f"regularizer {row['regularizer']:.2g}, scale {row['scale']:.2g}, rho {overlaps}"
    )
