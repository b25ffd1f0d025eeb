"""`rarefy bench`: what is timed is right, out of cache where memory allows, and nothing is said about what is not."""

from __future__ import annotations

import json

import pytest
import torch

from rarefy.cli.main import main
from rarefy.core.errors import BadInput
from rarefy.probes import bench as probe
from rarefy.probes.bench import PEERS, Contestant, Subject, Work, bench
from rarefy.probes.roofline import roofline
from rarefy.probes.skip_bench import bench_skip

SMALL = {"memory": 200_000, "rounds": 5}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(probe, "SHORTEST", 0.0)


def test_every_layout_against_every_peer():
    subjects = [Subject("bitmask"), Subject("csr"), Subject("block", "block:4x1"), Subject("n_m", "2:4"), Subject("int4")]
    record = bench(subjects, [(12, 64)], [0.5], [1, 9], list(PEERS), **SMALL)
    assert len(record) == 5 * 2 * 4
    for row in record:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["ours_us"] > 0
        assert 0 <= row["max_abs_err"] < (1e-3 if row["layout"] != "int4" else 1) and 0 < row["roofline"] < 2 and row["threads"] == torch.get_num_threads()
        assert row["density"] == pytest.approx(0.5, abs=0.01)
        assert "may lie in cache" in row["warning"]


def test_ratio_is_the_peer_over_the_layout():
    figures = probe.figures([1e-6, 2e-6, 4e-6], [3e-6, 3e-6, 3e-6], Work(8000, 0, 0))
    assert figures["ratio"] == pytest.approx(1.5) and [figures["ratio_min"], figures["ratio_max"]] == pytest.approx([0.75, 3.0])
    assert figures["ours_us"] == pytest.approx(2.0) and figures["gb_per_s"] == pytest.approx(4.0)
    assert figures["roofline"] == pytest.approx(4e9 / roofline().bytes_per_s)


@pytest.mark.parametrize("broken", ["peer", "layout"])
def test_no_speed_behind_a_wrong_result(monkeypatch, capsys, broken):
    if broken == "peer":
        monkeypatch.setitem(PEERS, "torch-dense", lambda weight: lambda x: x @ weight.t() * 1.001)
    else:
        matrix = type(probe.LAYOUTS["csr"].matrix(probe.LAYOUTS["csr"].pack(torch.eye(4)), (4, 4), torch.float32))
        right = matrix.linear
        monkeypatch.setattr(matrix, "linear", lambda self, x, bias=None: right(self, x, bias) * 1.001)
    arguments = ["bench", "--layout", "csr", "--shape", "8x64", "--memory", "100000", "--rounds", "5", "--json"]
    assert main(arguments) == 1
    for row in json.loads(capsys.readouterr().out):
        wrong = row["peer"] == "torch-dense" or broken == "layout"
        assert (row["ratio"] is None) == wrong and (row["ours_us"] is None) == wrong
        assert ("result is wrong" in row["warning"]) == wrong


def test_calls_rotate_over_the_copies():
    used = []
    Contestant([lambda x, i=i: used.append(i) for i in range(3)], 1).time(torch.ones(1), 7)
    assert used == [0, 1, 2, 0, 1, 2, 0]


def test_copies_pass_through_the_cache_twice_within_the_memory(monkeypatch):
    monkeypatch.setattr(probe, "cache_bytes", lambda: 1000)
    assert len(probe.contestant(lambda: torch.ones, 100, 10**9).copies) == 20
    assert len(probe.contestant(lambda: torch.ones, 100, 500).copies) == 5
    assert len(probe.contestant(lambda: torch.ones, 100, 50).copies) == 1


def test_the_cache_is_the_largest_one(tmp_path):
    for number, size in enumerate(("48K", "2048K", "30M")):
        (tmp_path / f"index{number}").mkdir()
        (tmp_path / f"index{number}" / "size").write_text(size + "\n")
    assert probe.cache_bytes(tmp_path) == 30 * 2**20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layout", "csd"], "known are"),
        (["--layout", "csr@4:x"], "known forms"),
        (["--shape", "8by8"], "OUTxIN"),
        (["--density", "half"], "no list of numbers"),
        (["--density", "1.5"], "a density is in"),
        (["--batch", "0"], "above 0"),
        (["--batch", "1.5"], "whole numbers"),
        (["--peer", "cublas"], "known are torch"),
        (["--op", "conv"], "known are linear, skip"),
        (["--op", "skip", "--layout", "n_m@2:4"], "the weights are dense"),
        (["--op", "skip", "--layout", "columns", "--peer", "cublas"], "known are torch"),
        (["--max-load", "-1"], "refuse above -1"),
    ],
)
def test_what_it_cannot_time_is_one_sentence(capsys, arguments, words):
    assert main(["bench", "--shape", "8x8", *arguments]) in (2, 5)
    assert words in capsys.readouterr().err


def test_fewer_rounds_are_refused():
    with pytest.raises(BadInput, match="at least 5"):
        bench([Subject("csr")], [(2, 2)], [0.5], [1], rounds=3)


def test_a_table_for_people(capsys):
    assert main(["bench", "--layout", "csr", "--shape", "8x64", "--memory", "100000", "--rounds", "5"]) == 0
    out = capsys.readouterr().out
    assert "own-dense" in out and "8x64" in out


def test_zeros_of_the_input_are_timed_against_products_that_read_everything(capsys):
    arguments = ["--op", "skip", "--layout", "columns", "--shape", "24x96", "--density", "0.25", "--batch", "1,3", "--peer", "own-dense,int8", "--memory", "100000"]
    assert main(["bench", *arguments, "--rounds", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["peer"]) for row in rows] == [(1, "own-dense"), (1, "int8"), (3, "own-dense"), (3, "int8")]
    for row in rows:
        assert row["op"] == "skip" and row["density"] == 0.25 and row["ratio"] > 0
    one = rows[0]
    assert one["gb_per_s"] * one["ours_us"] * 1e3 == pytest.approx(24 * 96 * 4 * 0.25)


def test_no_speed_behind_a_wrong_skip(monkeypatch):
    from rarefy.kernels.columns import ColumnsMatrix

    right = ColumnsMatrix.linear
    monkeypatch.setattr(ColumnsMatrix, "linear", lambda self, x, bias=None: right(self, x, bias) + 0.01)
    record = bench_skip([Subject("columns")], [(8, 64)], [0.5], [1], ["torch-dense"], rounds=5, memory=10_000)
    assert record[0]["ratio"] is None and "result is wrong" in record[0]["warning"]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_K"])
def test_llama_cpps_kernels_compute_what_their_types_round_to(kind):
    pytest.importorskip("llama_cpp", reason="llama.cpp is a peer: pip install llama-cpp-python to compare")
    from rarefy.probes.ggml import GgmlMatrix, quantised

    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    codes = quantised(weight, kind)
    matrix = GgmlMatrix(codes)
    assert (codes.dense() - weight).norm() < 0.1 * weight.norm()
    for batch in (1, 5, 1):
        x = torch.randn(batch, 256)
        want = x @ codes.dense().t()
        assert (matrix.linear(x) - want).norm() < 0.02 * want.norm()
    with pytest.raises(BadInput, match="blocks of 32 columns"):
        quantised(torch.ones(2, 48), kind)


def test_without_the_package_the_remedy_is_named(monkeypatch, capsys):
    from rarefy.probes import ggml

    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    ggml.library.cache_clear()
    assert main(["bench", "--layout", "csr", "--shape", "8x64", "--peer", "llama.cpp-q4_0"]) == 2
    assert "pip install llama-cpp-python" in capsys.readouterr().err
    ggml.library.cache_clear()
