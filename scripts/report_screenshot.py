"""Pictures of a run's report for the documents, taken with Debian's Chromium.

    mesh-transformer report runs/mine --out /tmp/report.html
    python scripts/report_screenshot.py /tmp/report.html [--out docs/images/report.png] [--dark] [--height 1800]

Needs the peers extra and `apt-get install chromium`.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]


def take(report: Path, target: Path, *, dark: bool, width: int, height: int) -> None:
    """The beginning of the page, in 256 colours, which is enough for it and a third of the bytes."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(report.absolute().as_uri())
        picture = page.screenshot()
        browser.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what `mesh-transformer report` wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "report.png")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--height", type=int, default=1800)
    asked = parser.parse_args()
    take(asked.report, asked.out, dark=asked.dark, width=asked.width, height=asked.height)
    print(asked.out)


if __name__ == "__main__":
    main()
