"""A Chromium without a window, for tests of the pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

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


def see_charts(browser) -> None:
    """Scroll to each chart of a report and wait until it is drawn, as charts are only drawn near the screen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    for chart in browser.find_elements(By.CSS_SELECTOR, ".chart"):
        browser.execute_script("arguments[0].scrollIntoView()", chart)
        WebDriverWait(browser, 60).until(lambda _, chart=chart: chart.find_elements(By.CSS_SELECTOR, "svg.main-svg"))
