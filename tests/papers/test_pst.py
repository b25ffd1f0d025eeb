"""PST: what is trained, what learns by which way, the mask at the start, and what is exported.

Measured here: see `test_factors_learn_what_to_keep`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.core.attach import attach_view, exported
from rarefy.core.errors import BadInput
from rarefy.core.exact import keep_count, topk_mask
from rarefy.tasks.digits import Digits
from rarefy.weights.allocations.erdos_renyi import ERK
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.train import train
from rarefy.weights.views.pst import PST, PST_RECIPE, is_factor
from tests.evidence import check
from tests.papers.at_start import DIGITS
from tests.test_cli import run

START = "at the start the mask is that of magnitudes and the output that of the masked weight; later S - |W'| has a rank of at most K + 2"
WAYS = "gradients of all six factors are those of W' and of S, worked out by hand; r's is the row sum of dL/dw_eff * W'"
TRAINED = "factors alone are trained, 2 K (O + I) + O + I numbers a matrix, and the model's own weights stay bit for bit"
LEARNED = "on digits at 3%, two seeds, what is kept is learned: above the same training with magnitudes deciding"
OUT, IN, RANK = 7, 9, 3


def made(kind: type[PST] = PST, kept: int = 20) -> tuple[PST, Tensor]:
    view = kind(OUT, IN, kept, RANK, torch.Generator().manual_seed(0))
    view.knobs["pruned"] = 1.0
    return view, torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def moved(view: PST) -> PST:
    """As training might leave it."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in view.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=g))
    return view


def start_holds(kind: type[PST]) -> None:
    view, weight = made(kind)
    mask = topk_mask(weight.abs(), 20)
    assert torch.equal(view(weight), torch.where(mask, weight, 0.0)) and torch.equal(view.export(weight).mask, mask)
    moved(view)
    updated = view.updated(weight)
    assert torch.allclose(updated - weight, view.u @ view.v) and int(torch.linalg.matrix_rank(updated - weight)) == RANK
    learned = view.scores(updated) - updated.abs()
    assert int(torch.linalg.matrix_rank(learned)) == RANK + 2 < min(OUT, IN)
    found = view.export(weight)
    assert int(found.mask.sum()) == 20 and not torch.equal(found.mask, topk_mask(updated.abs(), 20))
    assert torch.equal(found.weight, view(weight)) and torch.equal(found.mask, topk_mask(view.scores(updated), 20))


class FullScores(PST):
    """A twin: importance is a matrix of its own, dense and trained."""

    def scores(self, updated_OI: Tensor) -> Tensor:
        extra = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) * self.b.detach().abs().mean()
        return super().scores(updated_OI) + extra


class Magnitudes(PST):
    """A twin: the data-driven parts of importance are left out."""

    def scores(self, updated_OI: Tensor) -> Tensor:
        return updated_OI.abs()


@check("pst", START, kind="method")
def test_the_start() -> None:
    start_holds(PST)


@check("pst", START, kind="twin")
@pytest.mark.parametrize("kind", [FullScores, Magnitudes])
def test_other_scores(kind: type[PST]) -> None:
    with pytest.raises(AssertionError):
        start_holds(kind)


def ways_hold(kind: type[PST]) -> None:
    view, weight = made(kind)
    moved(view)
    seen = view(weight)
    above = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(4))  # dL/dw_eff
    (seen * above).sum().backward()
    with torch.no_grad():
        updated, mask = view.updated(weight), view.export(weight).mask
        score = above * updated
        through = above * mask + score * updated.sign()
        expected = {"a": score @ view.b.t(), "b": view.a.t() @ score, "r": score.sum(1), "c": score.sum(0), "u": through @ view.v.t(), "v": view.u.t() @ through}
    for name, parameter in view.named_parameters():
        assert parameter.grad is not None and torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-5), name


class OneWay(PST):
    """The twin: importance learns through its own factors alone, not through |W'|."""

    def scores(self, updated_OI: Tensor) -> Tensor:
        return super().scores(updated_OI.detach())


@check("pst", WAYS, kind="method")
def test_both_ways() -> None:
    ways_hold(PST)


@check("pst", WAYS, kind="twin")
def test_one_way() -> None:
    with pytest.raises(AssertionError, match=r"^[uv]"):
        ways_hold(OneWay)


Change = Callable[[Sparsifier], None]


