"""The command line as a process: interrupted while it starts, read by something that stops reading."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

SCRIPT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]["rarefy"]
INTERRUPTED = """
import importlib, os, signal, sys
from importlib.abc import MetaPathFinder

class CtrlC(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == at:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, {handler})
at, (module, _, name) = sys.argv[1], sys.argv[2].partition(":")
sys.meta_path.insert(0, CtrlC())
sys.argv[1:] = ["methods", "--json"]
getattr(importlib.import_module(module), name)()
"""


def interrupted(handler: str, at: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", INTERRUPTED.format(handler=handler), at, SCRIPT], capture_output=True, text=True)


def test_ctrl_c_while_torch_is_imported_is_one_line() -> None:
    done = interrupted("signal.default_int_handler", "torch")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted before anything was begun\n")


def test_ctrl_c_stays_ignored_where_the_shell_ignores_it() -> None:
    done = interrupted("signal.SIG_IGN", "torch")
    assert done.returncode == 0, done.stderr
    assert '"recipe"' in done.stdout


def test_a_reader_that_stops_is_no_error() -> None:
    for verb in (["catalogue"], ["methods", "--json"]):
        with subprocess.Popen([sys.executable, "-m", "rarefy", *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert (process.stderr.read(), process.wait()) == (b"", 0), verb
