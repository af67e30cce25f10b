"""How the page looks on every screen, and its modules alone: events cut anywhere, texts divided at tokens."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from page_server import Gate, PageServer, Token, completion, refusal, words
from page_visit import Visit, visiting

if importlib.util.find_spec("playwright"):  # where it is missing these are only collected; run, they fail
    from playwright.sync_api import Browser, expect

pytestmark = pytest.mark.peers

# Of every text that is seen: its contrast with what lies behind it, by WCAG 2.
CONTRASTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const line = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = parts(colour).map((c) => line(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return parts(colour)[3] === 0 ? ground(element.parentElement) : colour;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!element.checkVisibility() || !(own || element.matches("input, textarea"))) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    found.push([`${element.localName}#${element.id}.${element.className}`, (a + 0.05) / (b + 0.05)]);
  }
  return found;
}"""

# Everything that can be pressed: its name and the size of where a finger finds it.
TARGETS = """() => [...document.querySelectorAll("button, input, textarea, summary")]
  .filter((one) => one.checkVisibility())
  .map((one) => one.type === "checkbox" ? one.closest("label") : one)
  .map((one) => [one.id || one.textContent, one.offsetWidth, one.offsetHeight])"""


def width(visit: Visit) -> int:
    """Of everything that can be scrolled to."""
    return int(visit.page.evaluate("document.scrollingElement.scrollWidth"))


def test_a_phone(browser: Browser, server: PageServer) -> None:
    server.answer = completion(words(f" Goose{'e' * 400} {'=' * 200}\n"))
    with visiting(browser, server.url, viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True) as visit:
        page = visit.page
        assert width(visit) == 320
        expect(page.locator("#temperature")).to_be_hidden()  # settings are folded away
        page.get_by_text("Settings", exact=True).tap()
        page.get_by_text("API key", exact=True).tap()
        expect(page.locator("#temperature")).to_be_visible()
        visit.generate("x" * 300)
        page.locator("#text .token").nth(1).tap()
        expect(page.get_by_role("tooltip")).to_be_visible()
        assert width(visit) == 320
        targets = page.evaluate(TARGETS)
        assert len(targets) == 6 + 1 + 1 + 2 + 1 + 8 + 4 + 2 + 3
        assert [target for target in targets if min(target[1:]) < 44] == []
        # Stop stays within reach however long the text is.
        page.evaluate("scrollTo(0, document.scrollingElement.scrollHeight)")
        expect(page.locator("#stop")).to_be_in_viewport()


def test_a_long_text_is_followed_to_its_end(visit: Visit, server: PageServer) -> None:
    server.answer = completion(words("so\n" * 200))
    visit.generate("x")
    expect(visit.page.locator("#text .token").last).to_be_in_viewport()
    # Who scrolls away is left there.
    gate = Gate()
    server.answer = completion(words("so\n" * 200), gates={100: gate})
    visit.press("Generate")
    expect(visit.page.locator("#text .token")).to_have_count(100)
    expect(visit.page.locator("#text .token").last).to_be_in_viewport()
    visit.page.evaluate("scrollTo(0, 0)")
    gate.set()
    visit.wait_for_end()
    assert visit.page.evaluate("scrollY") == 0 and visit.text == "x" + "so\n" * 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, server: PageServer, scheme: Any) -> None:
    # Without motion: what is measured in the middle of a transition is neither its beginning nor its end.
    with visiting(browser, server.url, color_scheme=scheme, reduced_motion="reduce") as visit:
        visit.errors_allowed = True
        visit.page.get_by_text("API key", exact=True).click()
        server.answer = refusal(500, "because")
        visit.generate("Geese")
        measured = visit.page.evaluate(CONTRASTS)
        server.answer = completion(words("They\nflew"))
        visit.generate()
        visit.page.locator("#text .token").first.focus()
        measured += visit.page.evaluate(CONTRASTS)
        names = {name for name, _ in measured}
        assert {"div#error.notice", "span#.prompt", "span#.token", "button#generate.main", "div#.note"} <= names
        assert [found for found in measured if found[1] < 4.5] == []
        red = visit.page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
        assert (red < 128) == (scheme == "dark")


def test_the_other_colours_by_hand(browser: Browser, server: PageServer) -> None:
    with visiting(browser, server.url, color_scheme="dark") as visit:
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = visit.page.evaluate(ground)
        toggle = visit.page.get_by_role("button", name="Switch between dark and light colours")
        toggle.click()
        light = visit.page.evaluate(ground)
        assert light != dark
        visit.page.reload()
        assert visit.page.evaluate(ground) == light
        toggle.click()
        assert visit.page.evaluate(ground) == dark


@pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_motion(browser: Browser, server: PageServer, motion: Any, moves: bool) -> None:
    with visiting(browser, server.url, reduced_motion=motion) as visit:
        visit.generate("x")
        animation = visit.page.evaluate("""() => {
            const made = document.querySelector("#text .completion");
            made.classList.add("running");
            return getComputedStyle(made, "::after").animationName;
        }""")
        assert (animation != "none") == moves


