"""Report pages of folders that the real verbs wrote: their words for who cannot see them, and their layout in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.activations.apply import apply_gating
from rarefy.activations.gatings.teal import TEAL
from rarefy.hub.export import save_dense
from rarefy.hub.load import Loaded, load
from rarefy.hub.packed import save_packed
from rarefy.probes.report import report
from rarefy.probes.style import DARK, LIGHT
from rarefy.runtime.choose import Chooser
from rarefy.search.optimize import Data, Levers, optimize_for
from rarefy.search.targets import TARGETS
from rarefy.weights.criteria.magnitude import MAGNITUDE
from rarefy.weights.prune import prune

transformers = pytest.importorskip("transformers")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IDS = torch.randint(1, 61, (600,), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": window[None], "attention_mask": torch.ones(1, len(window), dtype=torch.long)} for window in IDS[:256].split(64)]
MANY = 1000  # matrices


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=512, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{what wrote it: the page}."""
    folder = tmp_path_factory.mktemp("report")
    model = llama()
    pruned = {"model": "tiny-" + "without-a-space-" * 6, **prune(model, BATCHES, MAGNITUDE, density=0.5)}
    save_dense(model, None, folder / "half", record=pruned)
    gated = load(str(folder / "half")).model
    save_packed(gated, None, folder / "gated", gating=apply_gating(gated, TEAL, BATCHES[:3], BATCHES[3:]))
    save_packed(model, None, folder / "int4", "int4", embeddings="int8")
    levers = Levers(bits=("int8",), recipes=(MAGNITUDE,), tolerance=0.4)
    data, chooser = Data(BATCHES, IDS[300:], 1, 64), Chooser((1,), folder / "layouts.json")
    optimize_for(Loaded(llama(), None, Path(), "tiny"), data, {folder / "fast": TARGETS["size"]}, levers, max_loss=0.05, layout=chooser, tokens=2, rounds=2)
    return {name: report(folder / name) for name in ("half", "gated", "int4", "fast")}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page about more matrices than a screen has columns."""
    folder = tmp_path_factory.mktemp("many")
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.router")
    errors = {"error_mask_only": 0.123456789, "error": 0.0987654321}
    sites = [
        {"name": f"model.layers.{i // 8}.{kinds[i % 8]}.weight", "shape": [4096, 11008], "kept": 22_544_384 + i, "density": 0.2 + i / 2000, "error_on": "inputs", **errors}
        for i in range(MANY)
    ]
    (folder / "prune.json").write_text(json.dumps({"model": "large", "recipe": "r", "density": 0.5, "sites": sites}))
    return report(folder)


class Outline(HTMLParser):
    """The elements of a page, which must be closed in order."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize("name", ["half", "gated", "int4", "fast"])
