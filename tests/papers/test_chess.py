"""CHESS: thresholds per channel from what a unit is multiplied by, and attention sparse at its two ends only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rarefy.activations.apply import apply_gating
from rarefy.activations.gates.channel_threshold import ChannelThreshold
from rarefy.activations.gates.threshold import Threshold
from rarefy.activations.gatings.cats import CATS
from rarefy.activations.gatings.chess import CHESS
from rarefy.activations.places.block_inputs import BlockInputs
from rarefy.core.errors import BadInput
from rarefy.core.records import Gating
from tests.evidence import check
from tests.papers.blocks import chain, tokens

NAME = "at equal density the MLPs' error is below one threshold's, k and v stay dense, and equal expected squares give one threshold"
SEEN, HELD = tokens(1), tokens(2)


@torch.no_grad()
def holds(gating: Gating) -> None:
    dense, one, mine, x = chain(), chain(), chain(), HELD[0]
    apply_gating(one, replace(CATS, density=0.3), SEEN, HELD)
    record = apply_gating(mine, replace(gating, density=0.3), SEEN, HELD)
    assert all(abs(g["density"] - 0.3) < 0.02 for g in record["gates"] if ".mlp." in g["name"])
    errors = [sum(float((b.mlp(x) - d.mlp(x)).square().mean()) for b, d in zip(m.blocks, dense.blocks, strict=True)) for m in (mine, one)]
    assert errors[0] < 0.8 * errors[1], "one threshold does as well"
    ends = {g["name"] for g in record["gates"] if ".mix." in g["name"]}
    assert ends == {f"blocks.{i}.mix.{end}" for i in range(2) for end in "qo"}, "k and v are dense"
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    channel, plain = gating.parts[0][1](0.4), Threshold(0.4)
    channel.calibrate(rows, partner=torch.ones(50, 8))
    plain.calibrate(rows)
    assert torch.equal(channel(rows), plain(rows)), "with equal expected squares it is one threshold"
    rare = 1.0 * (torch.arange(50)[:, None] % torch.tensor([1, 2, 5, 10, 25, 50, 1, 2]) == 0)  # expected squares of 1 down to 1/50, and unlike roots of them the means
    channel.calibrate(rows, partner=rare)
    scaled = channel.threshold * rare.square().mean(0).sqrt()
    torch.testing.assert_close(scaled, scaled[:1].expand(8), msg="thresholds go as one over the root of the expected square")


class Means(ChannelThreshold):
    """E[u] in place of E[u^2]."""

    def calibrate(self, rows: Tensor, *, partner: Tensor | None = None) -> None:
        super().calibrate(rows, partner=None if partner is None else partner.mean(0).abs().expand_as(rows))


class Magnitudes(ChannelThreshold):
    """E[|u|] in place of the root of E[u^2]."""

    def calibrate(self, rows: Tensor, *, partner: Tensor | None = None) -> None:
        super().calibrate(rows, partner=None if partner is None else partner.abs().mean(0).expand_as(rows))


class Alone(ChannelThreshold):
    """What a unit is multiplied by is not looked at."""

    def calibrate(self, rows: Tensor, *, partner: Tensor | None = None) -> None:
        super().calibrate(rows)


UNITS, ENDS = CHESS.parts


@check("chess", NAME, kind="method")
def test_chess() -> None:
    holds(CHESS)


@check("chess", NAME, kind="twin")
@pytest.mark.parametrize(
    "parts",
    [((UNITS[0], Alone), ENDS), ((UNITS[0], Means), ENDS), ((UNITS[0], Magnitudes), ENDS), (UNITS, (BlockInputs(), Threshold))],
    ids=["one threshold", "means", "mean magnitudes", "everything in attention"],
)
def test_with_one_threshold_or_everywhere_it_fails(parts: tuple[tuple[object, type], ...]) -> None:
    with pytest.raises(AssertionError):
        holds(replace(CHESS, parts=parts))


def test_a_channel_is_dropped_where_its_partner_is_always_zero_and_bad_rows_are_refused() -> None:
    gate = ChannelThreshold(0.5)
    gate.calibrate(torch.tensor([[9.0, 1.0], [9.0, 2.0]]), partner=torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert gate(torch.tensor([[9.0, 1.5]])).tolist() == [[0.0, 1.5]]
    with pytest.raises(BadInput, match="one shape"):
        ChannelThreshold(0.5).calibrate(torch.ones(2, 3), partner=torch.ones(3, 3))
    with pytest.raises(BadInput, match=r"channels 1\.5"):
        ChannelThreshold(0.5, channels=1.5)  # type: ignore[arg-type]
