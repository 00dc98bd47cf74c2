"""A picture of the top of a report, as the README shows it: by headless Chromium, in 256 colours.

    python benchmarks/picture.py docs/report.png                      of the page that `sterna demo` wrote
    python benchmarks/picture.py docs/report.png run/report.html      of another one
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from sterna.demo.assets import cache_folder

WIDTH, HEIGHT = 1180, 1720


def picture(target: Path, page: Path) -> None:
    """Write the picture of the page's first `HEIGHT` pixels."""
    browser = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("no Chromium is installed: make chromium")
    if not page.is_file():
        sys.exit(f"there is no {page}: run sterna demo first, or name a report")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        Image.open(shot).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    given = sys.argv[1:]
    default = cache_folder() / "demo" / "experts" / "report.html"
    picture(Path(given[0]) if given else Path("docs/report.png"), Path(given[1]) if len(given) > 1 else default)