def test_a_page_can_be_heard(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    outline = Outline(text)
    assert not outline.open and re.match("<!doctype html><html lang=en><head>.*<title>[^<]+</title>", text)
    levels = [int(tag[1]) for tag, _ in outline.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and set(levels[1:]) == {2}
    assert all(len(outline.all(tag)) == 1 for tag in ("header", "nav", "main", "footer", "h1"))
    ids = [attributes["id"] for _, attributes in outline.found if "id" in attributes]
    assert len(set(ids)) == len(ids) and {a["href"] for a in outline.all("a")} == {f"#{key}" for key in ids}
    assert {section["aria-labelledby"] for section in outline.all("section")} == set(ids) - {"main"}
    assert len(outline.all("caption")) == len(outline.all("table")) > 0
    assert all(th.get("scope") in ("col", "row") for th in outline.all("th"))
    drawings = [svg for svg in outline.all("svg") if svg.get("class") == "plot"]
    assert len(drawings) >= 3 and all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in drawings)
    regions = [div for div in outline.all("div") if "scroll" in (div.get("class") or "")]
    assert regions and all(div["tabindex"] == "0" and div["role"] == "region" and div["aria-label"] for div in regions)
    assert not re.search(r"<script|<link|<img|\bsrc=|\bhref=[^#]|url\(|@import|https?:", text)


def test_what_the_verbs_wrote_is_on_their_pages(pages: dict[str, str]) -> None:
    assert "14 matrices" in pages["half"] and pages["half"].count("<details") == 2
    assert re.search(r"mlp.up_proj: median 0\.\d+; 5% to 95%", pages["half"])
    assert "Inputs that stay, matrix by matrix" in pages["gated"] and "multiply-adds that stay" in pages["gated"]
    assert "Relative error of the stored weights" in pages["int4"] and "outside the blocks" in pages["int4"]
    assert "Loss against speed" in pages["fast"] and "Loss against bytes" in pages["fast"] and re.search(r"\d chosen \(int8, embeddings int8\)", pages["fast"])
    assert "Layouts, bytes and errors" in pages["fast"], "what is stored there follows"


def test_a_thousand_matrices_take_less_than_two_megabytes(many: str) -> None:
    assert len(many.encode()) < 2_000_000
    assert many.count("h1V100z") == 3 * MANY  # a density and two errors each
    assert many.count("<th scope=row>") >= MANY and not Outline(many).open


PROBE = """<script>onload=()=>{document.body.dataset.found=JSON.stringify([...document.querySelectorAll('iframe')].map(frame=>{
const d=frame.contentDocument,root=d.documentElement,skip=d.querySelector('.skip'),scroll=d.querySelector('.scroll')
const texts=[...d.querySelectorAll('svg.plot')].map(s=>[...s.querySelectorAll('text')].map(t=>[t.getBoundingClientRect(),t.textContent]))
const meet=(a,b)=>a.left<b.right-1&&b.left<a.right-1&&a.top<b.bottom-1&&b.top<a.bottom-1
const over=texts.flatMap(list=>list.flatMap(([a,x],i)=>list.slice(0,i).filter(([b])=>meet(a,b)).map(([b,y])=>x+' | '+y)))
const out=texts.flat().filter(([r])=>r.left<0||r.right>root.clientWidth).map(([r,t])=>t)
skip.focus();const jump=skip.getBoundingClientRect().left>=0;scroll.focus()
return {side:root.scrollWidth-root.clientWidth,bars:d.querySelectorAll('rect,path').length,over,out,jump,ring:frame.contentWindow.getComputedStyle(scroll).outlineStyle,
paper:frame.contentWindow.getComputedStyle(d.body).backgroundColor,ink:frame.contentWindow.getComputedStyle(d.querySelector('svg .tick')).fill}}))}</script>"""


def laid_out(folder: Path, texts: list[str], width: int, dark: bool) -> list[dict[str, Any]]:
    """What a browser makes of pages in windows of that width."""
    frames = "".join(f"<iframe style='width:{width}px;height:900px;border:0' srcdoc='{html.escape(text)}'></iframe>" for text in texts)
    (folder / "frames.html").write_text(f"<!doctype html><meta charset=utf-8><meta name=color-scheme content='light dark'>{PROBE}<body>{frames}")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", scheme, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "frames.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (found,) = re.findall(r'<body data-found="([^"]*)"', dom)
    result: list[dict[str, Any]] = json.loads(html.unescape(found))
    return result


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: the page is not laid out")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_lays_every_page_out(pages: dict[str, str], many: str, tmp_path: Path, width: int, dark: bool) -> None:
    found = laid_out(tmp_path, [*pages.values(), many], width, dark)
    colours = DARK if dark else LIGHT
    for name, seen in zip([*pages, "many"], found, strict=True):
        assert seen["side"] == 0, f"{name} scrolls sideways at {width} px"
        assert seen["over"] == [] and seen["out"] == [], f"text of {name} at {width} px"
        assert seen["jump"] and seen["ring"] == "solid", f"the keyboard in {name}"
        assert (seen["paper"], seen["ink"]) == (rgb(colours["paper"]), rgb(colours["soft"])), name
        assert seen["bars"] > 10, name
