"""Optional packages: imported where they are needed, with a message that says what for."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """The module, or a ValueError that says what needs it and how to get it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or package).split(".")[0]
        needed = package if missing == package else f"{package}, which needs {missing}"
        raise ValueError(f"{purpose} needs the package {needed}: pip install {missing}") from error
    except RuntimeError as error:
        # A torchvision that was built for another torch fails so.
        raise ValueError(
            f"{purpose}: {package} does not load beside this torch: {error}"
        ) from error
