"""One self-contained page about a pruned folder: headline, density and error of every matrix, what was run on what.

No script and no outside resource: the bars are inline SVG, the colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.core.errors import BadFile, BadInput
from rarefy.core.files import write_atomic

STYLE = """
:root{--ink:#1c1f24;--paper:#fdfdfc;--soft:#6a7079;--line:#dcdfe3;--a:#2b6cb0;--b:#c05621}
@media (prefers-color-scheme:dark){:root{--ink:#e7e9ec;--paper:#15181c;--soft:#9aa1ab;--line:#343a42;--a:#63a4e8;--b:#e59a5f}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2.2rem}p.soft,caption,figcaption{color:var(--soft)}
figure{margin:1rem 0}svg{width:100%;height:10rem}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.85rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
svg .a{fill:var(--a)}svg .b{fill:var(--b)}.rule{stroke:var(--line)}
"""


def report(folder: str | Path) -> str:
    """The page for a folder that `prune` or `optimize` wrote, as HTML.

    Raises:
        BadInput: no prune.json there. BadFile: it is not what rarefy wrote.
    """
    path = Path(folder) / "prune.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no prune.json", "a report is about a folder that prune or optimize wrote", "name that folder, also where it was packed into another")
    try:
        record = json.loads(path.read_text())
        return page(record, _bytes(Path(folder)))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadFile(str(path), f"it is not a record of prune ({type(error).__name__}: {error})", "run rarefy prune again") from error


def write_report(folder: str | Path) -> Path:
    """Write report.html into the folder, whole or not at all."""
    out = Path(folder) / "report.html"
    write_atomic(out, report(folder).encode())
    return out


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def page(record: Mapping[str, Any], size: int) -> str:
    """The page of one record; `size` is the bytes of the weights on disk."""
    sites = record["sites"]
    title = f"{record['model']}: {record['recipe']} at density {record['density']:.4g}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>{_e(title)}</title><style>{STYLE}</style>",
        f"<h1>{_e(title)}</h1>",
        _headline(record, size),
        _tries(record.get("optimize")),
        _chart("Density kept, matrix by matrix", sites, (("density", "a", "density"),)),
        _chart("Relative output error, matrix by matrix", sites, (("error_mask_only", "b", "mask only"), ("error", "a", "with the solver's update"))),
        _table("Every matrix", ("matrix", "shape", "kept", "density", "error, mask only", "error"), [_cells(s) for s in sites]),
        _table(
            "What was run",
            ("setting", "value"),
            [(k, json.dumps(record[k])) for k in ("recipe", "pattern", "allocation", "density_requested", "mode", "seed", "calibration", "threads", "versions") if k in record],
        ),
        "<p class=soft>Errors and densities are measured. The weights are dense with zeros: this page makes no claim about speed.</p></html>",
    ]
    return "\n".join(p for p in parts if p)


def _headline(record: Mapping[str, Any], size: int) -> str:
    kept = sum(s["kept"] for s in record["sites"])
    if not record["sites"]:
        return "<p>The dense model was kept: no density in reach stays within the budget of loss.</p>"
    loss = record.get("optimize")
    words = f"{kept:,} weights kept in {len(record['sites'])} matrices ({record['density']:.2%}); {size / 1e6:.1f} MB on disk, dense with zeros."
    if loss:
        words += f" Held-out perplexity rose by {loss['loss']:.2%} (95%: {loss['interval'][0]:.2%} to {loss['interval'][1]:.2%}); the budget was {loss['max_loss']:.1%}."
    return f"<p>{_e(words)}</p>"


def _tries(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    rows = [
        (f"{t['recipe']}, {t['allocation']}", f"{t['density']:.4g}", f"{t['loss']:.2%}", f"{t['interval'][0]:.2%} to {t['interval'][1]:.2%}", "yes" if t["ok"] else "no")
        for t in found["tried"]
    ]
    return _table("What was tried", ("recipe", "density", "loss", "95% interval", "within budget"), rows)


def _chart(title: str, sites: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str, str]]) -> str:
    if not sites:
        return ""
    width, height = 900, 160
    top = max(max(float(s[key]) for s in sites) for key, _, _ in series) or 1.0
    step = width / len(sites)
    bars = [
        f"<rect class={css} x={i * step + j * step / len(series):.2f} y={height * (1 - s[key] / top):.2f} width={max(step / len(series) - 0.4, 0.6):.2f} height={height * s[key] / top:.2f}>"
        f"<title>{_e(s['name'])}: {s[key]:.4g}</title></rect>"
        for i, s in enumerate(sites)
        for j, (key, css, _) in enumerate(series)
    ]
    axis = f"<line class=rule x1=0 x2={width} y1={height} y2={height} />"
    legend = "; ".join(f"<span style='color:var(--{css})'>■</span> {_e(label)}" for _, css, label in series)
    summary = "; ".join(f"{label} from {min(s[k] for s in sites):.3g} to {max(s[k] for s in sites):.3g}" for k, _, label in series)
    return f"<h2>{_e(title)}</h2><figure><svg viewBox='0 0 {width} {height}' preserveAspectRatio=none role=img aria-label='{_e(summary)}'>{axis}{''.join(bars)}</svg><figcaption>{legend}; from 0 to {top:.3g}</figcaption></figure>"


def _cells(site: Mapping[str, Any]) -> tuple[str, ...]:
    shape = " × ".join(map(str, site["shape"]))
    return (site["name"], shape, f"{site['kept']:,}", f"{site['density']:.4f}", f"{site['error_mask_only']:.4f}", f"{site['error']:.4f}")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f"<th scope=col>{_e(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{_e(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<h2>{_e(title)}</h2><div class=scroll tabindex=0><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>" if rows else ""


def _e(text: object) -> str:
    return html.escape(str(text), quote=True)
