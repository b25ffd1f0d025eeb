"""A layer that routes by any choice, named with its hyper-parameters."""

from __future__ import annotations

from rarefy.core.discover import part
from rarefy.core.roles import Balance, Choice, Controller


class NamedChoice:
    """`router` names a choice; its balance losses and controllers are the layer's."""

    router: str

    @property
    def choice(self) -> Choice:
        return part(Choice, self.router)

    @property
    def balances(self) -> tuple[Balance, ...]:
        return self.choice.balances

    @property
    def controllers(self) -> tuple[Controller, ...]:
        return self.choice.controllers
