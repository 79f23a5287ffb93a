"""The comparison report in a real browser, and its tables."""

import json
import re

import pytest

from tests.browser import open_browser, see_charts
from tests.evaluation.conftest import make_run
from tests.evaluation.test_compare import copies, rewrite, runs  # noqa: F401
from vlmds.cli import main


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("report")
    paths = copies(runs, folder)
    rewrite(paths[0], lambda i, line: line | {"caption": "</script><b>나쁜 글</b> " + line["caption"]})
    assert (
        main(
            [
                "compare",
                *map(str, paths),
                "-o",
                str(folder / "report.html"),
                "--csv",
                str(folder / "t.csv"),
                "--latex",
                str(folder / "t.tex"),
                "--words",
                "7번 네.",
            ]
        )
        == 0
    )
    return folder / "report.html"


def test_the_page_is_self_contained_and_tables_agree(page, runs):  # noqa: F811
    text = page.read_text(encoding="utf-8")
    assert text.count("</script>") == 3 and not re.search(r'<(script|link|img)[^>]*(src|href)="http', text)
    metrics = json.loads((runs["e8"] / "evaluation" / "val" / "metrics.json").read_text())
    value = metrics["metrics"]["chrf++@char"]["value"]
    rows = (page.parent / "t.csv").read_text().splitlines()
    assert len(rows) == 4 and f"{value:.4f}" in rows[3]
    assert f"{value:.1f}" in (page.parent / "t.tex").read_text()


def test_in_a_browser(page):
    with open_browser("1300,1600") as browser:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import Select

        browser.get(page.as_uri())

        def find(css):
            return browser.find_elements(By.CSS_SELECTOR, css)

        assert len(find(".clip")) == 11 and len(find(".clip img")) == 11
        see_charts(browser)
        assert len(find("svg.main-svg")) >= 5 and find("mark")
        assert "나쁜 글" in find(".clip")[0].text and not find(".clip b b")
        assert browser.execute_script(
            "return [...document.querySelectorAll('.chart')].every(c =>"
            " c.querySelector('.main-svg').getBoundingClientRect().width <= c.offsetWidth)"
        )
        assert len(find("table.words tr")) == 5  # a head, three runs, the most frequent answer
        english = find("#verdict")[0].text
        find("#lang")[0].click()
        korean = find("#verdict")[0].text
        assert english != korean and "클립" in korean and "clips" in english
        browser.save_screenshot(str(page.parent / "ko.png"))
        before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        find("#theme")[0].click()
        after = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert before != after
        find("#lang")[0].click()
        browser.save_screenshot(str(page.parent / "en-other.png"))
        Select(find("#sort")[0]).select_by_value("2")
        scores = browser.execute_script("return rows.map(c => c.scores[2])")
        assert scores == sorted(scores, reverse=True)
        find("#filter")[0].send_keys("7번")
        assert 0 < len(find(".clip")) < 11 and "7번" in find(".clip")[0].text
        browser.execute_script("document.getElementById('clips').scrollIntoView({block: 'center'})")
        browser.save_screenshot(str(page.parent / "clips.png"))
        assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def test_one_run_and_a_run_without_evaluation(models, shards, tmp_path, runs, capsys):  # noqa: F811
    out = str(tmp_path / "r.html")
    assert main(["compare", str(runs["e3"]), "-o", out]) == 0
    assert "One experiment only" in (tmp_path / "r.html").read_text(encoding="utf-8")
    fresh = make_run(models, shards, tmp_path / "e4", "e4")
    assert main(["compare", str(runs["e3"]), str(fresh), "-o", out]) == 2
    assert "no evaluation; run vlmds evaluate --run" in capsys.readouterr().err
    assert main(["compare", str(runs["e3"]), "--metric", "spice", "-o", out]) == 2
