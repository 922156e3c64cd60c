"""The page of extras/serve.py in a headless Chromium: a story is told, branched and looked into, by mouse, keys and
touch, with no error on the console."""

import contextlib
import json
import shutil
import time
import urllib.request

import pytest
from helpers import TINY, serving

import bpe
import tinygpt
from extras import serve

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
PHONE = {"width": 360, "height": 740}
TOLD = "body:not(.telling) .token:nth-child(30)"  # a story of at least 30 tokens that has ended


@pytest.fixture(scope="module")
def model():
    """A model of random weights that writes letters and spaces."""
    tokenizer = bpe.Tokenizer.from_merges([(b"c", b"a"), (b"ca", b"t")])
    flat = tinygpt.init_parameters(TINY, 1) * tinygpt.np.float32(3)
    p = tinygpt.views(tinygpt.layout(TINY), flat, TINY.layers)
    p["embed_w"][:, 0], p["norm_w"][0], p["norm_b"][0] = -9, 0, 9  # logits of -81 more, but for letters and spaces
    p["embed_w"][[32, *range(97, 123), 256, 257], 0] = 0
    return p, TINY, tokenizer


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(browser, server, refused=0, **options):
    """The page, ready to tell; at its end nothing stands on the console, but so many answers that refuse."""
    context, said = browser.new_context(**{"viewport": {"width": 1200, "height": 800}} | options), []
    page = context.new_page()
    page.set_default_timeout(60_000)  # of a machine that does other things as well
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    yield page
    context.close()
    assert len(said) == refused, said
    assert all("status of 4" in line for line in said)


def tell(page, prompt="cat", seed="3", tokens="40"):
    page.wait_for_selector("#tell:enabled")
    page.fill("#prompt", prompt)
    page.fill("#seed", seed)
    page.fill("#max_tokens", tokens)
    page.press("#prompt", "Control+Enter")
    page.wait_for_selector(TOLD)


def story(page):
    """What the page shows, without the mark of the start."""
    return page.text_content("#story").removeprefix("start")


def shades(page):
    return page.eval_on_selector_all(".token", "all => all.map(one => Number(one.style.getPropertyValue('--shade')))")


def ask(server, **fields):
    """The choice of a completion, asked for without the page."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/completions", json.dumps(fields).encode())
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]


def test_a_story_is_told_and_shaded_and_a_token_is_branched(browser, server):
    with opened(browser, server) as page:
        tell(page)
        first = ask(server, prompt="cat", seed=3, max_tokens=40, return_token_ids=True, logprobs=10)
        assert story(page) == "cat" + first["text"]
        values = [min(1, -value / 6) for value in first["logprobs"]["token_logprobs"]]
        assert shades(page)[2:] == pytest.approx(values, abs=1e-3)
        at = next(i for i, text in enumerate(first["logprobs"]["tokens"]) if i > 4 and text.isalpha())
        page.hover(f".token:nth-child({3 + at})")
        shown = page.eval_on_selector_all("#alternatives .word", "all => all.map(one => one.textContent)")
        assert len(shown) == len(first["logprobs"]["top_logprobs"][at]) >= 10
        ids, chosen = first["logprobs"]["top_token_ids"][at], first["token_ids"][at]
        other = next(j for j, i in enumerate(ids) if i != chosen and i < 128)
        page.click(f"#alternatives button:nth-child({other + 1})")
        page.wait_for_selector(TOLD)
        begun = [*first["prompt_token_ids"], *first["token_ids"][:at], ids[other]]
        rest = ask(server, prompt=begun[-TINY.seq_len + 1 :], seed=3, max_tokens=40)
        kept = first["text"][: first["logprobs"]["text_offset"][at]]
        assert story(page) == "cat" + kept + chr(ids[other]) + rest["text"]
        page.click("#back")
        assert story(page) == "cat" + first["text"]


def test_the_keyboard_is_enough(browser, server):
    with opened(browser, server) as page:
        tell(page)
        before = story(page)
        page.focus(".token:nth-child(2)")
        for key in ["ArrowRight"] * 5 + ["Enter", "ArrowDown", "ArrowDown", "Escape"]:
            page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.i") == "6" and page.is_visible("#alternatives")
        page.keyboard.press("Escape")
        assert page.is_hidden("#alternatives")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")  # the likeliest token
        page.wait_for_selector(".token.chosen")
        page.wait_for_selector(TOLD)
        assert story(page)[:4] == before[:4]


def test_a_story_is_stopped_retried_and_continued(browser, server, monkeypatch):
    def slowly(engine, request, complete=serve.complete):
        for event in complete(engine, request):
            time.sleep(0.01)
            yield event

    monkeypatch.setattr(serve, "complete", slowly)
    with opened(browser, server) as page:
        page.wait_for_selector("#tell:enabled")
        page.fill("#seed", "5")
        page.fill("#max_tokens", "1000")
        page.click("#tell")
        page.wait_for_selector(".token:nth-child(25)")
        page.click("#stop")
        page.wait_for_selector("#retry:enabled")
        count, begun = page.locator(".token").count(), story(page)
        monkeypatch.undo()
        page.fill("#max_tokens", "40")
        page.click("#more")
        page.wait_for_selector(f"body:not(.telling) .token:nth-child({count + 30})")
        page.fill("#seed", "2")
        page.click("#retry")
        page.wait_for_selector("#retry:enabled")
        assert page.input_value("#seed") == "3"
        assert story(page).startswith(begun) and page.locator(".token").count() == count + 40


def test_attention_of_a_layer_and_head_is_shown(browser, server):
    with opened(browser, server) as page:
        tell(page, tokens="28")
        page.check("[value=attention]", force=True)
        page.select_option("#layer", "1")
        with page.expect_response(lambda answer: '"head":2' in (answer.request.post_data or "")) as answer:
            page.select_option("#head", "2")
        row = answer.value.json()["attention"][10]
        page.hover(".token:nth-child(11)")
        most = max(0.05, *row[1:])
        expected = pytest.approx([min(1, value / most) for value in row], abs=1e-3)
        for _ in range(200):  # the page is a moment behind the answer
            if shades(page)[:11] == expected:
                break
            page.wait_for_timeout(20)
        assert shades(page)[:11] == expected
        assert not any(shades(page)[11:]) and page.is_hidden("#alternatives")


def test_a_phone_shows_the_list_on_a_tap_and_everything_fits(browser, server):
    with opened(browser, server, viewport=PHONE, has_touch=True, is_mobile=True) as page:
        page.click("summary")
        tell(page)
        page.tap(".token:nth-child(12)")
        page.wait_for_selector("#alternatives:visible")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        box, token = (page.locator(name).bounding_box() for name in ("#alternatives", ".token.at"))
        assert token["y"] + token["height"] <= box["y"] and box["y"] + box["height"] <= 740
        page.tap("#alternatives button")
        page.wait_for_selector(".token.chosen")


def test_a_mistake_is_shown_and_the_page_goes_on(browser, server):
    with opened(browser, server, refused=1) as page:
        page.wait_for_selector("#tell:enabled")
        page.fill("#prompt", "a" * 50)
        page.click("#tell")
        page.wait_for_selector("#error:visible")
        assert "at most seq_len=32 tokens" in page.text_content("#error")
        tell(page)
        assert page.is_hidden("#error")


def test_a_key_is_asked_for(browser, model):
    with serving(model, api_key="s\u00e9same") as server, opened(browser, server, refused=1) as page:
        page.wait_for_selector("#key:visible")
        assert "Authorization" in page.text_content("#error")
        page.fill("#key", "s\u00e9same")
        page.press("#key", "Enter")
        tell(page)
