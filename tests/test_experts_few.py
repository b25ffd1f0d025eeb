"""Few rows without gradients: the back end that reads each chosen expert once, and transformers' models on it against their eager experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad as fw
from torch.utils.flop_counter import FlopCounterMode

from rarefy.core.errors import BadInput
from rarefy.core.records import Routing, Rows
from rarefy.experts.banks.ffn import FFN
from rarefy.experts.banks.glu import GLU
from rarefy.experts.banks.ragged import Ragged
from rarefy.experts.banks.relu import ReLU
from rarefy.experts.banks.scaled import Scaled
from rarefy.experts.dispatch import batched, dispatch, gather, loop
from rarefy.kernels.experts import FEW, reference
from tests.test_experts_grouped import OnlySplit, Shifted
from tests.test_kernels import NATIVE

SMALL = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 13, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": {"moe_intermediate_size": 11, "shared_expert_intermediate_size": 7, "num_experts": 6, "num_experts_per_tok": 3, "decoder_sparse_step": 1},
    "Qwen3Moe": {"moe_intermediate_size": 9, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 12},
    "Olmoe": {"intermediate_size": 17, "num_experts": 8, "num_experts_per_tok": 4},
    "GptOss": {"intermediate_size": 12, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, biased, with a gate of its own
}


def family(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(getattr(transformers, f"{name}Config")(**SMALL, **FAMILIES[name]), experts_implementation="eager")
    for parameter in model.parameters():  # transformers' own initialisation is so small that experts hardly show
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("tokens", [1, 2, 16, 60])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_models_equal_their_eager_experts(monkeypatch: pytest.MonkeyPatch, name: str, tokens: int) -> None:
    from rarefy.hub.experts import use_experts
    from rarefy.kernels.library import native

    eager = family(name)
    ours = use_experts(copy.deepcopy(eager))
    ids = torch.arange(tokens)[None] % 32
    if native() is not None and name != "GptOss":
        monkeypatch.setattr(reference, "linear", lambda *args: pytest.fail("it was not served natively"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_training_step_is_that_of_eager() -> None:
    from rarefy.hub.experts import use_experts

    eager = family("Olmoe")
    ours, ids = use_experts(copy.deepcopy(eager)), torch.arange(9)[None]
    for model in (eager, ours):
        model(ids).logits.square().sum().backward()
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_fall_through(dtype: torch.dtype) -> None:
    bank, x = GLU(3, 8, 4).to(dtype), torch.randn(5, 8, dtype=dtype)
    routing = Routing(torch.tensor([0, 1, 3, 2, 2]), torch.ones(5, dtype=dtype), 5, 3, 1)
    with torch.no_grad():
        y = dispatch(x, routing, bank)
    assert y.dtype == dtype and torch.equal(y, dispatch(x, routing, bank, backend=loop))


BANKS = [GLU(4, 10, 7), ReLU(4, 10, 7), FFN(4, 10, 7), Scaled(GLU(4, 10, 7), 10), Scaled(Ragged([2, 3, 4, 5], 10), 10), Shifted(4, 10, 7)]


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: type(bank).__name__)
@pytest.mark.parametrize("expert", [[], [4, 4], [2, 2, 2], [0, 4, 3, 1, 1, 4]], ids=["no rows", "nobody", "one", "mixed"])
def test_every_bank_without_gradients_equals_the_loop(bank: Any, expert: list[int]) -> None:
    routing = Routing(torch.tensor(expert, dtype=torch.long), torch.rand(len(expert)), len(expert), 4, 1)
    x = torch.randn(len(expert), 10)
    with torch.no_grad():
        torch.testing.assert_close(dispatch(x, routing, bank), dispatch(x, routing, bank, backend=loop), atol=1e-5, rtol=1e-5)


def test_gradients_through_the_back_end_are_those_of_the_loop() -> None:
    bank, routing = GLU(4, 10, 7), Routing(torch.tensor([3, 1, 1, 4, 0, 3]), torch.rand(6), 3, 4, 2)
    found = []
    for backend in (batched, loop):
        x = torch.linspace(-1, 1, 30).view(3, 10).requires_grad_()
        found.append(torch.autograd.grad(dispatch(x, routing, bank, backend=backend).square().sum(), [x, *bank.parameters()]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Seen(GLU):
    """Counts how it was run."""

    batches = 0

    def grouped(self, rows: Rows) -> Tensor:
        self.batches += 1
        return super().grouped(rows)


@NATIVE
def test_it_serves_few_rows_that_nobody_differentiates_or_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, most = Seen(2, 8, 4), 2 * FEW

    def served(rows: int) -> bool:
        before = bank.batches
        dispatch(torch.ones(rows, 8), Routing(torch.arange(rows) % 2, torch.ones(rows), rows, 2, 1), bank)
        return bank.batches > before

    assert not served(4), "weights may want gradients"
    with torch.no_grad():
        assert served(4) and served(most) and not served(most + 1)
        with FlopCounterMode(display=False) as counted:
            assert not served(4)
        assert counted.get_total_flops() == 2 * 4 * 3 * 8 * 4
        with torch.autocast("cpu", dtype=torch.bfloat16):
            served(4)
        monkeypatch.setenv("RAREFY_NATIVE", "off")
        assert not served(4)


def test_derivatives_carried_forward_and_functional_ones_are_those_of_the_loop() -> None:
    bank = GLU(3, 8, 4).requires_grad_(False)
    routing, x, t = Routing(torch.tensor([0, 1, 2, 1]), torch.rand(4), 4, 3, 1), torch.randn(4, 8), torch.randn(4, 8)

    def layer(x: Tensor, backend: Any = None) -> Tensor:
        return dispatch(x, routing, bank, backend=backend)

    _, want = torch.func.jvp(lambda x: layer(x, gather), (x,), (t,))
    for no_grad in (False, True):
        with torch.set_grad_enabled(not no_grad):
            torch.testing.assert_close(torch.func.jvp(layer, (x,), (t,))[1], want)
            with fw.dual_level():
                torch.testing.assert_close(fw.unpack_dual(layer(fw.make_dual(x, t))).tangent, want)
    torch.testing.assert_close(torch.func.grad(lambda x: (layer(x) * t).sum())(x), torch.func.grad(lambda x: (layer(x, gather) * t).sum())(x))


def test_a_bank_without_the_op_is_refused_by_name_and_served_by_the_loop() -> None:
    routing, x = Routing(torch.zeros(2, dtype=torch.long), torch.ones(2), 2, 1, 1), torch.ones(2, 2)
    with pytest.raises(BadInput, match="OnlySplit in one op"):
        dispatch(x, routing, OnlySplit(), backend=batched)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(dispatch(x, routing, OnlySplit()), x)  # type: ignore[arg-type]


def test_autocast_computes_as_by_the_loop() -> None:
    bank, x = GLU(3, 8, 4), torch.randn(6, 8)
    routing = Routing(torch.tensor([0, 2, 2, 1, 0, 3]), torch.ones(6), 6, 3, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(dispatch(x, routing, bank), dispatch(x, routing, bank, backend=gather), atol=2e-2, rtol=2e-2)
        assert torch.equal(dispatch(x, routing, bank), dispatch(x, routing, bank, backend=loop))
