"""Makes the pictures in docs/img: pages of real runs, as a browser shows them.

    python docs/make_images.py RUN [RUN ...] --preview RECIPE

The first run gives the report, two or more the comparison. Needs chromium; no picture is larger than 300 kB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune.cli import main as finetune

FOLDER = Path(__file__).resolve().parent / "img"
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1280
MAX_BYTES = 300_000
QUIET = (
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-quic", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
)


def main() -> int:
    """Write the pages into a temporary folder and take their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--preview", metavar="RECIPE")
    arguments = parser.parse_args()
    chromium = next((path for name in NAMES if (path := shutil.which(name))), None)
    if chromium is None:
        print(f"error: none of {', '.join(NAMES)} is installed", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _finetune("report", arguments.runs[0])
        report = Path(arguments.runs[0]) / "report.html"
        for theme in ("light", "dark"):
            _picture(chromium, report, f"report-{theme}", folder, height=1500, theme=theme)
        if len(arguments.runs) > 1:
            _finetune("compare", *arguments.runs, "--html", str(folder / "compare.html"))
            _picture(chromium, folder / "compare.html", "compare", folder, height=1400)
        if arguments.preview:
            _finetune("preview", arguments.preview, "--rows", "1", "--html", str(folder / "preview.html"))
            _picture(chromium, folder / "preview.html", "preview", folder, height=1100)
    return 0


def _finetune(*arguments: str) -> None:
    if finetune(arguments) != 0:
        raise SystemExit(f"finetune {' '.join(arguments)} failed")


def _picture(chromium: str, page: Path, name: str, folder: Path, *, height: int, theme: str = "light") -> None:
    target = FOLDER / f"{name}.png"
    # Chromium's headless mode has no switch for the theme: of the copy, one of the two style sheets is taken.
    copy = folder / f"{name}.html"
    query = "@media (prefers-color-scheme: dark)"
    chosen = "@media all" if theme == "dark" else "@media not all"
    copy.write_text(re.sub(re.escape(query), chosen, page.read_text()))
    size = [f"--window-size={WIDTH},{height}", f"--user-data-dir={folder}/user", f"--screenshot={target}"]
    subprocess.run([chromium, "--headless", *QUIET, *size, copy.as_uri()], check=True, capture_output=True, timeout=120)
    print(f"{target} {target.stat().st_size:,} bytes")
    if target.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{target} is larger than {MAX_BYTES:,} bytes; take a smaller part of the page")


if __name__ == "__main__":
    sys.exit(main())
