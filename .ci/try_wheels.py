"""Install each wheel of a folder into a fresh environment and run `wheel_job.py` there: `try_wheels.py dist`.

The environment borrows torch, transformers and what they need from the one that runs this, and nothing of the checkout:
a line in a .pth file puts a folder on the path without reading the .pth files in it, so that an editable install stays unseen.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

JOB = Path(__file__).with_name("wheel_job.py")
PURE = "-py3-none-any.whl"


def attempt(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        venv.create(room / "venv", symlinks=True)
        python = room / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
        (site,) = (room / "venv" / "lib").glob("python*/site-packages")
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        job = shutil.copy(JOB, room)
        subprocess.run([python, "-I", job, "absent" if wheel.name.endswith(PURE) else "native"], check=True, cwd=room)


def main() -> None:
    wheels = sorted(Path(sys.argv[1]).resolve().glob("rarefy-*.whl"))
    kinds = sorted(wheel.name.endswith(PURE) for wheel in wheels)
    assert kinds == [False, True], f"expected a wheel with kernels and one without, found {[wheel.name for wheel in wheels]}"
    for wheel in wheels:
        attempt(wheel)


if __name__ == "__main__":
    main()
