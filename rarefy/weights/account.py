"""What the record of a prune says of the model, its name, and of one site: what was kept, and the error that it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.core.records import Pruned, Site

ERROR_STATISTIC, NORM = "hessian", "input_norm"


def site_record(site: Site, weight: Tensor, pruned: Pruned, dtype: torch.dtype, seen: Mapping[str, Tensor], idle: bool, on_inputs: bool = True) -> dict[str, Any]:
    """One site's entry, see `rarefy.weights.prune.prune`.

    Args:
        weight: the dense weight [O, ..., I], float32.
        dtype: of the stored weight; the error is that of what is stored.
        seen: the site's statistics by name.
        idle: no calibration row reached it, so that its statistics say nothing.
        on_inputs: measure errors on the second moment of the inputs, where it is known.
    """
    kept = int(pruned.mask.sum())
    hessian = seen.get(ERROR_STATISTIC) if on_inputs and not idle else None
    mask_only, error = relative_errors(weight, [torch.where(pruned.mask, weight, 0.0), pruned.weight.to(dtype).float()], hessian)
    sizes = torch.empty(0) if idle else _sizes(seen)
    return {
        "name": site.name,
        "shape": list(site.shape),
        "kept": kept,
        "density": kept / site.numel,
        "error_mask_only": mask_only,
        "error": error,
        "error_on": "weight" if hessian is None else "inputs",
        **({"dead_inputs": int((sizes == 0).sum())} if len(sizes) else {}),
        **({"notes": dict(pruned.notes)} if pruned.notes else {}),
        **({"idle": True} if idle else {}),
    }


def _sizes(seen: Mapping[str, Tensor]) -> Tensor:
    """What is known of every input column's size: the diagonal of its second moment, or its norm; empty where neither is."""
    return seen[ERROR_STATISTIC].diagonal() if ERROR_STATISTIC in seen else seen.get(NORM, torch.empty(0)).reshape(-1)


def model_name(model: nn.Module) -> str:
    """The name that the model was loaded under, or its class."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def unseen(seen: Mapping[str, Tensor]) -> bool:
    """Whether these are the statistics of a site that saw no row: the collector gives every input the same weight, 1, then.

    >>> unseen({"hessian": torch.eye(3)}), unseen({"hessian": torch.ones(3, 3)}), unseen({})
    (True, False, False)
    """
    sizes = _sizes(seen)
    alike = len(sizes) > 0 and bool((sizes == 1).all())
    return alike and (ERROR_STATISTIC not in seen or int(torch.count_nonzero(seen[ERROR_STATISTIC])) == len(sizes))


def relative_errors(weight: Tensor, others: Sequence[Tensor], hessian_CC: Tensor | None) -> list[float]:
    """sqrt(tr(D H D^T) / tr(W H W^T)) with D = W - W' for each W', and H = I where it is None; 0 for a site without signal.

    >>> relative_errors(torch.tensor([[3.0, 4.0]]), [torch.tensor([[0.0, 4.0]])], None)
    [0.6]
    """

    def energy(matrix: Tensor) -> float:
        flat = matrix.reshape(matrix.shape[0], -1)
        product = flat if hessian_CC is None else flat @ hessian_CC
        return float((product.double() * flat.double()).sum().clamp(min=0.0))

    signal = energy(weight)
    return [(energy(weight - other) / signal) ** 0.5 if signal > 0 else 0.0 for other in others]


def relative_error(weight: Tensor, new: Tensor, hessian_CC: Tensor | None) -> float:
    """`relative_errors` of one other weight."""
    return relative_errors(weight, [new], hessian_CC)[0]
