"""Parts of the report page: labels that keep clear of one another, sizes of weights read from files, colours that can be read."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rarefy.core.errors import BadFile
from rarefy.probes.figures.labels import LETTER, NARROW, TALL, WIDE, Box, place
from rarefy.probes.figures.plane import Axis, Point, plane
from rarefy.probes.magnitudes import FINE, LOWEST, RUNS, WEIGHTS, magnitudes
from rarefy.probes.style import DARK, LIGHT, STYLE

HEIGHT = 300


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_a_crowd_meet_nothing_at_any_width(seed: int) -> None:
    rng = random.Random(seed)
    points = [(rng.choice([0.2, 0.5, 0.9]) + 0.1 * rng.random(), HEIGHT * (0.55 + 0.3 * rng.random()), f"{i}") for i in range(13)]
    points[0] = (*points[0][:2], "0 chosen")
    budget = Box(1.0, -80, 0, 120, 136)
    put = place(points, HEIGHT, [budget])
    for width in range(NARROW, WIDE + 1, 10):
        boxes = [(at * width + p.dx, at * width + p.dx + LETTER * len(text), y + p.dy - TALL / 2, y + p.dy + TALL / 2) for (at, y, text), p in zip(points, put, strict=True)]
        others = [(at * width - 5, at * width + 5, y - 5, y + 5) for at, y, _ in points] + [(width - 80, width, 120, 136)]
        for i, box in enumerate(boxes):
            assert box[2] >= -8 and box[3] <= HEIGHT + 4 and box[0] >= -2 and box[1] <= width + 8
            for other in boxes[:i] + others:
                assert box[1] <= other[0] or other[1] <= box[0] or box[3] <= other[2] or other[3] <= box[2], (seed, width, i, other)


def test_labels_of_points_in_one_place_can_be_told_apart() -> None:
    one, two = place([(0.5, 100.0, "11"), (0.5, 100.0, "5")], HEIGHT)
    assert abs(one.dy - two.dy) >= TALL or one.dx + 2 * LETTER + 4 <= two.dx or two.dx + LETTER + 4 <= one.dx


def point(label: str, x: float, loss: float, interval: tuple[float, float], budget: float = 0.05, chosen: bool = False) -> Point:
    return Point(label, f"form {label}", x, loss, interval, loss <= budget, chosen)


def test_a_plane_puts_points_whiskers_and_budget_on_one_scale() -> None:
    text = plane([point("1", 100, 0.0, (0.0, 0.0)), point("2", 50, 0.04, (0.02, 0.06), chosen=True), point("3", 25, 9.0, (8.0, 10.0))], 0.05, Axis("tokens a second"))
    marks = {name: (float(x), float(y)) for x, y, name in re.findall(r"<svg x=([\d.]+)% y=([\d.]+)%>.*?<title>form (\d)", text)}
    whiskers = [tuple(map(float, found)) for found in re.findall(r"<line class=whisker x1=([\d.]+)% x2=[\d.]+% y1=([\d.]+)% y2=([\d.]+)%", text)]
    (budget,) = (float(y) for y in re.findall(r"<line class=budget x1=0 x2=100% y1=([\d.]+)%", text))
    assert marks["1"][0] / marks["2"][0] == pytest.approx(2, abs=0.01) and marks["2"][0] / marks["3"][0] == pytest.approx(2, abs=0.01)
    a_percent = (marks["1"][1] - marks["2"][1]) / 4
    assert marks["1"][1] - budget == pytest.approx(5 * a_percent, abs=0.05)
    assert whiskers[1] == pytest.approx((marks["2"][0], marks["1"][1] - 2 * a_percent, marks["1"][1] - 6 * a_percent), abs=0.05)
    assert marks["3"][1] == 0 and "drawn as triangles at its edge: 1." in text  # a loss of 900% does not flatten the others
    assert "2 chosen (form 2): 50 tokens a second, loss 4.00%" in text
    assert plane([], 0.05, Axis("x")) == ""


def test_sizes_are_those_of_the_weights_in_the_files(tmp_path: Path) -> None:
    up, down = torch.randn(40, 30), torch.randn(30, 40)
    up[up.abs() < 0.5] = 0
    experts = torch.full((3, 4, 5), 2.0)
    experts[1] = 0.25
    save_file({"l.0.up.weight": up, "l.1.up.weight": 4 * up}, tmp_path / "model-1.safetensors")
    save_file({"l.0.down.weight": down, "l.0.experts.gate": experts}, tmp_path / "model-2.safetensors")
    save_file({"l.0.up.weight": up.bool()}, tmp_path / "masks.safetensors")
    names = ["l.0.up.weight", "l.0.down.weight", "l.1.up.weight", "l.0.experts.gate[1]", "l.9.absent.weight"]
    found = {kind.kind: kind for kind in magnitudes(tmp_path, names)}
    assert list(found) == ["up", "down", "experts.gate"]
    both = torch.cat([up, 4 * up]).flatten()
    assert (found["up"].weights, found["up"].kept, found["up"].matrices) == (2400, int(torch.count_nonzero(both)), 2)
    edges = 2.0 ** (LOWEST + torch.arange(len(found["up"].counts) + 1, dtype=torch.float64) / FINE)
    sizes = both[both != 0].abs().double()
    assert sum(abs(a - b) for a, b in zip(found["up"].counts, torch.histogram(sizes, edges).hist.tolist(), strict=True)) <= 2  # at an edge, by rounding
    assert found["up"].quantile(0.5) == pytest.approx(float(sizes.median()), rel=0.05)
    assert found["experts.gate"].kept == 20 and found["experts.gate"].quantile(0.5) == pytest.approx(0.25, rel=0.1)


def test_a_large_matrix_is_read_in_evenly_spread_runs(tmp_path: Path) -> None:
    large = torch.ones(4096, 1024, dtype=torch.bfloat16)
    large[2048:] = 4.0
    save_file({"l.0.up.weight": large}, tmp_path / "model.safetensors")
    (kind,) = magnitudes(tmp_path, ["l.0.up.weight"])
    assert kind.weights == kind.kept == WEIGHTS
    assert [n for n in kind.counts if n] == [WEIGHTS // 2, WEIGHTS // 2] and RUNS % 2 == 0


def test_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(BadFile, match="it cannot be read"):
        magnitudes(tmp_path, ["a.weight"])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_marks_stand_out_from_what_is_behind_them(dark: bool) -> None:
    blocks = re.findall(r":root\{(--[^}]*)\}", STYLE)
    colours = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", blocks[dark]))
    assert colours == (DARK if dark else LIGHT)
    for ink in ("ink", "soft", "a", "b"):
        for behind in ("paper", "shade"):
            high, low = sorted((luminance(colours[ink]), luminance(colours[behind])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, behind)
