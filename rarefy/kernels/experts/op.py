"""The operations that dispatch calls: native where they suit, the reference elsewhere.

A native product reads the weights of an expert that has rows once, and no others. It takes what float32 tensors on the CPU hold as they
lie; gradients, the compiler, other types and whoever watches torch's calls get the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.core.errors import BadInput
from rarefy.kernels.experts import reference
from rarefy.kernels.library import native, pointer, suits

# Rows that an expert gets on average up to which ours is the faster one. Measured by processor time on one thread, both products of experts
# of [1024, 512], [2048, 1024] and [512, 256], with AVX-512 and with all held to AVX2: 1.05 to 1.18 times as fast as torch at 64, equal near 100.
FEW = 64


def few(assignments: int, experts: int) -> bool:
    """Whether experts get so few rows on average that the native product is the faster one."""
    return assignments <= FEW * experts


def plain(*tensors: Tensor | None) -> bool:
    """Whether the native side may compute with these: they suit it, and nobody watches torch's calls, as a counter of operations does."""
    return suits(*tensors) and not torch._C._len_torch_dispatch_stack() and not torch._C._len_torch_function_stack()


def _numbers(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype == torch.long and t.is_contiguous()) for t in tensors)


def _run(name: str, *arguments: int) -> None:
    try:
        getattr(native(), name)(*arguments)
    except ValueError as error:
        raise BadInput("a routing to experts", str(error), "give experts in 0 .. E, where E is nobody, and items that are rows") from error


def sort(expert: Tensor, item: Tensor | None, weight: Tensor, rows: int, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments (expert, item, weight [N]) in the order of their experts, and the inclusive ends [E] of each one's; stable.

    Without `item` every one of the rows has N / rows assignments, in a row.
    Raises BadInput for an expert outside 0 .. E (nobody) or an item that is no row, where the native side sorts.

    >>> [t.tolist() for t in sort(torch.tensor([2, 0, 1, 0]), None, torch.ones(4), 2, 2)]
    [[0, 0, 1, 2], [0, 1, 1, 0], [1.0, 1.0, 1.0, 1.0], [2, 3]]
    """
    count = expert.shape[0]
    if not (experts > 0 and weight.shape == expert.shape and plain(weight) and _numbers(expert, item)):
        each = count // max(1, rows)
        which = torch.arange(rows, device=expert.device).repeat_interleave(each) if item is None else item
        return reference.sort(expert, which, weight, experts)
    ordered, which, share, ends = torch.empty_like(expert), torch.empty_like(expert), torch.empty_like(weight), torch.empty(experts, dtype=torch.long)
    given = pointer(expert), pointer(item), pointer(weight), count, rows, experts
    _run("experts_sort", *given, pointer(ordered), pointer(which), pointer(share), pointer(ends))
    return ordered, which, share, ends


def linear(x: Tensor, weight: Tensor, ends: Tensor, item: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``y_n = W_e x_{item_n} + b_e`` for the expert e whose span holds n, 0 beyond the last end.

    x [R, I] with item [N], or x [N, I] without; weight [E, O, I], bias [E, O], ends [E] -> [N, O].
    Raises BadInput for ends or items outside, where the native side computes.

    >>> x, weight = torch.tensor([[1.0], [2.0]]), torch.tensor([[[10.0]], [[100.0]]])
    >>> linear(x, weight, torch.tensor([1, 2]), torch.tensor([1, 0, 0])).tolist()
    [[20.0], [100.0], [0.0]]
    """
    y = natively(x, weight, ends, item, bias)
    return reference.linear(x, weight, ends, item, bias) if y is None else y


def natively(x: Tensor, weight: Tensor, ends: Tensor, item: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """What `linear` gives, by the native side; None where that does not suit."""
    (experts, outputs, inputs), count = weight.shape, (x if item is None else item).shape[0]
    fits = weight.numel() > 0 and x.shape[1:] == (inputs,) and ends.shape == (experts,) and (bias is None or bias.shape == (experts, outputs))
    if not (fits and few(count, experts) and plain(x, weight, bias) and _numbers(ends, item)):
        return None
    y = torch.empty(count, outputs)
    rows = pointer(x), x.shape[0], pointer(item), pointer(ends), count
    _run("experts_linear", pointer(weight), pointer(bias), experts, outputs, inputs, *rows, pointer(y), torch.get_num_threads())
    return y


def combine(y: Tensor, item: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``out_r = sum_n [item_n = r] w_n y_n``: y [A, O] -> [R, O] for the R rows of x, in its type; item and weight may be longer than A.

    >>> combine(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 1]), torch.tensor([0.5, 2.0]), torch.ones(2, 3)).tolist()
    [[0.0], [4.5]]
    """
    if not (plain(y, weight, x) and _numbers(item) and y.dim() == 2 and y.shape[1] > 0 and y.shape[0] <= min(item.shape[0], weight.shape[0])):
        return reference.combine(y, item, weight, x)
    out = torch.empty(x.shape[0], y.shape[1])
    _run("experts_combine", pointer(y), *y.shape, pointer(item), pointer(weight), pointer(out), x.shape[0], torch.get_num_threads())
    return out
