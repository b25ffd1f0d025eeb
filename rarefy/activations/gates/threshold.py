"""Threshold: activations below a fixed magnitude become zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.roles import Gate


class Threshold(Gate):
    """Zero what is smaller in magnitude than a fixed threshold.

    ``y = x where not |x| < t, else 0;  dL/dx = dL/dy where kept, 0 elsewhere;  t = the round(density * N)-th largest |x| of N calibration values``

    t is a buffer, rounded to the dtype of x [..., C] when compared, and not learned. It is fixed by `calibrate`; a gate
    of density 1 has t = 0 and is open. Other tokens reach another density than those of the calibration.

    Raises:
        BadInput: a density outside (0, 1], a threshold that is negative or not finite; calibration rows without values or with NaN or inf.

    >>> gate = Threshold(density=0.5)
    >>> gate.calibrate(torch.tensor([[1.0, -3.0], [2.0, 0.5]]))
    >>> gate(torch.tensor([1.9, -2.0])).tolist()
    [0.0, -2.0]
    """

    name: ClassVar[str] = "threshold"
    threshold: Tensor

    def __init__(self, density: float = 1.0, threshold: float = 0.0) -> None:
        super().__init__()
        keep_count(1, density)
        if not density > 0:
            raise BadInput(f"density {density}", "a threshold is a value that occurs, so some are kept", "pass a density in (0, 1]")
        if not 0 <= threshold <= torch.finfo(torch.float32).max:
            raise BadInput(f"threshold {threshold}", "a threshold is a finite float32, 0 or more")
        self.density = float(density)
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float32))

    @classmethod
    def examples(cls) -> tuple[Threshold, ...]:
        return cls(), cls(threshold=0.3), cls(density=0.5), cls(density=0.1)

    def keep(self, x: Tensor) -> Tensor:
        return ~(x.detach().abs() < self.threshold.to(x.dtype))

    @property
    def needs_rows(self) -> bool:
        return self.density < 1 and not float(self.threshold)

    def calibrate(self, rows: Tensor) -> None:
        values = rows.detach().abs().flatten()
        if values.numel() == 0 or not bool(torch.isfinite(values).all()):
            raise BadInput(f"calibration rows of shape {tuple(rows.shape)}", "a threshold is found among finite values", "check the calibration data for NaN or inf")
        count = max(keep_count(values.numel(), self.density), 1)
        found = values.kthvalue(values.numel() - count + 1).values if count < values.numel() else torch.zeros(())
        self.threshold.copy_(found)

    def settings(self) -> dict[str, float]:
        return {"density": self.density, "threshold": float(self.threshold)}

    def extra_repr(self) -> str:
        return f"density={self.density}, threshold={float(self.threshold)}"
