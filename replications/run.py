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
OTHER = ("__init__", "run")


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
    if module.SLUG is not None:
        _record(name, module, result)
    return result


def _record(name: str, module: ModuleType, result: dict[str, Any]) -> None:
    """The verdict beside those of the tests, so that the catalogue shows it."""
    evidence = json.loads(catalogue.EVIDENCE.read_text())
    others = [c for c in evidence.get(module.SLUG, []) if (c["name"], c["kind"]) != (module.NAME, "replication")]
    listed = sorted(str(s.relative_to(ROOT)) for s in sources(name, module))
    entry = {"name": module.NAME, "kind": "replication", "verdict": "pass" if result["verdict"] == "pass" else "fail", "sources": listed, "digest": result["digest"]}
    evidence[module.SLUG] = sorted([*others, entry], key=lambda c: (c["name"], c["kind"]))
    catalogue.EVIDENCE.write_text(json.dumps(evidence, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--all", action="store_true", help="fresh ones too")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 where a result is stale")
    options = parser.parse_args()
    found = replications()
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
