"""Chromium drives the page as a person would, before a server whose answers are known."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from page_server import Answer, Gate, PageServer, Token, chunk, completion, ending, event, refusal, words
from page_visit import Visit, visiting

if importlib.util.find_spec("playwright"):  # where it is missing these are only collected; run, they fail
    from playwright.sync_api import Browser, expect

pytestmark = pytest.mark.peers
DEFAULTS = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "max_tokens": 128}


def test_types_and_generates(visit: Visit, server: PageServer) -> None:
    server.answer = completion(words(" and flew\n\naway <b>&amp;"), finish="stop")
    server.answer.pace = 0.005
    asked = visit.generate("The geese rose")
    assert asked.pop("seed") == int(visit.state["seed"])
    stream = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 5}
    assert asked == {"model": "geese-6b", "prompt": "The geese rose"} | DEFAULTS | stream
    assert visit.text == "The geese rose and flew\n\naway <b>&amp;"
    assert visit.completion == " and flew\n\naway <b>&amp;"
    visit.say("The model ended its text after 6 tokens. The prompt has 7 tokens.")
    expect(visit.page.locator("#rate")).to_have_text(re.compile(r"^6\s+tokens\s+·\s+[\d.]+\s+tokens/s$"))
    # Told apart without colour.
    lines = "(part) => getComputedStyle(part).textDecorationLine"
    assert visit.page.locator("#text .completion").evaluate(lines) == "underline"
    assert visit.page.locator("#text .prompt").evaluate(lines) == "none"


def test_an_empty_prompt_is_a_prompt(visit: Visit) -> None:
    assert visit.generate()["prompt"] == ""
    assert visit.text == "They flew south."
    visit.say(re.compile("^Stopped after 3 tokens: the context is full"))


def test_stop_is_noticed_by_the_server(visit: Visit, server: PageServer) -> None:
    for stop in (lambda: visit.press("Stop"), lambda: visit.page.keyboard.press("Escape")):
        server.gone.clear()
        server.answer = completion(words("They flew south."), gates={2: Gate()})
        visit.press("Generate")
        expect(visit.page.locator("#text .token")).to_have_count(2)
        visit.say("Generating.")
        stop()
        assert server.gone.wait(30)
        visit.wait_for_end()
        visit.say("Stopped by you after 2 tokens.")
        assert visit.completion == "They flew"
        expect(visit.page.locator("#error")).to_be_hidden()


def test_nodes_are_only_appended(visit: Visit, server: PageServer) -> None:
    gate = Gate()
    server.answer = completion(words(" so" * 2000), gates={3: gate})
    visit.press("Generate")
    expect(visit.page.locator("#text .token")).to_have_count(3)
    visit.page.evaluate("""() => {
        window.changes = {removed: 0, times: 0};
        window.first = document.querySelector("#text .token");
        new MutationObserver((records) => {
          changes.times += 1;
          for (const record of records) changes.removed += record.removedNodes.length;
        }).observe(document.getElementById("text"), {childList: true, subtree: true, characterData: true});
    }""")
    gate.set()
    visit.wait_for_end()
    assert visit.text == " so" * 2000
    assert visit.page.evaluate("first.isConnected && changes.removed === 0")
    # Drawn by the frame, not by the token.
    assert 0 < visit.page.evaluate("changes.times") < 1000


def test_settings_reach_the_request(visit: Visit) -> None:
    page = visit.page
    for name, number, slider in [("temperature", "1.25", "0.3"), ("top_p", "0.5", "0.65"), ("top_k", "40", "7")]:
        page.locator(f"#{name}").fill(number)
        assert page.locator(f"#{name}-slider").input_value() == number
        page.locator(f"#{name}-slider").fill(slider)
        assert page.locator(f"#{name}").input_value() == slider
    page.locator("#max_tokens-slider").focus()
    page.keyboard.press("ArrowRight")
    page.locator("#seed").fill("4294967295")
    asked = visit.generate("x")
    found = {name: asked[name] for name in [*DEFAULTS, "seed"]}
    assert found == {"temperature": 0.3, "top_p": 0.65, "top_k": 7, "max_tokens": 129, "seed": 4294967295}


def test_a_number_out_of_range_is_brought_back(visit: Visit) -> None:
    field = visit.page.locator("#temperature")
    field.fill("9")
    expect(field).to_have_attribute("aria-invalid", "true")
    assert visit.generate("x")["temperature"] == 2  # the press has left the field
    expect(field).to_have_value("2")
    field.fill("")
    field.blur()
    expect(field).to_have_value("0.8")
    # "0." on the way to "0.5" stays as it is typed.
    field.fill("")
    field.press_sequentially("0.5")
    expect(field).to_have_value("0.5")


def test_seeds(visit: Visit) -> None:
    first, second = visit.generate("x")["seed"], visit.generate("x")["seed"]
    assert first != second == int(visit.state["seed"])
    visit.page.get_by_label("Random each time").uncheck()
    assert visit.generate("x")["seed"] == visit.generate("x")["seed"] == second
    visit.press("New seed")
    third = visit.generate("x")["seed"]
    assert third not in (first, second) and third == int(visit.state["seed"])
    visit.page.locator("#seed").fill("5")
    assert visit.generate("x")["seed"] == 5
    visit.press("Reset settings")
    assert visit.state == {"prompt": "x", "random": True, "seed": "0"} | {k: str(v) for k, v in DEFAULTS.items()}


def test_a_link_holds_everything_and_runs_nothing(browser: Browser, server: PageServer) -> None:
    prompt = "Gänse & #geese=100% + 1\n\t\u05d2\u05d5 🪿"
    with visiting(browser, server.url) as visit:
        for name, value in [("temperature", "0.35"), ("top_p", "0.9"), ("top_k", "12"), ("max_tokens", "77")]:
            visit.page.locator(f"#{name}").fill(value)
        visit.write(prompt)
        visit.generate()
        state = visit.state
        assert state["random"] and state["prompt"] == prompt
        visit.press("Copy link")
        visit.say("Link copied. It keeps the seed, so that it gives the same text.")
        shared = visit.page.evaluate("navigator.clipboard.readText()")
        visit.page.reload()
        expect(visit.page.locator("#model")).to_have_text("geese-6b")
        assert visit.state == state
    with visiting(browser, server.url, shared.removeprefix(server.url)) as visit:
        assert visit.state == state | {"random": False}
        visit.page.evaluate("location.hash = 'p=other&t=0.1&s=3'")
        expect(visit.page.locator("#prompt")).to_have_value("other")
        assert visit.state["temperature"] == "0.1" and visit.state["seed"] == "3" and visit.state["top_k"] == "0"
    assert server.n_completions == 1


def test_a_bad_link_is_mended_aloud(browser: Browser, server: PageServer) -> None:
    with visiting(browser, server.url, "#p=hi&t=9&tk=many&n=0") as visit:
        expect(visit.page.get_by_role("alert")).to_have_text(
            "The link was not all usable. Temperature 9 is not in 0 to 2; 2 is used. "
            'Top k "many" is no number; 0 is used. Length 0 is not in 1 to 1024; 1 is used.'
        )
        assert visit.state | {"seed": ""} == {
            "prompt": "hi",
            "temperature": "2",
            "top_p": "0.95",
            "top_k": "0",
            "max_tokens": "1",
            "seed": "",
            "random": True,
        }


def test_examples_fill_the_prompt_and_back_brings_it_back(visit: Visit, server: PageServer) -> None:
    group = visit.page.get_by_role("group", name="Example prompts")
    seen = set()
    for button in group.get_by_role("button").all():
        button.click()
        seen.add(visit.state["prompt"])
    assert len(seen) == 6 and all(len(prompt) > 20 for prompt in seen)
    visit.write("my own")
    visit.press("Proof")
    assert visit.state["prompt"].startswith("Theorem")
    visit.page.go_back()
    expect(visit.page.locator("#prompt")).to_have_value("my own")
    assert server.n_completions == 0


def test_continue_and_copy(visit: Visit, server: PageServer) -> None:
    visit.generate("Geese.\n")
    visit.press("Copy text")
    visit.say("Text copied.")
    assert visit.page.evaluate("navigator.clipboard.readText()") == "Geese.\nThey flew south."
    server.answer = completion(words(" Then north."))
    assert visit.complete(lambda: visit.press("Continue"))["prompt"] == "Geese.\nThey flew south."
    assert visit.state["prompt"] == "Geese.\nThey flew south."
    assert visit.text == "Geese.\nThey flew south. Then north." and visit.completion == " Then north."
    # Line ends that a text field would change go on as they were.
    server.answer = completion(words("\r\n"))
    visit.generate("x")
    assert visit.complete(lambda: visit.press("Continue"))["prompt"] == "x\r\n"


def test_alternatives_on_hover(visit: Visit, server: PageServer) -> None:
    top = {" a": -0.1, "\n": -3.0, "bytes:\\xe2\\x80": -5.0, "": -12.0}
    server.answer = completion([Token(" the", " the", 0, top)])
    visit.generate("x")
    box = visit.page.get_by_role("tooltip")
    expect(box).to_be_hidden()
    visit.page.locator("#text .token").hover()
    # The token itself is shown though the server's list lacks it.
    expect(box.locator(".alternative .token-text")).to_have_text(["␣a", "↵", "\\xe2\\x80", "(nothing)", "␣the"])
    expect(box.locator(".percent")).to_have_text(["90.5%", "5.0%", "0.67%", "< 0.01%", "36.8%"])
    assert box.locator(".taken .token-text").inner_text() == "␣the"
    share = "(bar) => bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width"
    assert box.locator(".bar").first.evaluate(share) == pytest.approx(0.905, abs=0.01)
    visit.page.mouse.move(5, 5)
    expect(box).to_be_hidden()


def test_alternatives_on_tap(browser: Browser, server: PageServer) -> None:
    with visiting(browser, server.url, has_touch=True, viewport={"width": 320, "height": 640}) as visit:
        visit.generate("x")
        visit.page.locator("#text .token").nth(1).tap()
        box = visit.page.get_by_role("tooltip")
        expect(box.locator(".taken .token-text")).to_have_text("␣flew")
        assert visit.page.evaluate("document.scrollingElement.scrollWidth") == 320
        visit.page.locator("#status").tap()
        expect(box).to_be_hidden()


def test_a_character_of_several_tokens(visit: Visit, server: PageServer) -> None:
    parts = [Token("bytes:\\xf0\\x9f", "", 0), Token("bytes:\\xaa\\xbf", "🪿", 0), Token("!", "!", 1)]
    server.answer = completion(parts)
    visit.generate()
    assert visit.page.locator("#text .token").all_text_contents() == ["🪿", "!"]
    visit.page.locator("#text .token").first.hover()
    expect(visit.page.locator("#alternatives .about")).to_have_text(
        ["Token 1 of 2 \\xf0\\x9f", "Token 2 of 2 \\xaa\\xbf"]
    )


def test_keyboard_only(visit: Visit, server: PageServer) -> None:
    keyboard = visit.page.keyboard
    order = []
    for _ in range(40):
        keyboard.press("Tab")
        order.append(visit.focused())
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert visit.page.evaluate(outline) != "none", order[-1]
        if order[-1] == "copy-link":
            break
    sliders = [f"{name}{end}" for name in DEFAULTS for end in ("", "-slider")]
    examples = ["button"] * 6
    rest = ["seed", "new-seed", "random", "reset", "summary", "continue", "copy-text", "copy-link"]
    assert order == ["theme", *examples, "prompt", "generate", "stop", "title", *sliders, *rest]
    while visit.focused() != "prompt":
        keyboard.press("Shift+Tab")
    keyboard.type("Geese:")
    assert visit.complete(lambda: keyboard.press("Control+Enter"))["prompt"] == "Geese:"
    assert visit.focused() == "prompt"  # nobody is moved away
    while visit.focused() != "token":
        keyboard.press("Tab")
    box = visit.page.get_by_role("tooltip")
    expect(box.locator(".taken .token-text")).to_have_text("They")
    keyboard.press("ArrowRight")
    expect(box.locator(".taken .token-text")).to_have_text("␣flew")
    assert visit.page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "alternatives"
    keyboard.press("End")
    expect(box.locator(".taken .token-text")).to_have_text("␣south.")
    keyboard.press("Escape")
    expect(box).to_be_hidden()
    keyboard.press("Tab")
    assert visit.focused() == "continue"  # one stop for all of the text


def test_hearers_are_told_once_a_run(visit: Visit) -> None:
    regions = visit.page.locator("[aria-live], [role=status], [role=alert]")
    ids = regions.evaluate_all("(found) => found.map((one) => one.id)")
    assert sorted(ids) == ["error", "health", "status"]  # not the text, nor the count of its tokens


REFUSALS = [
    (400, {}, "The server refused this: because"),
    (413, {}, "The server refused this: because"),
    (429, {"Retry_After": "7"}, "Too many others are being served. Try again in 7 seconds. (because)"),
    (429, {}, "Too many others are being served. Try again in a moment. (because)"),
    (500, {}, "The server failed: because"),
    (503, {}, "The server takes no requests at the moment. Try again in a while. (because)"),
]


@pytest.mark.parametrize(("status", "headers", "said"), REFUSALS)
def test_refusals_in_words(visit: Visit, server: PageServer, status: int, headers: dict[str, str], said: str) -> None:
    visit.errors_allowed = True
    server.answer = refusal(status, "because", **headers)
    visit.generate("x")
    expect(visit.page.get_by_role("alert")).to_have_text(said)
    visit.say("Nothing was written.")
    # The next one takes it away.
    server.answer = completion(words("well"))
    visit.generate()
    expect(visit.page.locator("#error")).to_be_hidden()


def test_an_error_of_something_else_on_the_way(visit: Visit, server: PageServer) -> None:
    visit.errors_allowed = True
    server.answer = Answer([b"<html>bad gateway</html>"], 502, {"Content-Type": "text/html"})
    visit.generate("x")
    expect(visit.page.get_by_role("alert")).to_have_text("The server failed: The server answered 502 Bad Gateway.")


def test_the_key_is_asked_for(browser: Browser, server: PageServer) -> None:
    server.key = "secret"
    with visiting(browser, server.url, model=None) as visit:
        visit.errors_allowed = True
        expect(visit.page.locator("#context")).to_have_text("asks for an API key")
        visit.press("Generate")
        expect(visit.page.get_by_role("alert")).to_contain_text(
            "This server asks for an API key. Enter it under Settings"
        )
        assert visit.focused() == "key"
        visit.page.keyboard.type("secret")
        visit.page.keyboard.press("Tab")
        expect(visit.page.locator("#model")).to_have_text("geese-6b")
        visit.generate("x")
        assert visit.completion == "They flew south."
        assert "secret" not in visit.page.url
        assert visit.page.evaluate("JSON.stringify({...localStorage}) + document.cookie") == "{}"
        visit.page.reload()
        expect(visit.page.locator("#model")).to_have_text("geese-6b")
        visit.generate()


@pytest.mark.parametrize(
    ("rest", "breaks", "said"),
    [
        ([], True, "The connection broke before the completion ended. What came until then is kept."),
        ([], False, "The connection broke before the completion ended. What came until then is kept."),
        ([event({"error": {"message": "the step threw"}})], False, "The server failed: the step threw"),
        ([b"data: {\n\n"], False, "The server failed: it sent something that is no piece of a completion: {"),
        ([b"data: [DONE]\n\n"], False, "The server failed: it ended the completion without saying why."),
    ],
)
def test_streams_that_end_badly(visit: Visit, server: PageServer, rest: list[bytes], breaks: bool, said: str) -> None:
    visit.errors_allowed = True
    gate = Gate()
    server.answer = Answer([*(chunk(token) for token in words("They flew")), gate, *rest], breaks=breaks)
    visit.press("Generate")
    expect(visit.page.locator("#text .token")).to_have_count(2)
    gate.set()
    visit.wait_for_end()
    expect(visit.page.get_by_role("alert")).to_have_text(said)
    visit.say("Broken off after 2 tokens.")
    assert visit.completion == "They flew"


def test_the_network_is_gone(visit: Visit) -> None:
    visit.errors_allowed = True
    visit.page.route("**/v1/completions", lambda route: route.abort())
    visit.page.route("**/health", lambda route: route.abort())
    visit.press("Generate")
    expect(visit.page.get_by_role("alert")).to_have_text(
        "The server cannot be reached. See whether it still runs and whether you are on line, then try again."
    )
    expect(visit.page.locator("#health")).to_have_text("not reachable")
    visit.page.unroute("**/health")
    expect(visit.page.locator("#health")).to_have_text("ready")


def test_a_server_that_warms_up(browser: Browser, server: PageServer) -> None:
    server.health = (503, {"status": "warming up"})
    with visiting(browser, server.url, model=None) as visit:
        visit.errors_allowed = True
        expect(visit.page.locator("#health")).to_have_text("warming up")
        server.health = (200, {"status": "ok"})
        expect(visit.page.locator("#health")).to_have_text("ready")
        expect(visit.page.locator("#model")).to_have_text("geese-6b")


def test_bytes_one_by_one(visit: Visit, server: PageServer) -> None:
    family = "👨‍👩‍👧"
    points = [Token(f"bytes:{i}", point, i) for i, point in enumerate(f"{family} é🇩🇪")]
    stream = b"".join([*(chunk(token) for token in points), *ending(len(points), "stop")])
    server.answer = Answer([bytes([byte]) for byte in stream])
    visit.generate("x")
    # What people read as one character is one piece, however many tokens made it.
    assert visit.page.locator("#text .token").all_text_contents() == [family, " ", "é", "🇩🇪"]
    visit.say(re.compile("^The model ended its text after 9 tokens"))


def test_unstreamed_texts_without_tokens(visit: Visit, server: PageServer) -> None:
    server.answer = Answer([chunk(text="They "), chunk(text="flew."), *ending(2)])
    visit.generate("x")
    assert visit.completion == "They flew." and visit.page.locator("#text .token").count() == 0
    assert json.loads(visit.page.evaluate("JSON.stringify(sessionStorage)")) == {}
