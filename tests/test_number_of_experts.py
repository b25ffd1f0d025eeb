"""Every choice of k experts a row refuses a k that there are not, in one sentence."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rarefy.core.discover import methods
from rarefy.core.errors import BadInput
from rarefy.core.records import Context, Scores
from rarefy.core.roles import Choice

EXPERTS = 4
OTHERS = {"renormalise": True, "n_shared": 1}
CHOICES = {name: c for name, c in methods(Choice).items() if "k" in {f.name for f in dataclasses.fields(c)}}


@pytest.mark.parametrize("k", [0, -1, EXPERTS + 1])
@pytest.mark.parametrize("name", CHOICES)
def test_a_k_that_there_is_not_is_refused(name: str, k: int) -> None:
    choice = CHOICES[name]
    asked = {f.name: OTHERS[f.name] for f in dataclasses.fields(choice) if f.default is dataclasses.MISSING and f.name != "k"}
    with pytest.raises(BadInput, match=rf"{k}\b"):
        choice(k=k, **asked)(Scores(torch.randn(6, EXPERTS)), Context())
