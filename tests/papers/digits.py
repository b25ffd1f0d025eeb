"""A small MLP on the scikit-learn digits, trained with a fixed mask; shared by the paper checks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.records import Recipe, Units


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def select(model: nn.Module, recipe: Recipe, density: float, floor: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """The masks that a recipe without statistics gives at a global density."""
    found = {name: p.detach() for name, p in weights(model).items()}
    units = [Units(name, tuple(w.shape), (), floor=floor) for name, w in found.items()]
    generator = torch.Generator().manual_seed(seed)
    scores = {name: recipe.solver.criterion.scores(w, generator=generator) for name, w in found.items()}
    budget = round(density * sum(w.numel() for w in found.values()))
    asked = {"scores": scores} if "scores" in recipe.allocation.counts.__code__.co_varnames else {}
    counts = recipe.allocation.counts(units, budget, **asked)
    return {name: recipe.pattern.mask(scores[name], counts[name]) for name in found}


def train(model: nn.Module, masks: Mapping[str, Tensor], steps: int = 150, seed: int = 0) -> float:
    """Masked training; the accuracy on held-out digits."""
    x, y, held_x, held_y = data()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    sites = weights(model)
    for step in range(steps + 1):
        with torch.no_grad():
            for name, mask in masks.items():
                sites[name].mul_(mask)
        if step < steps:
            pick = torch.randint(len(y), (128,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[pick]), y[pick]).backward()
            optimizer.step()
    return float((model(held_x).argmax(1) == held_y).float().mean())
