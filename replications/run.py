"""Run the replications whose sources changed since their committed result; `--all` runs every one, `--check` only says which are stale."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rarefy import catalogue

HERE = Path(__file__).parent
ROOT = HERE.parent
OTHER = ("__init__", "run", "page")


def replications() -> dict[str, ModuleType]:
    return {p.stem: importlib.import_module(f"replications.{p.stem}") for p in sorted(HERE.glob("*.py")) if p.stem not in OTHER}


def sources(name: str, module: ModuleType) -> list[Path]:
    return [HERE / f"{name}.py", *(ROOT / s for s in module.SOURCES)]


def stale(name: str, module: ModuleType) -> bool:
    result = HERE / "results" / f"{name}.json"
    return not result.is_file() or json.loads(result.read_text())["digest"] != catalogue.digest(sources(name, module))


def perform(name: str, module: ModuleType) -> dict[str, Any]:
    began = time.monotonic()
    figures, verdict = module.run()
    result = {
        "slug": module.SLUG,
        "name": module.NAME,
        "command": f"python -m replications.run {name}",
        "verdict": "pass" if verdict else "did not reproduce",
        "figures": figures,
        "wall_s": round(time.monotonic() - began, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "digest": catalogue.digest(sources(name, module)),
    }
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    record(name, module, result)
    return result


def record(name: str, module: ModuleType, result: dict[str, Any]) -> None:
    """The verdict beside those of the tests, so that the catalogue shows it: at every paper that it speaks of."""
    evidence = json.loads(catalogue.EVIDENCE.read_text())
    listed = sorted(str(s.relative_to(ROOT)) for s in sources(name, module))
    entry = {"name": module.NAME, "kind": "replication", "verdict": "pass" if result["verdict"] == "pass" else "fail", "sources": listed, "digest": result["digest"]}
    for slug in slugs(module):
        others = [c for c in evidence.get(slug, []) if (c["name"], c["kind"]) != (module.NAME, "replication")]
        evidence[slug] = sorted([*others, entry], key=lambda c: (c["name"], c["kind"]))
    catalogue.EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n")


def slugs(module: ModuleType) -> tuple[str, ...]:
    """The rows of the catalogue that a replication speaks of: SLUG is one, several, or None."""
    return () if module.SLUG is None else (module.SLUG,) if isinstance(module.SLUG, str) else tuple(module.SLUG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--all", action="store_true", help="fresh ones too")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 where a result is stale")
    parser.add_argument("--record", action="store_true", help="run nothing; put the verdicts of the fresh committed results beside the evidence")
    options = parser.parse_args()
    found = replications()
    if options.record:
        for name, module in found.items():
            if not stale(name, module):
                record(name, module, json.loads((HERE / "results" / f"{name}.json").read_text()))
        return
    due = {n: m for n, m in found.items() if n in options.names or (not options.names and (options.all or stale(n, m)))}
    if options.check:
        print(f"stale: {', '.join(due) or 'none'} of {len(found)}")
        sys.exit(bool(due))
    for name, module in due.items():
        print(f"{name}: {module.NAME}", flush=True)
        result = perform(name, module)
        print(f"  {result['verdict']} in {result['wall_s']} s: {json.dumps(result['figures'])}", flush=True)
    print(f"{len(due)} of {len(found)} replications run; the others are fresh")


if __name__ == "__main__":
    main()
