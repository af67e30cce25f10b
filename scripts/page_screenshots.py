"""Pictures of the server's page for the documents, taken with Debian's Chromium.

    python scripts/page_screenshots.py [--url http://127.0.0.1:8000/] [--out docs/images]

Without --url they show a completion that was written by hand, streamed by the tests' server.
Needs the peers extra and `apt-get install chromium`.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from contextlib import nullcontext
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "peers"))

from page_server import Token, completion, serving  # noqa: E402

DONE = "() => !/^(Generating|$)/.test(document.getElementById('status').textContent)"
# A token a line, then its share in percent, then the same of what else was likely there.
STORY = """\
 The¦41¦ A¦9¦ He¦31¦ It¦6¦ She¦4
 keeper¦63¦ extra¦11¦ geese¦7¦ old¦5¦ stranger¦3
 wrote¦22¦ counted¦38¦ rubbed¦8¦ looked¦7¦ went¦6
 the¦54¦ it¦19¦ down¦11¦ a¦8¦ in¦2
 number¦71¦ figure¦8¦ date¦6¦ names¦3¦ total¦2
 down¦64¦ in¦20¦ twice¦4¦ on¦3¦ again¦2
 twice¦18¦,¦33¦ and¦21¦ in¦16¦.¦5
,¦52¦ and¦24¦.¦13¦ to¦3¦ before¦2
 and¦47¦ then¦14¦ as¦9¦ because¦6¦ once¦5
 still¦9¦ the¦28¦ each¦19¦ both¦14¦ it¦8
 it¦44¦ the¦21¦ there¦17¦ he¦5¦ one¦4
 would¦31¦ was¦25¦ did¦16¦ came¦9¦ made¦4
 not¦83¦ come¦6¦ be¦4¦ always¦2¦ never¦2
 come¦35¦ go¦14¦ be¦11¦ add¦10¦ balance¦4
 out¦48¦ right¦20¦ even¦9¦ to¦8¦ back¦2
 even¦37¦ right¦33¦.¦11¦ the¦6¦ as¦3
.¦81¦,¦9¦:¦3¦;¦2¦.¦1
\\n¦46¦\\n\\n¦12¦He¦11¦The¦9¦It¦6
\\n¦88¦“¦3¦The¦2¦He¦1¦"¦1
“¦36¦The¦18¦At¦9¦In¦5¦When¦5
One¦21¦There¦14¦You¦9¦Who¦7¦It¦5
 of¦73¦ more¦8¦ too¦6¦,¦3¦ goose¦2
 you¦57¦ these¦10¦ them¦9¦ the¦8¦ us¦4
 is¦42¦ has¦13¦ does¦11¦,¦9¦ was¦4
 not¦23¦ a¦19¦ new¦8¦ lost¦6¦ an¦5
 a¦39¦ from¦18¦ one¦7¦ like¦6¦ supposed¦4
 goose¦76¦ real¦5¦ bird¦4¦ g¦3¦ true¦2
,”¦68¦”¦11¦.”¦9¦ at¦2¦,¦1
 he¦59¦ said¦25¦ the¦6¦ she¦2¦ I¦1
 told¦18¦ said¦61¦ called¦6¦ announced¦2¦ whispered¦1
 the¦46¦ them¦38¦ his¦4¦ a¦2¦ her¦1
 lake¦28¦ birds¦17¦ flock¦12¦ geese¦9¦ water¦6
.¦74¦,¦16¦ at¦3¦ in¦1¦ and¦1
<|endoftext|>¦58¦\\n¦22¦ The¦6¦ And¦3¦ “¦2
"""


def story() -> list[Token]:
    """The tokens of the completion that the pictures show."""
    tokens: list[Token] = []
    at = 0
    for line in STORY.splitlines():
        fields = line.replace("\\n", "\n").split("¦")
        shares = {name: math.log(int(share) / 100) for name, share in zip(fields[::2], fields[1::2], strict=True)}
        text = "" if fields[0] == "<|endoftext|>" else fields[0]
        tokens.append(Token(fields[0], text, at, shares))
        at += len(text)
    return tokens


def open_page(browser: Browser, url: str, *, width: int, height: int, dark: bool = False, phone: bool = False) -> Page:
    """The page as it looks before anybody has done anything."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        has_touch=phone,
        is_mobile=phone,
        device_scale_factor=2 if phone else 1,
    )
    page = context.new_page()
    page.goto(url)
    page.get_by_text("ready", exact=True).wait_for()
    return page


def generate(page: Page) -> None:
    """The story about geese, to its end."""
    page.get_by_role("button", name="Geese").click()
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function(DONE)


def save(page: Page, path: Path) -> None:
    """What is on the screen, in 256 colours, which is enough for it and a third of the bytes."""
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def take(browser: Browser, url: str, folder: Path) -> None:
    """All three pictures."""
    page = open_page(browser, url, width=1180, height=900)
    generate(page)
    save(page, folder / "page-light.png")

    page = open_page(browser, url, width=1180, height=900, dark=True)
    generate(page)
    page.locator(".token").nth(9).hover()
    save(page, folder / "page-dark.png")

    page = open_page(browser, url, width=360, height=780, phone=True)
    generate(page)
    page.evaluate("scrollTo(0, document.querySelector('.actions').offsetTop)")
    page.locator("#text .token").nth(2).tap()
    save(page, folder / "page-phone.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with nullcontext() if asked.url else serving() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        if server:
            server.answer = completion(story(), finish="stop", prompt_tokens=29)
            server.answer.pace = 0.05
        take(browser, asked.url or server.url, asked.out)
        browser.close()


if __name__ == "__main__":
    main()
