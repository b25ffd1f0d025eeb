"""Run `against.py FOLDER -m MODULE ARGS...` or `against.py FOLDER -c CODE` with the rarefy in FOLDER instead of the editable install."""

import runpy
import sys

folder, kind, what, *rest = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, folder)
__import__("rarefy")  # before a test runner puts the checkout on the path
sys.argv = [what, *rest]
if kind == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    exec(compile(what, "<code>", "exec"), {"__name__": "__main__"})