def trained_holds(change: Change) -> None:
    """The last phase on digits: what moves, what is counted, what is exported."""
    model = DIGITS.model(0)
    sp = Sparsifier(model, PST_RECIPE.phases(0.1, 40), total=40)
    sp.attach(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2))
    own: dict[str, Tensor] = {}
    for step in range(40):
        if step == 20:
            change(sp)
            own = {name: p.detach().clone() for name, p in model.named_parameters() if not is_factor(name)}
        model.zero_grad()
        sp.loss(DIGITS.loss(model, DIGITS.batch(0, step))).backward()
        assert sp.optimizer is not None
        sp.optimizer.step()
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    assert sum(trainable) == sum(2 * 8 * (o + i) + o + i for o, i in ((64, 64), (64, 64), (10, 64)))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in own.items())
    with exported(model):
        assert [int((w != 0).sum()) for w in sp.weights.values()] == [410, 409, 64]


def everything(sp: Sparsifier) -> None:
    """The twin: the weights are trained besides."""
    for parameter in sp.model.parameters():
        parameter.requires_grad_(True)


@check("pst", TRAINED, kind="method")
def test_factors_alone_are_trained() -> None:
    pytest.importorskip("sklearn")
    trained_holds(lambda sp: None)


@check("pst", TRAINED, kind="twin")
def test_everything_is_trained() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(AssertionError):
        trained_holds(everything)


def test_before_its_phase_the_model_is_the_dense_one() -> None:
    pytest.importorskip("sklearn")
    plain, model = DIGITS.model(0), DIGITS.model(0)
    Sparsifier(model, PST_RECIPE.phases(0.1, 40), total=40)
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for step in range(10):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / 20)
            optimizer.zero_grad()
            DIGITS.loss(each, DIGITS.batch(0, step)).backward()
            optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in plain.named_parameters())


def accuracy(density: float = 0.03) -> float:
    return sum(train(Digits(), PST_RECIPE, density=density, steps=300, seed=seed)["metric"]["accuracy"] for seed in range(2)) / 2


@check("pst", LEARNED, kind="method")
def test_factors_learn_what_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen here, means of seeds 0 and 1 after 300 steps: 0.799 with learned importance, 0.610 with magnitudes of W'; at 10% there is no difference."""
    pytest.importorskip("sklearn")
    learned = accuracy()
    monkeypatch.setattr(PST, "scores", lambda self, updated: updated.abs())
    by_magnitude = accuracy()
    assert learned > by_magnitude + 0.03, (learned, by_magnitude)


@pytest.mark.parametrize("allocation", [None, ERK()], ids=repr)
def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Any, allocation: Any) -> None:
    pytest.importorskip("sklearn")

    class Stop(Exception): ...

    def stop(step: int, steps: int) -> None:
        if step == 33:
            raise Stop

    how: dict[str, Any] = {"density": 0.2, "steps": 40, "save_every": 5, "allocation": allocation}
    record = train(DIGITS, PST_RECIPE, checkpoint_dir=tmp_path / "a", **how)
    with pytest.raises(Stop):
        train(DIGITS, PST_RECIPE, checkpoint_dir=tmp_path / "b", progress=stop, **how)
    assert train(DIGITS, PST_RECIPE, checkpoint_dir=tmp_path / "b", **how) == record
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert sum(site["nnz"] for site in record["sites"]) == keep_count(8832, 0.2)


def test_kernels_and_refusals() -> None:
    conv = nn.Conv2d(3, 4, 2)
    view = PST(4, 12, kept=10, rank=1)
    view.knobs["pruned"] = 0.5
    attach_view(conv, "weight", view)
    assert int((view(conv.weight) != 0).sum()) == 48 - 19 and conv(torch.randn(1, 3, 5, 5)).shape == (1, 4, 4, 4)
    with pytest.raises(BadInput, match="factors are of one of shape"):
        view(torch.zeros(4, 11))
    with pytest.raises(BadInput, match="rank of one or more"):
        PST(2, 2, kept=1, rank=0)
    with pytest.raises(BadInput, match="counts are fixed before training"):
        train(DIGITS, PST_RECIPE, density=0.2, steps=4, allocation=Global())


def test_a_user_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    code, out, err = run(capsys, "train", "digits", "--recipe", "pst", "--density", "0.1", "--steps", "20", "--json")
    assert code == 0, err
    assert sum(site["nnz"] for site in json.loads(out)["sites"]) == keep_count(8832, 0.1)
