"""What a site sees: the quadratic form of its second moment is the module's own squared output, whatever the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.core.attach import attach_view
from rarefy.core.collect import Collector, collect_all, collectable, owners
from rarefy.core.errors import BadInput
from rarefy.core.records import Site
from rarefy.weights.sites import find_sites
from rarefy.weights.statistics.input import Hessian, InputNorm
from rarefy.weights.views.soft_threshold import SoftThreshold

CONVOLUTIONS = {
    "1-D": (nn.Conv1d(3, 4, 2, stride=2, padding=1), (2, 3, 9)),
    "1-D same, even kernel": (nn.Conv1d(3, 4, 4, padding="same", dilation=2), (2, 3, 9)),
    "1-D circular": (nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 9)),
    "2-D": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 9, 8)),
    "2-D same, even kernel": (nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 5, 6)),
    "2-D valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 6)),
    "2-D reflect": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 5, 6)),
    "2-D replicate, same": (nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"), (2, 3, 5, 6)),
    "2-D unbatched": (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "3-D": (nn.Conv3d(2, 4, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 2)), (2, 2, 4, 5, 3)),
    "3-D same": (nn.Conv3d(2, 4, 3, padding="same"), (2, 2, 4, 5, 3)),
}


def hessians(model: nn.Module, x: Any, sites: list[Site] | None = None) -> dict[str, torch.Tensor]:
    return collect_all(model, [x], sites or find_sites(model), [Hessian()])["hessian"]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_second_moment_is_its_squared_output(kind: str) -> None:
    conv, shape = CONVOLUTIONS[kind]
    assert collectable(conv)
    x = torch.randn(shape)
    (site,) = find_sites(conv)
    matrix = site.read(conv.weight.detach()).reshape(conv.out_channels, -1)
    outputs = conv(x).detach() - conv.bias.detach().view(-1, *[1] * (len(conv.kernel_size)))
    flat = outputs.transpose(0, -len(conv.kernel_size) - 1).reshape(conv.out_channels, -1)
    torch.testing.assert_close(matrix @ hessians(conv, x)[site.name] @ matrix.t(), flat @ flat.t(), rtol=1e-4, atol=1e-3)


REFUSED = {
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5), "2 groups has one second moment per group"),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), torch.randn(1, 4, 5), "4 groups has one second moment per group"),
    "embedding": (nn.Embedding(5, 4), torch.tensor([[1, 2]]), "an embedding has no input features"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_where_no_second_moment_is_right_the_site_is_refused_by_name(kind: str) -> None:
    module, x, message = REFUSED[kind]
    assert not collectable(module)
    with pytest.raises(BadInput, match=rf"site odd\.weight: .*{message}"):
        hessians(_named(module), x, find_sites(_named(module), ["odd"]))
    assert collect_all(_named(module), [x], find_sites(_named(module), ["odd"]), []) == {}


def test_a_transformer_layer_is_seen_but_for_the_projection_that_attention_does_not_call() -> None:
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    sites = [s for s in find_sites(layer) if collectable(layer.get_submodule(s.module))]
    assert [s.name for s in sites] == ["linear1.weight", "linear2.weight"]
    with Collector(layer, sites, [InputNorm()]) as collector, torch.no_grad():
        layer(x)
    assert collector.idle() == []
    with pytest.raises(BadInput, match=r"site self_attn\.out_proj\.weight: nn\.MultiheadAttention computes its output projection without calling it"):
        hessians(layer, x)


def _named(module: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("odd", module)
    return model


class Twice(nn.Module):
    """Two owners of one tensor, fed by different inputs; `third` is fed by what the first owner sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.second(torch.tanh(self.first(x))), self.third(x)


class Reordered(Twice):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        third = self.third(x)
        return self.second(torch.tanh(self.first(x))), third


