"""A Chromium without a window, for tests of the pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def open_browser(size: str, *logs: str) -> Iterator:
    """A selenium driver. size: of the window, "1280,1000". logs: kinds to record besides "browser".

    Skips the test where Chromium is not installed."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        f"--window-size={size}",
        "--lang=en-US",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", dict.fromkeys(("browser", *logs), "ALL"))
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.set_page_load_timeout(60)
        yield browser
    finally:
        browser.quit()


VIEWS = ((1280, "light", "en"), (1280, "dark", "ko"), (390, "dark", "en"), (390, "light", "ko"))
"""Width, colours and language; each pair of two of these occurs."""
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]


def set_view(browser, width: int, theme: str) -> None:
    """A screen of this width, CSS pixels, whose user prefers light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    colours = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", colours)


def axe_violations(browser, exclude: tuple[str, ...] = ()) -> list[tuple[str, list[str]]]:
    """Rules of axe-core that the page breaks, with the elements. exclude: CSS selectors."""
    axe = pytest.importorskip("axe_core_python", reason="axe-core-python is part of the extra test")
    browser.execute_script(files(axe).joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const [exclude, runOnly, done] = arguments;"
        "axe.run({exclude}, {runOnly, resultTypes: ['violations']}).then(done, e => done(String(e)))",
        list(exclude),
        _RULES,
    )
    assert found["passes"]
    return [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]


def see_charts(browser) -> None:
    """Scroll to each chart of a report and wait until it is drawn, as charts are only drawn near the screen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    for chart in browser.find_elements(By.CSS_SELECTOR, ".chart"):
        browser.execute_script("arguments[0].scrollIntoView()", chart)
        WebDriverWait(browser, 60).until(lambda _, chart=chart: chart.find_elements(By.CSS_SELECTOR, "svg.main-svg"))