def test_a_text_from_right_to_left(visit: Visit, server: PageServer) -> None:
    hebrew = "\u05d0\u05d5\u05d5\u05d6\u05d9\u05dd"
    server.answer = completion(words(f" {hebrew} {hebrew}\nflew"))
    visit.generate(hebrew)
    assert visit.text == f"{hebrew} {hebrew} {hebrew}\nflew"
    assert visit.page.locator("#text").evaluate("(box) => box.matches(':dir(rtl)')")
    lefts = [token.bounding_box()["x"] for token in visit.page.locator("#text .token").all()]  # type: ignore[index]
    assert lefts[1] < lefts[0]
    assert lefts[3] < lefts[1]  # each line has its own direction, and side
    visit.page.locator("#text .token").first.focus()
    visit.page.keyboard.press("ArrowLeft")  # where the text goes on
    assert visit.page.evaluate("document.activeElement === document.querySelectorAll('.token')[1]")


def test_the_end_of_the_text_has_alternatives(visit: Visit, server: PageServer) -> None:
    end = Token("<|endoftext|>", "", 4, {"<|endoftext|>": -0.2, " and": -2.0})
    server.answer = completion([*words("They"), end], finish="stop")
    visit.generate("x")
    assert visit.completion == "They"
    visit.page.locator("#text .token.end").hover()
    expect(visit.page.locator("#alternatives .taken .token-text")).to_have_text("<|endoftext|>")


def test_events_cut_anywhere(visit: Visit) -> None:
    stream = ": a comment\r\nid: 7\rretry: 5\n" + 'data: {"text": "Gänse 🪿"}\r\n\r\n'
    stream += "event: error\ndata:two\r\ndata:  lines\n\n" + "data\n\ndata: \u2028one line\r\rdata: never ended\n"
    expected = [
        {"event": "message", "data": '{"text": "Gänse 🪿"}'},
        {"event": "error", "data": "two\n lines"},
        {"event": "message", "data": ""},
        {"event": "message", "data": "\u2028one line"},
    ]
    read = """async (bytes) => {
        const { SseDecoder } = await import(new URL("page/sse.js", document.baseURI));
        const data = Uint8Array.from(bytes);
        const read = (cuts) => {
            const decoder = new SseDecoder();
            return cuts.slice(1).flatMap((end, i) => decoder.push(data.subarray(cuts[i], end)));
        };
        const n = data.length;
        const found = new Set();
        for (let i = 0; i <= n; i++)
            for (let j = i; j <= n; j++) found.add(JSON.stringify(read([0, i, j, n])));
        found.add(JSON.stringify(read(Array.from({ length: n + 1 }, (_, i) => i))));
        return [...found].map((text) => JSON.parse(text));
    }"""
    assert visit.page.evaluate(read, list(stream.encode())) == [expected]


def divided(visit: Visit, pieces: list[tuple[str, list[tuple[str, int]]]]) -> list[tuple[str, list[str]]]:
    """Texts with their tokens, as tokens.js divides a stream of (text, tokens and their places)."""
    return [
        (text, names)
        for text, names in visit.page.evaluate(
            """async (pieces) => {
                const { TokenText } = await import(new URL("page/tokens.js", document.baseURI));
                const divider = new TokenText();
                const found = [];
                for (const [text, tokens] of pieces) {
                    const named = tokens.map(([text, offset]) => ({ text, offset, top: [], logprob: 0 }));
                    for (const change of divider.push(text, named)) {
                        if (change.begins) found.push(["", []]);
                        found.at(-1)[0] += change.text;
                        found.at(-1)[1].push(...change.tokens.map((token) => token.text));
                    }
                }
                return found;
            }""",
            pieces,
        )
    ]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([("ab", [("a", 0), ("b", 1)]), ("c", [("c", 2)])], [("a", ["a"]), ("b", ["b"]), ("c", ["c"])]),
        # Text held back for a stop string, then all of it at once.
        ([("", [("a", 0)]), ("", [("bc", 1)]), ("abcd", [("d", 3)])], [("a", ["a"]), ("bc", ["bc"]), ("d", ["d"])]),
        # A stop string cut off in the middle of a token: what stands there is the text.
        ([("a", [("a", 0)]), ("b", [("bSTOP", 1), ("!", 6)])], [("a", ["a"]), ("b", ["bSTOP"])]),
        # Code points are counted, not JavaScript's units; parts of a character share it.
        ([("🪿x", [("\\xf0", 0), ("\\x9f", 0), ("x", 1)])], [("🪿", ["\\xf0", "\\x9f"]), ("x", ["x"])]),
        # A token that ends one character and holds more.
        ([("", [("\\xc3", 0)]), ("ä b", [("\\xa4 ", 0), ("b", 2)])], [("ä ", ["\\xc3", "\\xa4 "]), ("b", ["b"])]),
        ([("e\u0301o", [("e", 0), ("\u0301", 1), ("o", 2)])], [("e\u0301", ["e", "\u0301"]), ("o", ["o"])]),
        ([("no tokens", []), (" at all", [])], [("no tokens at all", [])]),
        ([("pre", []), ("post", [("post", 3)])], [("pre", []), ("post", ["post"])]),
    ],
)
def test_texts_divided_at_tokens(visit: Visit, pieces: Any, expected: list[tuple[str, list[str]]]) -> None:
    assert divided(visit, pieces) == expected
