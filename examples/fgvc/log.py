"""Where a run is reported while it trains: a bar or lines, a CSV file, TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fgvc.packages import require

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
        elif "val top-1" in row:
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


class Silent:
    """In place of the log in all processes but the first."""

    def advance(self) -> None:
        pass

    def write(self, row: Row) -> None:
        pass

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def by_layer(row: Row, kind: str) -> dict[str, float]:
    """The values of a row's columns "KIND LAYER"."""
    return {
        name.removeprefix(f"{kind} "): value
        for name, value in row.items()
        if name.startswith(f"{kind} ")
    }


def describe(row: Row) -> str:
    """A row in words."""
    if "val top-1" in row:
        return f"validation accuracy {row['val top-1']:.1%}, mean of classes {row['val class']:.1%}"
    text = f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}"
    pulls = by_layer(row, "pull")
    if pulls:
        text += ", CWBR's pull " + ", ".join(f"{n} {v:.0%}" for n, v in pulls.items())
    if "scale" in row:
        text += f", regularizer {row['regularizer']:.2g} x {row['scale']:.2g}"
    distances = by_layer(row, "distance")
    return text + ", distance " + ", ".join(f"{n} {v:.3f}" for n, v in distances.items())
