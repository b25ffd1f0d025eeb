"""Channel threshold: activations whose expected product is small become zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count
from rarefy.core.roles import Gate


class ChannelThreshold(Gate):
    """Zero what contributes little to ``a_i u_i``: one threshold on the score, hence one on |a_i| for each channel.

    ``score_i = a_i^2 E[u_i^2];  tau = the round(density * N)-th largest of N scores;  y_i = a_i where not |a_i| < t_i = sqrt(tau / E[u_i^2]), else 0``

    a [..., C] is gated and u [R, C], its `partner` at calibration, is what it is multiplied by; without one the expected
    squares count as equal, and the gate is `Threshold`. A channel whose u was always zero has no finite threshold: it is
    dropped always, as its product is zero. t is the buffer `threshold` [C], which only calibration sets.

    Raises:
        BadInput: a density outside (0, 1]; channels that are no whole number; calibration rows without values, of unequal shapes, or with NaN or inf.

    >>> gate = ChannelThreshold(density=0.5)
    >>> gate.calibrate(torch.tensor([[2.0, 1.0]]), partner=torch.tensor([[1.0, 9.0]]))
    >>> gate(torch.tensor([2.0, 1.0])).tolist()
    [0.0, 1.0]
    """

    name: ClassVar[str] = "channel-threshold"
    stored: ClassVar[tuple[str, ...]] = ("threshold",)
    threshold: Tensor

    def __init__(self, density: float = 1.0, channels: int = 1) -> None:
        super().__init__()
        keep_count(1, density)
        if not density > 0:
            raise BadInput(f"density {density}", "a threshold is a value that occurs, so some are kept", "pass a density in (0, 1]")
        if int(channels) != channels or not 0 < channels < 2**24:
            raise BadInput(f"channels {channels}", "a gate has between 1 and 16777215 channels")
        self.density = float(density)
        self.register_buffer("threshold", torch.zeros(int(channels)))

    @classmethod
    def examples(cls) -> tuple[ChannelThreshold, ...]:
        return cls(), cls(density=0.5), cls(density=0.1)

    def keep(self, x: Tensor) -> Tensor:
        return ~(x.detach().abs() < self.threshold.to(x.dtype))

    @property
    def needs_rows(self) -> bool:
        return self.density < 1 and not bool(self.threshold.any())

    def calibrate(self, rows: Tensor, *, partner: Tensor | None = None) -> None:
        u = torch.ones_like(rows) if partner is None else partner
        if rows.numel() == 0 or u.shape != rows.shape or not bool(torch.isfinite(rows).all() and torch.isfinite(u).all()):
            raise BadInput(
                f"calibration rows of shapes {tuple(rows.shape)} and {tuple(u.shape)}", "thresholds are found among finite values of one shape", "check the calibration data"
            )
        scale = u.detach().float().square().mean(0).sqrt()
        scores = (rows.detach().float().abs() * scale).flatten()
        count = max(keep_count(scores.numel(), self.density), 1)
        tau = scores.kthvalue(scores.numel() - count + 1).values if count < scores.numel() else torch.zeros(())
        most = torch.finfo(torch.float32).max
        self.threshold = torch.where(tau > 0, (tau / scale).clamp(max=most), torch.zeros_like(scale))

    def settings(self) -> dict[str, float]:
        return {"density": self.density, "channels": self.threshold.numel()}

    def extra_repr(self) -> str:
        return f"density={self.density}, channels={self.threshold.numel()}"
