"""The web page in a real browser, and the command `vlmds serve`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio")

import httpx  # noqa: E402

from tests.browser import VIEWS, axe_violations, open_browser, set_view  # noqa: E402
from tests.clips import write_video  # noqa: E402
from tests.serve.conftest import LIMIT, SAYINGS  # noqa: E402
from tests.serve.test_api import idle  # noqa: E402
from vlmds.cli import main  # noqa: E402
from vlmds.errors import SampleError  # noqa: E402


@pytest.fixture
def browser():
    with open_browser("1280,1000", "performance") as browser:
        yield browser


class Page:
    """Actions on the page, and what it shows."""

    def __init__(self, browser, url: str):
        self.browser = browser
        browser.get(url)
        self.until(lambda: self.find("#go") and self.find("#video input[type=file]"))

    def until(self, found, seconds: float = 150.0):
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := found():
                    return value
            except (WebDriverException, IndexError):  # it is being redrawn
                pass
            time.sleep(0.03)
        raise AssertionError(f"not within {seconds} s: {self.browser.page_source[-3000:]}")

    def find(self, css: str) -> list:
        return self.browser.find_elements("css selector", css)

    def choose(self, video: Path) -> None:
        """Put a file in the place of the last one."""
        for button in self.find("#video [aria-label=Clear]"):
            button.click()
        self.until(lambda: not self.find("#preview video, #preview p, #preview .bad"))
        self.until(lambda: self.find("#video input[type=file]"))[0].send_keys(str(video))
        self.until(lambda: self.find("#preview video, #preview .bad"))

    def click(self, css: str) -> None:
        self.until(lambda: self.find(css))[0].click()

    def state(self) -> str:
        return self.find("#state")[0].text

    def captions(self) -> list[str]:
        return [box.get_property("value") for box in self.find(".vlmds-caption textarea")]


def test_two_runs_side_by_side_in_a_browser(server, clip, browser, tmp_path):
    page = Page(browser, server.url)
    page.click("#go")
    page.until(lambda: page.state() == "Choose a video first.")

    page.choose(clip)
    page.click("#go")
    seen = set()

    def done():
        seen.add(tuple(page.captions()))
        return page.state().startswith("Done in")

    page.until(done)
    captions = page.captions()
    assert len(captions) == 2 and all(map(str.startswith, captions, SAYINGS.values()))
    partly = {pair[0] for pair in seen if pair and pair[0] and pair[0] != captions[0]}
    assert partly and all(captions[0].startswith(text.strip()) for text in partly)
    assert len(page.find("#frames img")) == 4
    assert all(
        browser.execute_script("return arguments[0].naturalWidth", image) == 28 for image in page.find("#frames img")
    )
    assert not page.find(".bad") and "4 × 28 px" in page.find("#frames")[0].text
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in log if entry["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert not [url for url in urls if not url.startswith((server.url, "data:", "blob:"))]

    # One run only.
    page.find("#runs input")[1].click()
    page.click("#go")
    page.until(lambda: page.captions()[1] == "" and page.state().startswith("Done in"))

    assert browser.execute_script("return document.querySelector('#preview video').videoWidth") == 64
    bad = tmp_path / "<img src=x onerror=alert(1)>.mp4"
    bad.write_bytes(b"no video" * 100)
    page.choose(bad)
    assert page.until(lambda: page.captions() == ["", ""]) and not page.find("#frames img")
    page.until(lambda: "cannot be captioned: cannot be read" in page.find("#preview")[0].text)
    assert not page.find("#preview video")
    page.click("#go")
    page.until(lambda: "This video cannot be captioned: cannot be read" in page.state())
    assert page.find("[role=alert].bad") and "Traceback" not in browser.page_source
    browser.save_screenshot(str(tmp_path / "bad.png"))

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth <= 390")


def test_a_file_that_browsers_cannot_play_is_shown_without_an_error(server, browser, tmp_path, monkeypatch):
    toasts = """new MutationObserver(changes => { for (const change of changes) for (const node of change.addedNodes)
    if (node.matches?.("[class*=toast]") || node.querySelector?.(".toast-body")) (window.seen ??= []).push(node.outerHTML);
    }).observe(document.body, {childList: true, subtree: true})"""
    page = Page(browser, server.url)
    browser.execute_script(toasts)
    clip = write_video(tmp_path / "clip.avi", codec="mpeg4")
    page.choose(clip)
    page.until(lambda: "A copy without sound" in page.find("#preview")[0].text)
    width = "return document.querySelector('#preview video').videoWidth"
    page.until(lambda: browser.execute_script(width) == 64)
    page.click("#go")
    page.until(lambda: page.state().startswith("Done in"))
    assert all(map(str.startswith, page.captions(), SAYINGS.values()))

    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"clip.avi", "vlmds-copy.mp4"}
    deletable = set().union(*server.page.temp_file_sets)
    assert {*map(str, files)} <= deletable  # once they are old

    # Where no copy can be made, its frames are shown.
    def fails(*_, **__):
        raise SampleError("decoder hung: stopped after 20 s")

    monkeypatch.setattr("vlmds.serve.page.encoded", fails)
    page.choose(write_video(tmp_path / "other.avi", codec="mpeg4", frames=30))
    page.until(lambda: "these are its frames" in page.find("#preview")[0].text)
    assert page.find("#preview img")[0].is_displayed() and not page.find("#preview video, #preview .bad")
    seen = "return window.seen ?? []"
    assert browser.execute_script(seen) == []

    # A file above the limit is refused, and a message like the one that must not appear is found.
    large = tmp_path / "large.avi"
    large.write_bytes(bytes(int(LIMIT * 1e6) + 1))
    page.find("#video [aria-label=Clear]")[0].click()
    page.until(lambda: page.find("#video input[type=file]"))[0].send_keys(str(large))
    page.until(lambda: browser.execute_script(seen))
    assert not list(server.folder.rglob("large.avi"))


def test_the_page_is_accessible(server, clip, browser, monkeypatch):
    options = server.models.options
    monkeypatch.setattr(
        server.models, "options", lambda prompt, **more: options(prompt, **more | {"max_new_tokens": 8})
    )
    browser.execute_cdp_cmd("Network.enable", {})
    agent = browser.execute_script("return navigator.userAgent")
    for width, theme, language in VIEWS:
        set_view(browser, width, theme)
        languages = {"userAgent": agent, "acceptLanguage": {"en": "en-US", "ko": "ko-KR"}[language]}
        browser.execute_cdp_cmd("Emulation.setUserAgentOverride", languages)
        page = Page(browser, server.url)
        assert browser.execute_script("return document.documentElement.lang") == language
        dark = browser.execute_script("return document.body.classList.contains('dark')")
        assert dark == (theme == "dark")
        assert axe_violations(browser) == [], (width, theme, language, "empty")
        page.choose(clip)
        page.click("#go")
        page.until(lambda page=page: page.state().startswith(("Done in", "완료")))
        assert axe_violations(browser) == [], (width, theme, language, "done")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_stop_and_leaving_end_the_writing(server, clip, browser, monkeypatch):
    options = server.models.options
    monkeypatch.setattr(
        server.models, "options", lambda prompt, **more: options(prompt, **more | {"max_new_tokens": 100_000})
    )  # minutes of it
    page = Page(browser, server.url)
    for leave in (lambda: page.click("#stop"), lambda: browser.get("about:blank")):
        page.choose(clip)
        page.until(lambda: page.captions() == ["", ""])
        page.click("#go")
        page.until(lambda: page.captions()[0])
        time.sleep(0.5)
        assert not idle(server.models, 0)
        leave()
        assert idle(server.models, 20)
        if page.find("#state"):
            page.until(lambda: page.state() == "Stopped.")


def test_the_command_serves_and_cleans_up(served_runs, clip, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "vlmds.cli",
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
        "--run",
        *map(str, served_runs),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            url = re.fullmatch(r"e3, e7: (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)[1]
            while True:
                try:
                    assert httpx.get(f"{url}/health").status_code == 200
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            reply = httpx.post(
                f"{url}/caption", files={"video": clip.read_bytes()}, timeout=60, data={"max_tokens": "3"}
            )
            assert reply.json()["choices"][0]["message"]["role"] == "assistant"
            (private,) = tmp_path.glob("vlmds-serve-*")
            assert private.stat().st_mode & 0o777 == 0o700
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            assert "Traceback" not in process.stderr.read() and not private.exists()
        finally:
            process.kill()


def test_bad_arguments_give_one_line(served_runs, server, capsys, monkeypatch, tmp_path):
    run = str(served_runs[0])
    port = server.url.rsplit(":", 1)[1]
    for arguments, message in (
        ([run, "--port", port], f"--host 127.0.0.1 --port {port}: cannot listen there: Address"),
        ([run, "--port", "99999"], "cannot listen there"),
        ([run, "--host", "300.1.1.1"], "cannot listen there"),
        ([run, "--max-mb", "0"], "--max-mb 0: must be above 0"),
        ([str(tmp_path), "--port", "0"], f"--run {tmp_path}: neither a run folder nor an artifact"),
    ):
        assert main(["serve", "--run", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("vlmds: ") and error.count("\n") == 1 and message in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--run", run]) == 2
    assert "pip install -c constraints.txt -e '.[serve]'" in capsys.readouterr().err
