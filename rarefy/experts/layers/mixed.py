"""The layer of a mixture that is no choice: groups of tokens, and everything takes part."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from rarefy.core.ambient import Seat, aligned
from rarefy.core.records import Context, Mix
from rarefy.core.roles import Bank, Mixture
from rarefy.core.trace import Tap
from rarefy.experts.banks.glu import GLU
from rarefy.experts.mixing import run
from rarefy.experts.pooling import pooled
from rarefy.experts.routing import unpadded_rows


class Mixed(nn.Module):
    """Score groups of tokens, mix, run the bank: x [..., M, d] -> [..., M, d], a group being what leads the last two axes.

    Padding takes no part and comes out as zeros. Without a `context` the layer takes the one of its model's `Ambient`. What balance
    losses see goes to an open `Trace`: the routing of the groups, where the mixture has one.
    Tokens see later ones unless `causal`: an `Ambient` refuses to serve such a layer to a model that generates.

    Raises:
        BadInput: the context is not aligned with the tokens, or the bank cannot be merged and the mixture merges.
    """

    def __init__(self, affinity: nn.Module, choice: Mixture, bank: Bank, before: nn.Module | None = None) -> None:
        super().__init__()
        self.affinity, self.bank, self.before, self.seat, self.tap = affinity, bank, before, Seat(), Tap()
        self.choice = choice

    @property
    def causal(self) -> bool:
        """Whether no token ever sees a later one."""
        return self.choice.causal(True) and self.choice.causal(False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        groups = x.reshape(-1, *x.shape[-2:])
        context = aligned(self.seat() if context is None else context, groups.shape[0] * groups.shape[1])
        valid = None if context.valid is None else context.valid.reshape(groups.shape[:2])
        context = replace(context, valid=valid, training=self.training)
        if self.before is not None:
            groups = groups + self.before(groups)
        mixed = self.choice(self.affinity(groups, context), context)
        if isinstance(mixed, Mix) and mixed.routing is not None:
            self.tap(mixed.routing, Context(live=context.live, training=self.training), pooled(groups, valid))
        y = run(mixed, groups, self.bank)
        return unpadded_rows(y.reshape(-1, y.shape[-1]), valid).reshape(*x.shape[:-1], y.shape[-1])


def mixed(choice: Mixture, width: int, experts: int, inner: int) -> Mixed:
    """The layer that a mixture's paper trains.

    >>> import torch
    >>> from rarefy.experts.mixtures.soft_slots import SoftSlots
    >>> mixed(SoftSlots(), 6, 4, 5)(torch.randn(2, 7, 6)).shape
    torch.Size([2, 7, 6])
    """
    return Mixed(choice.affinity(width, experts), choice, (choice.bank or GLU)(experts, width, inner), choice.before(width))
