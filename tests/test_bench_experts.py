"""`rarefy bench --op experts`: routed experts against transformers' own, on the same weights and routings, each right before it is timed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.cli.main import main
from rarefy.core.errors import BadInput, MissingExtra
from rarefy.probes import bench, experts_bench
from rarefy.probes.experts_bench import EXPERTS_PEERS, Routed, Sizes, bench_experts

pytest.importorskip("transformers")
SIZES = Sizes(6, 2, 8, 4)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHORTEST", 0.0)
    monkeypatch.setattr(experts_bench, "cache_bytes", lambda: 4000)


def test_every_peer_at_every_count_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--op", "experts", "--experts", "6:2:8:4,4:4:16:8", "--batch", "1,5", "--rounds", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["experts"], row["k"], row["width"], row["inner"], row["tokens"], row["peer"]) for row in rows] == [
        (*sizes, tokens, peer) for sizes in ((6, 2, 8, 4), (4, 4, 16, 8)) for tokens in (1, 5) for peer in ("transformers-eager", "transformers-grouped_mm")
    ]
    for row in rows:
        assert row["op"] == "experts" and row["dtype"] == "float32" and row["threads"] == torch.get_num_threads()
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and 0 <= row["max_abs_err"] < 1e-5
    one = rows[0]
    assert one["gb_per_s"] * one["ours_us"] * 1e3 == pytest.approx(2 * 3 * 8 * 4 * 4), "a row of two experts reads two experts' weights"


def test_the_exact_result_is_the_sum_over_chosen_experts() -> None:
    bank, x, routed = SIZES.bank(0), torch.randn(5, 8), Routed.drawn(SIZES, 5, 1)
    for t in range(5):
        want = torch.zeros(8)
        for e, w in zip(routed.expert[t].tolist(), routed.weight[t].tolist(), strict=True):
            up = bank.gate_up_proj[e]
            want += w * (bank.down_proj[e] @ (F.silu(up[:4] @ x[t]) * (up[4:] @ x[t])))
        torch.testing.assert_close(routed.exact(x, bank)[t].float(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routed.weight.sum(1), torch.ones(5))
    assert all(len(set(row)) == 2 for row in routed.expert.tolist())


@pytest.mark.parametrize("broken", ["ours", "transformers-eager"])
def test_no_speed_behind_a_wrong_result(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = experts_bench.dispatch if broken == "ours" else EXPERTS_PEERS[broken]
    if broken == "ours":
        monkeypatch.setattr(experts_bench, "dispatch", lambda *args: right(*args) * 1.0002)
    else:
        monkeypatch.setitem(EXPERTS_PEERS, broken, lambda bank, routed: lambda x: right(bank, routed)(x) * 1.0002)  # type: ignore[operator, return-value]
    for row in bench_experts([SIZES], [3], rounds=5):
        wrong = broken in ("ours", row["peer"])
        assert (row["ratio"] is None) == (row["ours_us"] is None) == wrong and ("result is wrong" in (row["warning"] or "")) == wrong


def test_calls_go_through_other_experts_and_banks_until_the_cache_has_passed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, tuple[int, ...]]] = []

    def peer(bank: Any, routed: Routed) -> Any:
        seen.append((bank, tuple(routed.expert.flatten().tolist())))
        return lambda x: routed.exact(x, bank).float()

    monkeypatch.setattr(experts_bench, "cache_bytes", lambda: 6 * SIZES.expert_bytes)
    monkeypatch.setitem(EXPERTS_PEERS, "transformers-eager", peer)
    (row,) = bench_experts([SIZES], [1], ["transformers-eager"], rounds=5)
    assert len({bank for bank, _ in seen}) == 2 and len(seen) == 6, "two banks of six experts, six routings of two"
    assert len({expert for _, expert in seen}) > 1 and "cache" not in (row["warning"] or "")
    (row,) = bench_experts([SIZES], [1], ["transformers-eager"], rounds=5, memory=1)
    assert len({bank for bank, _ in seen}) == 3 and "cache" not in (row["warning"] or "")
    monkeypatch.setattr(experts_bench, "cache_bytes", lambda: 7 * SIZES.expert_bytes)
    (row,) = bench_experts([SIZES], [1], ["transformers-eager"], rounds=5, memory=1)
    assert "may lie in cache" in row["warning"]


def test_gradients_are_off_and_weights_are_the_banks() -> None:
    bank, routed = SIZES.bank(0), Routed.drawn(SIZES, 3, 0)
    x: Tensor = torch.randn(3, 8, requires_grad=True)
    before = [make(bank, routed)(x) for make in EXPERTS_PEERS.values()]
    with torch.no_grad():
        bank.down_proj.mul_(2)
    for one, other in zip(before, [make(bank, routed)(x) for make in EXPERTS_PEERS.values()], strict=True):
        torch.testing.assert_close(other, 2 * one)
    assert not any(p.requires_grad for p in bank.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experts", "4:8:8:8"], "between one and all"),
        (["--experts", "4:2:8"], "EXPERTS:K:WIDTH:INNER"),
        (["--experts", "4:2:8:x"], "EXPERTS:K:WIDTH:INNER"),
        (["--experts", "4:2:8:4", "--peer", "vllm"], "known are transformers-eager"),
        (["--experts", "4:2:8:4", "--batch", "0"], "above 0"),
    ],
)
def test_what_it_cannot_time_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["bench", "--op", "experts", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_no_tokens_and_few_rounds_are_refused() -> None:
    with pytest.raises(BadInput, match="above 0"):
        bench_experts([SIZES], [0])
    with pytest.raises(BadInput, match="at least 5"):
        bench_experts([SIZES], [1], rounds=2)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="hub"):
        bench_experts([SIZES], [1], rounds=5)
