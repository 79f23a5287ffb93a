"""The page in a real browser, served by a real process: by keyboard, through a kill, in both languages."""

import json
import re
import time

import pytest

pytest.importorskip("uvicorn")

from tests.browser import open_browser  # noqa: E402
from tests.clips import write_manifest, write_video  # noqa: E402
from tests.review.conftest import RUNS, captions_of, plant, references  # noqa: E402
from tests.review.server import Server  # noqa: E402
from vlmds.evaluation.reviews import read_reviews  # noqa: E402
from vlmds.packing.pack import pack  # noqa: E402

KEYS = "1230" * 5


class Browser:
    """Actions on the page, and what it shows."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        self.run("localStorage.clear(); sessionStorage.clear()")  # of the last test
        browser.get(url)

    def until(self, found, seconds: float = 30.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(f"return {found}"):
                return value
            time.sleep(0.01)
        raise AssertionError(f"{found}: not within {seconds} s: {self.text()}")

    def run(self, script: str):
        return self.browser.execute_script(script)

    def text(self) -> str:
        return self.run("return document.body.innerText")

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def shown(self) -> str:
        """The id of the pair."""
        return self.run("return pair && !busy ? pair.id : null")

    def next_after(self, before: str | None) -> None:
        self.until(f"pair && !busy && pair.id !== {json.dumps(before)}")

    def begin(self, name: str) -> None:
        self.until("document.querySelector('#start:not([hidden])')")
        self.browser.find_element("id", "who").send_keys(name)
        self.browser.find_element("css selector", "#start button").click()
        self.next_after(None)


@pytest.fixture(scope="module")
def served_runs(tmp_path_factory):
    """30 clips of 6 s, of which one is an AVI with MPEG-2, and three runs."""
    folder = tmp_path_factory.mktemp("page")
    rows = []
    video = write_video(folder / "one.mp4", frames=60, width=160, height=120).read_bytes()
    write_video(folder / "v4.avi", frames=60, width=160, height=120, codec="mpeg2video")
    for clip in range(30):
        name = _source(f"c{clip:03d}")
        if clip != 4:
            (folder / name).write_bytes(video)
        row = {"video": name, "caption": references(clip), "id": f"c{clip:03d}", "split": "val"}
        rows.append(row | ({"start": 1.0, "end": 3.0} if clip % 2 else {}))
    pack(write_manifest(folder / "manifest.jsonl", rows), folder / "packed", verify=False, progress=False, workers=1)
    for number, name in enumerate(RUNS):
        plant(folder / name, captions_of(number, range(30)), folder / "packed", source=_source)
    return [folder / name for name in RUNS]


def _source(clip: str) -> str:
    return f"v{int(clip[1:])}.{'avi' if clip == 'c004' else 'mp4'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reviews")


@pytest.fixture(scope="module")
def server(served_runs, folder):
    """Every pair goes to every reviewer: each test is one of its own."""
    server = Server(folder, *map(str, served_runs), "--pairs", "60", "--choose", "random", "--overlap", "60")
    yield server
    server.end()


@pytest.fixture(scope="module")
def window():
    with open_browser("1280,900") as browser:
        yield browser


@pytest.fixture
def browser(window):
    window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    window.get_log("browser")
    return window


def test_twenty_pairs_by_keyboard_with_a_kill_in_the_middle(served_runs, tmp_path, browser, capsys):
    folder = tmp_path / "killed"
    server = Server(folder, *map(str, served_runs), "--pairs", "60", "--choose", "random")
    try:
        page = Browser(browser, server.url)
        page.begin("민수")
        seen, begin = [], time.monotonic()
        for number, key in enumerate(KEYS):
            pair = page.shown()
            seen.append(pair)
            page.until("document.querySelector('#media video').currentTime > 0")  # it plays
            if number == 10:
                port = re.search(r":(\d+)", server.url)[1]
                server.end(9)
                page.press(key)
                page.until("document.querySelector('#status').textContent.includes('cannot be reached')")
                assert page.run("return pair.id") == pair
                server = Server(folder, port=port)
            else:
                page.press(key)
            page.next_after(pair)
        seconds = (time.monotonic() - begin) / len(KEYS)
        times = page.run(
            "return ['pair shown', 'clip playing'].map(name => performance.getEntriesByName(name).map(m => m.duration))"
        )
        logs = [entry for entry in browser.get_log("browser") if "ERR_CONNECTION" not in entry["message"]]
    finally:
        server.end()
    shown, playing = (sorted(each) for each in times)
    with capsys.disabled():
        print(
            f"\n{len(KEYS)} pairs by keyboard, one killed server among them: {seconds:.2f} s a pair; next pair shown in "
            f"{shown[len(shown) // 2]:.0f} ms (median, without the kill at most {shown[-2]:.0f}); its clip playing after "
            f"{playing[len(playing) // 2]:.0f} ms (median, at most {playing[-1]:.0f})"
        )
    answers = read_reviews(folder).answers
    names = {"1": "left", "2": "right", "3": "both_good", "0": "both_bad"}
    assert [(a.pair, a.choice) for a in answers] == [(p, names[k]) for p, k in zip(seen, KEYS, strict=True)]
    assert len(set(seen)) == 20 and not logs, logs


def test_marks_correction_reference_undo_and_skip_by_keyboard(server, folder, browser):
    page = Browser(browser, server.url)
    page.begin("지영")
    first, captions = page.run("return [pair.id, pair.captions]")
    assert "정답" not in page.text() and "영상입니다" not in page.text()
    page.press("a", "j", "ㅎ")  # the last one is no key of this keyboard, and does nothing
    page.press("t")
    page.until("!document.querySelector('#reference').hidden")
    assert "번 영상입니다." in page.text()
    page.press("r")
    page.until("document.activeElement.id === 'corrected'")
    assert page.run("return document.activeElement.value") == captions["right"]
    page.press("123 더.")  # in the text field these are no choices
    page.press("\ue00c")  # Escape
    assert page.shown() == first
    page.press("2")
    page.next_after(first)
    second = page.shown()
    page.press("\ue014")  # right arrow
    page.next_after(second)
    third = page.shown()
    page.press("\ue012")  # left arrow: the first pair again, as it was answered
    page.until(f"pair.id === '{first}' && !busy")
    assert page.run("return [marksOf('left'), marksOf('right'), correction()]") == [
        ["invented_object"],
        ["wrong_action"],
        {"text": captions["right"] + "123 더.", "side": "right"},
    ]
    assert "taken back" in page.text()
    page.press("1")
    page.until(f"pair.id === '{third}' && !busy")
    [answer] = [a for a in read_reviews(folder).answers if a.reviewer == "지영"]
    assert answer.choice == "left" and answer.reference and answer.corrected.text.endswith("123 더.")
    assert answer.corrected.run == answer.right and answer.marks.right == ("wrong_action",)
    assert not browser.get_log("browser")


def test_a_clip_that_the_browser_cannot_play_is_encoded_and_a_span_is_repeated(server, browser):
    page = Browser(browser, server.url)
    page.begin("현우")
    kinds = set()
    for _ in range(60):
        pair = page.shown()
        media = page.run("return pair.media")
        if media["encode"] and "encoded" not in kinds:
            kinds.add("encoded")
            page.until("document.querySelector('#media video').currentTime > 0.2")
            assert page.run("return document.querySelector('#media video').duration") == pytest.approx(6.0, abs=0.2)
        if 0 < media["start"] and "span" not in kinds:
            kinds.add("span")
            page.until("document.querySelector('#media video').currentTime > 1.5")
            page.run("document.querySelector('#media video').playbackRate = 4")
            page.until("document.querySelector('#media video').currentTime < 1.4")
            assert "0:01 to 0:03" in page.text()
        page.press("1")
        page.until("!pair && progress || pair && !busy && pair.id !== " + json.dumps(pair))
        if kinds == {"encoded", "span"}:
            break
    assert kinds == {"encoded", "span"}


@pytest.mark.parametrize("language, width, dark", [("en", 1280, False), ("ko", 1280, True), ("ko", 390, False)])
def test_headings_names_contrast_and_width(server, browser, language, width, dark):
    page = Browser(browser, server.url)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    page.begin("a")
    if language == "ko":
        browser.find_element("id", "language").click()
    assert page.run("return document.documentElement.lang") == language
    assert page.run("return document.documentElement.scrollWidth") <= width
    unnamed = page.run(UNNAMED)
    assert not unnamed, unnamed
    levels = page.run("return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    low = page.run(CONTRAST)
    assert not low, low
    korean = re.sub(r"[A-Z;]\b|vlmds|English|\ba\b", "", page.text())
    assert language == "en" or not re.search("[a-zA-Z]{3}", korean.replace("Space", "")), korean


UNNAMED = """
return [...document.querySelectorAll('button, input, textarea, progress, img, summary')].filter(element =>
  element.checkVisibility() && !(element.innerText?.trim() || element.getAttribute('aria-label') || element.labels?.[0]?.innerText.trim() ||
  element.alt)).map(element => element.outerHTML)
"""
CONTRAST = """
function channels(text) { return text.match(/[\\d.]+/g).map(Number); }
function light(rgb) {
  const [r, g, b] = rgb.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = channels(getComputedStyle(element).backgroundColor);
    if (colour[3] !== 0) return colour;
  }
  return matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255];
}
return [...document.querySelectorAll('body *')].filter(element => element.checkVisibility() &&
  [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())).map(element => {
    const [a, b] = [light(channels(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), element.outerHTML.slice(0, 90)];
  }).filter(([ratio]) => ratio < 4.5);
"""
