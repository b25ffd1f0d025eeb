"""A tensor that lies in a layout and takes part in torch: operators are looked up in the registry, everything else is computed densely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

import rarefy.layouts as _layouts
from rarefy.core.discover import pick
from rarefy.core.errors import Refused
from rarefy.core.roles import Matrix, Selection
from rarefy.layouts.registry import DENSE, STEN, Key, canonical, find, missing, name_of, policy, selector
from rarefy.layouts.selections import All, Same

Call = Callable[..., Any]

_ABOUT = ("shape", "dtype", "device", "layout", "ndim", "grad", "grad_fn", "requires_grad", "is_leaf", "is_sparse", "is_cuda", "is_meta", "is_quantized")
_MORE = ("is_mkldnn", "is_nested", "output_nr", "retains_grad", "_version", "_backward_hooks", "_post_accumulate_grad_hooks")
_PLAIN = {getattr(Tensor, name).__get__ for name in (*_ABOUT, *_MORE) if hasattr(Tensor, name)} | {
    getattr(Tensor, name).__set__ for name in ("grad", "requires_grad", "_backward_hooks")
}
_PLAIN |= {getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point", "is_complex", "__hash__", "__len__")}
_PLAIN |= {getattr(Tensor, name) for name in ("register_hook", "retain_grad", "requires_grad_", "backward")} | {
    torch.autograd.grad,
    torch.autograd.backward,
    torch.is_floating_point,
}
_WRITES = {"__setitem__", "__set__", *(f"__i{name}__" for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"))}
_DETACH = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


class LayoutTensor(Tensor):
    """A tensor [..., C] whose values lie in a layout, as the matrix of all its rows.

    It has the shape, dtype and gradient of the tensor it stands for, and no values of its own: `packed` are its bytes.
    A function of torch that is given one is looked up in `rarefy.layouts.registry`. Where nothing is registered, it is
    computed on dense tensors and returns them, and one warning says so; gradients are those of the dense function in any case.

    Raises:
        Refused: a function that would write to it in place.

    >>> x = LayoutTensor.of(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), "csr")
    >>> x, x.packed.numel(), x.to_dense().tolist()
    (LayoutTensor(csr, shape=(2, 2), dtype=torch.float32), 192, [[0.0, 2.0], [0.0, 0.0]])
    >>> torch.nn.functional.linear(torch.ones(1, 2), x).tolist()
    [[2.0, 0.0]]
    """

    paper = STEN
    laid: str
    packed: Tensor
    _matrix: Matrix | None

    @staticmethod
    def __new__(cls, laid: str, packed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> LayoutTensor:
        hollow = torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=packed.device).expand(tuple(shape))
        made = Tensor._make_subclass(cls, hollow)
        made.laid, made.packed, made._matrix = laid, packed, None
        return made

    def __init__(self, *args: Any) -> None:
        """What there is to do is done where it is made."""

    @classmethod
    def of(cls, values: Tensor, layout: str, keep: Selection | None = None) -> LayoutTensor:
        """`values`, or what a selection keeps of them, in a layout; differentiable where the values are."""
        found: LayoutTensor = convert(values, keep or All(), layout)
        return found

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The dense tensor; differentiable."""
        return convert(self, All(), DENSE)

    def matrix(self) -> Matrix:
        """The rows [N, C], ready to compute with."""
        if self._matrix is None:
            self._matrix = _layouts.LAYOUTS[self.laid].matrix(self.packed, _flat(self.shape), self.dtype)
        return self._matrix

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"LayoutTensor({self.laid}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LayoutTensor:
        if self.grad_fn is not None:
            raise Refused("a deep copy of a tensor with a graph", "as of any tensor, only leaves can be copied", "detach it first")
        copied = LayoutTensor(self.laid, self.packed.clone(), self.shape, self.dtype)
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return LayoutTensor, (self.laid, self.packed, tuple(self.shape), self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _DETACH:
            (x,) = args
            return LayoutTensor(x.laid, x.packed, x.shape, x.dtype)
        return run(func, args, kwargs or {})


def layout_of(x: Tensor) -> str:
    """The name of the layout that a tensor lies in; `dense` for a plain one."""
    return x.laid if isinstance(x, LayoutTensor) else DENSE


def convert(x: Tensor, keep: Selection, into: str, gradient: Any = None, kept: Tensor | None = None, *, selected: bool = False) -> Any:
    """What a selection keeps of a tensor, in another layout or `dense`.

    Args:
        gradient: a `rarefy.layouts.formats.Format` for the gradient of what is returned, which sees what was kept;
            None hands the gradient on as it is, to what was dropped too.
        kept: what stays already, for the selection.
        selected: the zeros of `x` were dropped by a selection before.
    """
    if into != DENSE:
        pick(_layouts.LAYOUTS, into, "layout")
    if layout_of(x) == into and type(keep) is All and gradient is None:
        return x
    if torch.compiler.is_compiling():
        return _compiled(x, keep, into, gradient, kept, selected)
    return _Convert.apply(x, keep, into, gradient, kept, selected)


def _compiled(x: Tensor, keep: Selection, into: str, gradient: Any, kept: Tensor | None, selected: bool) -> Tensor:
    """The same values and gradients; compiled code lays nothing down."""
    if into != DENSE and not _layouts.LAYOUTS[into].lossless:
        raise Refused(f"layout {into} in compiled code", "compiled code stays dense, and this layout changes values", "take a lossless layout, or do not compile")
    if gradient is not None and not gradient.derives:
        raise Refused("the format of a gradient in compiled code", "compiled code has the gradient that autograd finds", "take the default format, or do not compile")
    mask = keep.mask(x.detach(), kept)
    if gradient is None:
        return x + (torch.where(mask, x, 0) - x).detach()
    return torch.where(mask & (x != 0) if selected else mask, x, 0)


def run(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, keep: Selection | None = None, into: str = DENSE, call: Call | None = None) -> Any:
    """`op(*args, **kwargs)` by what is registered for the layouts of its tensors, else densely.

    Args:
        keep, into: the selection inside the operator and the layout of what it returns.
        call: what computes it densely, where that is not `op` itself.
    """
    keep = keep or All()
    _refuse_writes(op, kwargs)
    leaves, spec = tree_flatten((list(args), {**kwargs, "inplace": False} if kwargs.get("inplace") else dict(kwargs)))
    where = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    key = Key(canonical(op), tuple(layout_of(leaves[place]) for place in where), type(keep), into)
    invocation = _Invocation(call or op, leaves, spec, where, key, keep)
    plain = set(key.layouts) == {DENSE}
    if plain and torch.compiler.is_compiling():
        return convert(invocation.densely([leaves[place] for place in where]), keep, into)
    if plain and into == DENSE and type(keep) is All:
        return invocation.densely([leaves[place] for place in where])
    found = find(key)
    if found is None:
        missing(key)
        made = invocation.densely([convert(leaves[place], All(), DENSE) for place in where])
        return made if into == DENSE and type(keep) is All else convert(made, keep, into)
    function, layouts = found
    tensors = [leaves[place] if have == want else convert(leaves[place], All(), want) for place, have, want in zip(where, key.layouts, layouts, strict=True)]
    invocation.function = function if type(keep) is All else lambda *a, **k: function(keep, *a, **k)
    invocation.policy = policy()
    return _Run.apply(invocation, *tensors)


def _refuse_writes(op: Any, kwargs: Mapping[str, Any]) -> None:
    name = getattr(op, "__name__", "")
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")) or isinstance(kwargs.get("out"), LayoutTensor):
        raise Refused(f"{name_of(op)} on a tensor in a layout", "its bytes cannot be written to in place", "use the function that returns a new tensor, or to_dense() first")


class _Invocation:
    """One call of an operator: its arguments with places for the tensors among them."""

    def __init__(self, call: Call, leaves: list[Any], spec: Any, where: list[int], key: Key, keep: Selection) -> None:
        self.call, self.leaves, self.spec, self.where, self.key, self.keep = call, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec, where, key, keep
        self.function: Call = call
        self.policy: Any = None  # that of the forward, for the derivative

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.where, tensors, strict=True):
            leaves[place] = tensor
        found: tuple[list[Any], dict[str, Any]] = tree_unflatten(leaves, self.spec)
        return found

    def densely(self, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.arguments(tensors)
        return self.call(*args, **kwargs)

    def registered(self, tensors: Sequence[Tensor]) -> Any:
        args, kwargs = self.arguments(tensors)
        return self.function(*args, **kwargs)

    def derivative(self, gradients: Sequence[Tensor], tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradient of each tensor: by what is registered, else of the dense operator, computed again."""
        key = Key(self.key.op, tuple(layout_of(x) for x in tensors), gradient=True)
        found = find(key)
        if found is not None:
            args, kwargs = self.arguments([convert(x, All(), want) for x, want in zip(tensors, found[1], strict=True)])
            return list(found[0](*gradients, *args, **kwargs))
        if set(key.layouts) != {DENSE}:
            missing(key, self.policy)
        with torch.enable_grad():
            dense = [convert(x.detach(), All(), DENSE).detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
            made = self.densely(dense)
        outputs = [made] if isinstance(made, Tensor) else [x for x in made if isinstance(x, Tensor)]
        ways = [(x, g) for x, g in zip(outputs, gradients, strict=False) if x.requires_grad]
        got = iter(torch.autograd.grad([x for x, _ in ways], [x for x, need in zip(dense, needed, strict=True) if need], [g for _, g in ways], allow_unused=True))
        return [next(got) if need else None for need in needed]


class _Run(torch.autograd.Function):
    """A registered implementation, with the registered derivative or that of the dense operator."""

    @staticmethod
    def forward(ctx: Any, invocation: _Invocation, *tensors: Tensor) -> Any:
        ctx.invocation = invocation
        ctx.save_for_backward(*tensors)
        return invocation.registered(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *ctx.invocation.derivative(gradients, ctx.saved_tensors, ctx.needs_input_grad[1:])


class _Convert(torch.autograd.Function):
    """From one layout to another, or to a dense tensor, with what a selection keeps; the gradient is kept in its own format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Selection, into: str, gradient: Any, kept: Tensor | None, selected: bool) -> Tensor:
        ctx.gradient = gradient
        if gradient is not None:
            values = _values(x)
            mask = keep.mask(values, kept)
            ctx.kept = mask & (values != 0) if selected else mask
        return _converted(x, keep, into, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient if ctx.gradient is None else ctx.gradient.of(gradient, kept=ctx.kept)), None, None, None, None, None


def _converted(x: Tensor, keep: Selection, into: str, kept: Tensor | None) -> Tensor:
    source = layout_of(x)
    registered = None if kept is not None and type(keep) is Same else selector(keep, source, into)  # what stays already is only known here
    if registered is not None:
        made: Tensor = registered(keep, x)
        return made
    values = _values(x)
    if type(keep) is not All:
        values = torch.where(keep.mask(values, kept), values, 0)
    if into == DENSE:
        return values.clone() if values is x else values
    return LayoutTensor(into, _layouts.LAYOUTS[into].pack(values.reshape(_flat(values.shape)).contiguous()), values.shape, values.dtype)


def _values(x: Tensor) -> Tensor:
    """The dense values, outside of any graph."""
    if not isinstance(x, LayoutTensor):
        return x
    return _layouts.LAYOUTS[x.laid].unpack(x.packed, _flat(x.shape), x.dtype).view(x.shape)


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix."""
    columns = shape[-1] if len(shape) else 1
    return torch.Size(shape[:-1]).numel(), columns
