"""The step-flow: exact counts, nothing outside the mask moves, stop and resume bit for bit, phases, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rarefy.core.errors import Refused
from rarefy.core.records import Phase
from rarefy.weights.allocations.global_scores import Global
from rarefy.weights.criteria.magnitude import Magnitude
from rarefy.weights.penalties.l1 import L1, ProximalL1
from rarefy.weights.rewiring.rigl import RigL
from rarefy.weights.rewiring.set import SET
from rarefy.weights.schedules.constant import Constant
from rarefy.weights.schedules.cosine import Cosine
from rarefy.weights.schedules.cubic import Cubic
from rarefy.weights.sparsifier import Sparsifier
from rarefy.weights.triggers.plateau import Plateau

SITES = ("0.weight", "2.weight")
OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1),
}
PHASES = {
    "rigl": Phase(density=Constant(0.2), criterion=Magnitude(), rewiring=RigL(), fraction=Cosine(0.5, 20), every=3),
    "set": Phase(density=Constant(0.2), criterion=Magnitude(), rewiring=SET(), fraction=Constant(0.5), every=3),
    "scored": Phase(density=Cubic(0.1, begin=2, every=3, updates=4), criterion=Magnitude(), allocation=Global(), enforce=False),
    "gradual": Phase(density=Cubic(0.1, begin=2, every=3, updates=4), criterion=Magnitude(), enforce=False),
}


def build(phases, optimizer="sgd"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    sp = Sparsifier(model, phases, sites=SITES, total=20)
    opt = OPTIMIZERS[optimizer](model)
    sp.attach(opt)
    return model, sp, opt


def run(model, sp, opt, first, last, micro=1):
    for step in range(first, last):
        opt.zero_grad()
        for part in range(micro):
            g = torch.Generator().manual_seed(step * 10 + part)
            x = torch.randn(16, 16, generator=g)
            (sp.loss(F.cross_entropy(model(x), (x[:, 0] > 0).long())) / micro).backward()
        opt.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", PHASES)
@pytest.mark.parametrize("micro", [1, 2])
def test_stop_and_resume_is_bit_identical(kind, optimizer, micro):
    model, sp, opt = build(PHASES[kind], optimizer)
    run(model, sp, opt, 0, 16, micro)
    other, sp2, opt2 = build(PHASES[kind], optimizer)
    run(other, sp2, opt2, 0, 7, micro)
    saved = copy.deepcopy((other.state_dict(), sp2.state_dict(), opt2.state_dict()))
    third, sp3, opt3 = build(PHASES[kind], optimizer)
    third.load_state_dict(saved[0])
    sp3.load_state_dict(saved[1])
    opt3.load_state_dict(saved[2])
    run(third, sp3, opt3, 7, 16, micro)
    for key, value in model.state_dict().items():
        assert torch.equal(value, third.state_dict()[key]), key
    assert all(torch.equal(sp.support.masks[k], sp3.support.masks[k]) for k in SITES)
    assert sp.ledger == sp3.ledger


@pytest.mark.parametrize("kind", ["rigl", "set"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_counts_stay_and_nothing_lives_outside_the_mask(kind, optimizer):
    model, sp, opt = build(PHASES[kind], optimizer)
    first = {k: m.clone() for k, m in sp.support.masks.items()}
    counts = sp.support.counts()
    assert sum(counts.values()) == round(0.2 * 640)
    for step in range(16):
        run(model, sp, opt, step, step + 1)
        assert sp.support.counts() == counts
        for key, mask in sp.support.masks.items():
            weight = model.get_parameter(key)
            assert (weight[~mask] == 0).all()
            assert all((s[~mask] == 0).all() for s in opt.state[weight].values() if s.shape == mask.shape)
    assert any(not torch.equal(first[k], m) for k, m in sp.support.masks.items())


def test_rewiring_takes_the_place_of_the_step():
    model, sp, opt = build(PHASES["rigl"])
    run(model, sp, opt, 0, 3)
    bias, old = model[0].bias.detach().clone(), sp.support.masks["0.weight"].clone()
    run(model, sp, opt, 3, 4)
    grown = sp.support.masks["0.weight"] & ~old
    assert torch.equal(model[0].bias, bias)
    assert grown.any()
    assert (model[0].weight[grown] == 0).all()


def test_masked_values_stay_put_under_momentum_and_decay():
    model, sp, opt = build(PHASES["gradual"])
    run(model, sp, opt, 0, 15)
    raw, mask = model[0]._parameters["weight"], sp.support.masks["0.weight"]
    held = raw.detach().clone()
    run(model, sp, opt, 15, 18)
    assert torch.equal(raw[~mask], held[~mask])
    assert (raw[~mask] != 0).any()
    assert not torch.equal(raw[mask], held[mask])
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_ties_do_not_change_a_count():
    model = nn.Linear(10, 10, bias=False)
    nn.init.ones_(model.weight)
    assert Sparsifier(model, Phase(density=Constant(0.37), criterion=Magnitude())).support.counts() == {"weight": 37}


def test_phases_switch_by_steps_and_by_a_trigger_whose_state_resumes():
    phases = (Phase("a", until=3), Phase("b", until=Plateau(patience=2)), Phase("c", density=Constant(0.5), criterion=Magnitude()))
    model, sp, opt = build(phases)
    run(model, sp, opt, 0, 3)
    assert sp.phase.name == "b"
    sp.boundary("epoch", loss=1.0)
    sp.boundary("epoch", loss=1.0)
    state = copy.deepcopy(sp.state_dict())
    _, again, _ = build(phases)
    again.load_state_dict(state)
    for s in (sp, again):
        assert s.phase.name == "b"
        s.boundary("epoch", loss=2.0)
        assert s.phase.name == "c"
        assert sum(s.support.counts().values()) == 320


def test_penalties_off_are_bit_identical_and_on_are_exact():
    def final(penalties):
        model, sp, opt = build(Phase(penalties=penalties))
        run(model, sp, opt, 0, 5)
        return model

    plain = final(())
    for off in (L1(0.0), ProximalL1(0.0)):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), final((off,)).parameters(), strict=True))
    assert (final((ProximalL1(0.2),))[0].weight == 0).any()
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    L1(0.5).loss({"w": w}, None).backward()
    assert w.grad.tolist() == [0.5, -0.5]


def test_refusals():
    model, sp, opt = build(Phase())
    with pytest.raises(Refused, match="second optimizer"):
        sp.attach(opt)
    with pytest.raises(Refused, match="own every site"):
        Sparsifier(model, Phase()).attach(torch.optim.SGD(model[0].parameters(), 0.1))
    opt.grad_scale = torch.tensor(2.0)
    with pytest.raises(Refused, match="GradScaler"):
        opt.step()