@pytest.mark.parametrize("kind", [Twice, Reordered])
def test_a_tied_tensor_adds_the_rows_of_every_owner(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(6, 4)
    sites = find_sites(model)
    assert [s.name for s in sites] == ["first.weight", "third.weight"] and owners(model, sites[0]) == ["first", "second"]
    stacked = torch.cat([x, torch.tanh(model.first(x)).detach()])
    found = collect_all(model, [x[:2], x[2:]], sites, [Hessian(), InputNorm()])
    torch.testing.assert_close(found["hessian"]["first.weight"], stacked.t() @ stacked)
    torch.testing.assert_close(found["input_norm"]["first.weight"], stacked.norm(dim=0))
    torch.testing.assert_close(found["hessian"]["third.weight"], x.t() @ x)


def test_a_head_tied_to_an_embedding_collects_the_heads_rows() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    ids = torch.tensor([[0, 1, 1]])
    rows = model[0](ids)[0].detach()
    torch.testing.assert_close(hessians(model, ids, find_sites(model, ["1"]))["1.weight"], rows.t() @ rows)


class Across(nn.Module):
    """As transformers' Conv1D: reads the weight [I, O] across."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Narrow(nn.Linear):
    """A Linear by another name."""


def test_tied_readers_along_two_axes_are_refused_and_along_one_add_up() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Across()), torch.randn(3, 4)
    model[0].weight = model[1].weight
    with pytest.raises(BadInput, match=r"site 0\.weight, tied to 1: tied weights must be read along one axis"):
        hessians(model, x)
    model[1] = Narrow(4, 4)
    model[1].weight = model[0].weight
    stacked = torch.cat([x, model[0](x).detach()])
    torch.testing.assert_close(hessians(model, x)["0.weight"], stacked.t() @ stacked)


def test_tied_hosts_of_a_view_add_up() -> None:
    model, x = Twice(), torch.randn(6, 4)
    attach_view(model, "first.weight", SoftThreshold(-2.0))
    stacked = torch.cat([x, torch.tanh(model.first(x)).detach()])
    torch.testing.assert_close(hessians(model, x)["first.weight"], stacked.t() @ stacked)


def test_a_weight_that_is_no_plain_parameter_is_heard() -> None:
    layer, x = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), torch.randn(3, 4)
    (site,) = find_sites(layer)
    assert owners(layer, site) == [""]
    torch.testing.assert_close(hessians(layer, x)["weight"], x.t() @ x)


class Shared(nn.Module):
    """What may be done with one input tensor between two modules that get it."""

    def __init__(self, first: nn.Module, second: nn.Module, between: str = "") -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x: torch.Tensor) -> None:
        self.first(x)
        if self.between == "in place":
            x.mul_(2)
        self.second(x)
        if self.between == "again":
            self.first(x + 1)


def test_convolutions_of_different_kernels_do_not_share_rows() -> None:
    model = Shared(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1))
    found = hessians(model, torch.randn(2, 3, 5, 5))
    assert {name: tuple(h.shape) for name, h in found.items()} == {"first.weight": (3, 3), "second.weight": (27, 27)}


def test_equal_readers_of_one_tensor_share_one_state() -> None:
    found = hessians(Shared(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4))
    assert found["first.weight"] is found["second.weight"]


def test_a_tensor_changed_in_place_is_another_input() -> None:
    x = torch.randn(3, 4)
    found = hessians(Shared(nn.Linear(4, 4), nn.Linear(4, 2), "in place"), x.clone())
    torch.testing.assert_close(found["second.weight"], 4 * x.t() @ x)


def test_a_leader_that_runs_on_without_its_follower_is_refused() -> None:
    with pytest.raises(BadInput, match=r"site second\.weight: it shared its input with first\.weight, which ran 6 rows where it ran 3"):
        hessians(Shared(nn.Linear(4, 4), nn.Linear(4, 2), "again"), torch.randn(3, 4))


def test_dead_inputs_keep_exact_zeros() -> None:
    x = torch.randn(7, 6)
    x[:, [1, 4]] = 0.0
    found = collect_all(nn.Linear(6, 2), [x[:3].bfloat16().float(), x[3:]], find_sites(nn.Linear(6, 2)), [Hessian(), InputNorm()])
    hessian, norm = found["hessian"]["weight"], found["input_norm"]["weight"]
    assert (norm == 0).nonzero().flatten().tolist() == [1, 4] == (hessian.diag() == 0).nonzero().flatten().tolist()
    assert not hessian[[1, 4]].any() and not hessian[:, [1, 4]].any()


def test_padding_of_a_sequence_does_not_touch_a_convolutions_channels() -> None:
    """[B, channels, places] with as many channels as tokens is no sequence [B, T, C]."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 2, 1)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    model, x = Mixed(), torch.randn(2, 4, 3)
    rows = x.transpose(1, 2).reshape(-1, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]])
    torch.testing.assert_close(hessians(model, {"x": x, "attention_mask": mask})["conv.weight"], rows.t() @ rows)


def _plain() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(16, 8), nn.Conv3d(2, 2, 3), nn.Conv1d(4, 4, 3, groups=4))
    model[3].weight = model[2].weight
    return model


def _mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "vocab_size": 11}
    return transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**sizes))


@pytest.mark.parametrize("build", [_plain, _mixtral])
def test_sites_of_a_model_on_the_meta_device(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        meta = build()
    assert all(p.is_meta for p in meta.parameters())
    sites = find_sites(meta)
    assert len(sites) == {_plain: 4, _mixtral: 2 * (4 + 3 * 2)}[build] and sites == find_sites(build())
    assert [owners(meta, s) for s in sites] == [owners(meta, s) if s.name == "2.weight" else [s.module] for s in sites]
    assert [collectable(meta.get_submodule(s.module)) for s in sites] == [s.name != "5.weight" for s in sites]
