"""The comparison report in a real browser, and its tables."""

import html
import json
import re

import pytest

from tests.browser import open_browser, see_charts
from tests.evaluation.conftest import make_run
from tests.evaluation.planted import plant
from tests.evaluation.test_compare import copies, rewrite, runs  # noqa: F401
from vlmds.cli import main
from vlmds.evaluation.charts import charts
from vlmds.evaluation.compare import compare
from vlmds.evaluation.evaluated_runs import group_runs, load_run
from vlmds.evaluation.next_steps import next_steps
from vlmds.evaluation.report import write_report
from vlmds.evaluation.verdict import verdict_line


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


def plant_two(folder, **other):
    """Evaluations of e3 and e7 that differ in what is given for the second."""
    return [plant(folder / "e3", "e3"), plant(folder / "e7", "e7", value=60.0, **other)]


def section(text, name, language="en"):
    """The text of a section of the page in one language."""
    body = text[text.index(f'id="{name}"') :].split("</section>")[0]
    hidden = "ko" if language == "en" else "en"
    body = re.sub(rf'<span lang="{hidden}">.*?</span>|<[^>]*>', "", body, flags=re.DOTALL)
    return " ".join(html.unescape(body).split())


def test_the_headline_is_the_command_s_and_warnings_stand_beside_it(tmp_path, capsys):
    paths = plant_two(tmp_path, overrides=["stages.0.epochs=3"], record={"global_batch": None})
    assert main(["compare", *map(str, paths), "-o", str(tmp_path / "r.html")]) == 0
    out = capsys.readouterr()
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    headline = re.search(r'class="headline"><span lang="en">(.*?)</span>', text)[1]
    assert out.out.startswith(f"{html.unescape(headline)} 2 warnings: read them before you use this verdict.")
    assert "Take e7" in headline
    said = section(text, "verdict")
    assert "stages.0.epochs" in said and "different global batches" in said and "e7: —" in said
    assert "WARNING: " in out.err and "None" not in said + out.err
    korean = section(text, "verdict", "ko")
    assert "권장: e7" in korean and "경고 2건" in korean and "실험 설정이 다릅니다" in korean
    order = [text.index(f'id="{name}"') for name in ("verdict", "compared", "sure", "cost", "next", "details")]
    assert order == sorted(order)
    assert "3.0: e7" in section(text, "compared") and "64 · —" in section(text, "compared")
    assert "Resolve the warnings" in section(text, "next") and "vlmds export --run" in section(text, "next")


def test_without_warnings_the_page_has_none(tmp_path):
    loaded = [load_run(path) for path in plant_two(tmp_path)]
    found = compare(loaded)
    write_report(tmp_path / "r.html", loaded, found)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not found["warnings"] and "⚠" not in section(text, "verdict") + section(text, "compared")
    assert "warning" not in verdict_line(found)


def test_what_to_do_next_where_nothing_is_decided(tmp_path):
    few = [load_run(plant(tmp_path / name, name, clips=12, value=50.0)) for name in ("e3", "e7")]
    groups = group_runs(few)
    steps = next_steps(groups, compare(few))
    assert "at least 50 videos; these are 12" in steps[0].text[0]
    assert not any("export" in step.command for step in steps)
    spread = [load_run(plant(tmp_path / f"s{name}", name, clips=400, spread=20.0)) for name in ("e3", "e7")]
    found = compare(spread)
    needed = found["verdict"]["needed"]
    assert f"about {needed['clips']:,} clips" in next_steps(group_runs(spread), found)[0].text[0]
    assert next_steps(groups[:1], compare(few[:1]))[0].text[0].startswith("Evaluate another experiment")


def test_the_axis_of_tokens_labels_only_what_occurs(tmp_path):
    loaded = [load_run(path) for path in plant_two(tmp_path)]
    axis = charts(loaded, compare(loaded))["scatter"]["figure"]["layout"]["xaxis"]
    assert (axis["tickvals"], axis["ticktext"]) == ([64.0, 4608.0], ["64", "4,608"])


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
