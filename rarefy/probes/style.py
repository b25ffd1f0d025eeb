"""How a page looks: colours for light and dark, a phone's width, a keyboard's focus, paper. CSS as text, since a page asks for nothing from outside."""

from __future__ import annotations

LIGHT = {"ink": "#1c1f24", "paper": "#fdfdfc", "soft": "#5c626b", "line": "#d5d9de", "a": "#2463a6", "b": "#ad4a17", "shade": "#f1f3f5"}
DARK = {"ink": "#e7e9ec", "paper": "#15181c", "soft": "#a3aab4", "line": "#3a414a", "a": "#6bacf0", "b": "#ee9f60", "shade": "#1f2429"}


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"


STYLE = (
    f"""
{_variables(LIGHT)}
@media screen and (prefers-color-scheme:dark){{{_variables(DARK)}}}
"""
    + """
:root{color-scheme:light dark}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:70rem;margin:0 auto;padding:1rem 1.25rem 3rem}
h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere;margin:.5rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}p{max-width:46rem;overflow-wrap:anywhere}
a{color:var(--a)}.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;padding:.5rem;background:var(--paper);z-index:9}
:focus-visible{outline:3px solid var(--a);outline-offset:2px}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;padding:0;margin:1rem 0;list-style:none;font-size:.9rem}nav a{display:inline-block;padding:.15rem 0}
.soft,caption,figcaption{color:var(--soft)}.warn{border-left:.25rem solid var(--b);padding-left:.75rem}
figure{margin:.75rem 0 1.5rem}figcaption{font-size:.85rem;max-width:46rem}figcaption span{display:inline-block;margin-right:.9rem}
svg.plot{display:block;width:calc(100% - 4rem);margin:1.6rem 1rem 2.6rem 3rem;overflow:visible;font-size:12px}svg.plot svg{overflow:visible}
svg text{fill:var(--ink)}svg .tick{fill:var(--soft)}svg .end{text-anchor:end}svg .middle{text-anchor:middle}svg .strong{font-weight:700}
svg .a{fill:var(--a)}svg .b{fill:var(--b)}svg .hollow{fill:var(--paper);stroke:var(--a);stroke-width:2}svg .rule{stroke:var(--line)}svg .lead{stroke:var(--soft)}
svg .budget{stroke:var(--b);stroke-dasharray:5 4}svg .whisker{stroke:var(--soft);stroke-width:1.5}svg .edge{stroke:var(--a);stroke-width:1.5;opacity:.6}
svg .line{fill:none;stroke:var(--a);stroke-width:2;vector-effect:non-scaling-stroke}
i.a,i.b,i.hollow{print-color-adjust:exact;display:inline-block;width:.7em;height:.7em;margin-right:.35em;background:var(--a)}i.b{background:var(--b)}
i.hollow,i.dot{border-radius:50%}i.hollow{background:none;border:2px solid var(--a)}i.diamond{transform:rotate(45deg)}
.scroll{overflow:auto;max-height:80vh;margin:.5rem 0}table{border-collapse:separate;border-spacing:0;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.35rem}caption span{position:sticky;left:0;display:inline-block;max-width:calc(100vw - 3rem)}th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
thead th{position:sticky;top:0;background:var(--shade);white-space:normal;vertical-align:bottom;z-index:1}.t{text-align:left}
tbody th,tfoot th,thead th:first-child{position:sticky;left:0;background:var(--paper);text-align:left;font-weight:400;white-space:normal;overflow-wrap:anywhere;min-width:min(12rem,39vw);max-width:min(22rem,42vw)}
thead th:first-child{background:var(--shade);font-weight:700;z-index:2}tfoot th,tfoot td{font-weight:700;border-bottom:0}.words td{white-space:normal;overflow-wrap:anywhere;min-width:9rem;text-align:left}
details{border-bottom:1px solid var(--line)}summary{padding:.45rem .25rem;cursor:pointer;overflow-wrap:anywhere}details .scroll{margin:0 0 1rem}
@media print{:root{color-scheme:light}body{max-width:none;padding:0;font-size:11pt}nav,.skip{display:none}.scroll{overflow:visible;max-height:none}thead th,tbody th,tfoot th{position:static}
figure,tr{break-inside:avoid}h2{break-after:avoid}details::details-content{content-visibility:visible;display:block;block-size:auto}}
"""
)
