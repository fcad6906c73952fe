"""Setuptools as the build backend, on the torch that is installed already.

pip builds a package in an environment of its own and would first install torch there: gigabytes,
and perhaps another build of torch than the one that runs the package. This backend finds the torch
of the interpreter that pip runs on. It asks for a torch only where there is none.
"""

from __future__ import annotations

import importlib.metadata
import os
import site
import sys
from typing import Any

from setuptools import build_meta

OLDEST_TORCH = (2, 10)

Settings = dict[str, Any] | None


def _environment() -> list[str]:
    """The folders of installed packages that an isolated build does not see."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment has no packages of the user
        folders.append(site.getusersitepackages())
    return [folder for folder in folders if folder not in sys.path and os.path.isdir(folder)]


def _has_torch() -> bool:
    for torch in importlib.metadata.distributions(name="torch"):
        return tuple(map(int, torch.version.split(".")[:2])) >= OLDEST_TORCH
    return False


def _required() -> list[str]:
    if os.environ.get("CWBR_BUILD") == "none" or _has_torch():
        return []
    return ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """What pip installs before `build_sdist`."""
    return []


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What pip installs before `build_wheel` and `build_editable`."""
    return _required()


def prepare_metadata_for_build_wheel(directory: str, config_settings: Settings = None) -> str:
    """The metadata, for which no torch is asked."""
    os.environ["CWBR_BUILD"] = "none"
    return str(build_meta.prepare_metadata_for_build_wheel(directory, config_settings))


def build_sdist(directory: str, config_settings: Settings = None) -> str:
    """The sources, for which nothing is compiled."""
    os.environ["CWBR_BUILD"] = "none"
    return str(build_meta.build_sdist(directory, config_settings))


get_requires_for_build_editable = get_requires_for_build_wheel
prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable

# At the end of sys.path: what the build environment has itself comes first.
for _folder in _environment():
    site.addsitedir(_folder)
