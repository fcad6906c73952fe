"""The options of the published form, checked once and passed on as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cwbr_fused.inputs import validation
from cwbr_fused.operations import backends
from cwbr_fused.operations.backends import Backend
from cwbr_fused.operations.distributed import Group

Objective: TypeAlias = Literal["overlap", "log_overlap"]
Temperature: TypeAlias = float | Literal["dims"] | None
Shrinkage: TypeAlias = float | Literal["analytic", "pooled"] | None


@dataclass(frozen=True)
class OverlapOptions:
    """The keywords of `cwbr_fused.loss`; its docstring says what they mean."""

    top_m: int | None = 64
    min_count: int = 2
    eps: float = 1e-6
    objective: Objective = "overlap"
    backend: Backend = "auto"
    group: Group = None
    temperature: Temperature = None
    shrinkage: Shrinkage = None
    noise_floor: bool = False

    @property
    def log(self) -> bool:
        """Whether the objective is the logarithm of the overlap."""
        return self.objective == "log_overlap"

    @property
    def adjusted(self) -> bool:
        """Whether the distances differ from the plain formulas."""
        return self.temperature is not None or self.shrinkage is not None or self.noise_floor

    def check(self) -> OverlapOptions:
        """The options themselves, if they are valid.

        Raises:
            TypeError, ValueError: naming the option.
        """
        if self.top_m is not None:
            validation.check_positive_int("top_m", self.top_m, " or None for all pairs")
        validation.check_positive_int("min_count", self.min_count)
        validation.check_eps(self.eps)
        validation.check_choice("objective", self.objective, ("overlap", "log_overlap"))
        validation.check_number_or("temperature", self.temperature, ("dims",))
        validation.check_number_or("shrinkage", self.shrinkage, ("analytic", "pooled"))
        if not isinstance(self.noise_floor, bool):
            given = validation.describe(self.noise_floor)
            raise TypeError(f"noise_floor: expected a bool, got {given}")
        if self.noise_floor and self.shrinkage is None and self.min_count == 1:
            raise ValueError(
                "min_count: expected at least 2 with noise_floor and no shrinkage, as one sample "
                "has no variance, got 1"
            )
        validation.check_group(self.group)
        backends.check(self.backend)
        return self
