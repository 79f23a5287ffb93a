"""Both reports under axe-core, in both languages, light and dark, wide and narrow, and what axe does not check."""

import pytest

from tests.browser import VIEWS, axe_violations, open_browser, see_charts, set_view
from tests.clips import write_manifest, write_video
from tests.evaluation.opinions import answers_of
from tests.evaluation.planted import plant, planted_outside
from tests.evaluation.test_people import CLIPS, EXPS, planned, strengths, write_reviews
from vlmds.evaluation.compare import compare
from vlmds.evaluation.cost import COST
from vlmds.evaluation.evaluated_runs import load_evaluated, load_run
from vlmds.evaluation.outside_only import compare_outside
from vlmds.evaluation.people_report import add_people
from vlmds.evaluation.report import write_report
from vlmds.packing import report as packing_report
from vlmds.packing.pack import pack

SMALL = """return [...document.querySelectorAll('button, select, input, summary, nav a')].filter(e => {
  const r = e.getBoundingClientRect(); return e.checkVisibility() && Math.min(r.width, r.height) < 24;
}).map(e => e.outerHTML)"""
HALF = """const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const span = walk.currentNode.parentElement.closest('span[lang=ko]'), text = walk.currentNode.textContent;
  if (span && /[a-z]{3}/.test(text) && !/[가-힣]/.test(text)) found.push(text);
}
return found"""

OPEN = """document.querySelectorAll('details').forEach(e => { e.open = true; });
requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """With warnings, a long name and values that are not known."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = [
        plant(folder / "e3", "e3"),
        plant(folder / "e4", "e4", value=52.0, overrides=["stages.0.epochs=3"]),
        plant(folder / "e7-an-experiment-with-a-long-name", "e7", value=55.0, record={"global_batch": None}),
    ]
    loaded = [load_run(run) for run in runs]
    write_report(folder / "report.html", loaded, compare(loaded))
    return folder / "report.html"


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """With people's and a judge's answers, and an outside model."""
    folder = tmp_path_factory.mktemp("people")
    paths = [plant(folder / exp, exp, clips=CLIPS) for exp in EXPS]
    plan = planned(paths)
    better = strengths(plan, -1.0, 0.0, 2.0)
    answers = answers_of(plan, "민수", better, 0) + answers_of(plan, "지영", better, 1)
    for order in (1, 2):
        answers += answers_of(plan, "judge:good", better, 5 + order, order=order)
    reviews = write_reviews(folder / "reviews", plan, answers)
    outside = planted_outside(folder / "ready-made-model", folder / "made", clips=CLIPS)
    runs, others = load_evaluated([*paths, outside])
    found = compare(runs, outside=others)
    add_people(found, runs, reviews, "metrics", None)
    write_report(folder / "report.html", runs, found, others)
    return folder / "report.html"


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Of outside models alone."""
    folder = tmp_path_factory.mktemp("outside")
    paths = [
        planted_outside(folder / f"model-{n}", folder / "made", n, clips=CLIPS, value=40.0 + 8 * n) for n in range(3)
    ]
    _, models = load_evaluated(paths)
    write_report(folder / "report.html", [], compare_outside(models), models)
    return folder / "report.html"


@pytest.fixture(scope="module")
def packing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    for i in range(3):
        write_video(folder / f"v{i}.mp4", frames=8 + 4 * i)
    rows = [{"video": f"v{i}.mp4", "caption": "한 남자가 공원에서 산책하고 있습니다." * (i + 1)} for i in range(3)]
    manifest = write_manifest(folder / "m.jsonl", [*rows, {"video": "none.mp4", "caption": "가"}])
    pack(manifest, folder / "out", store="frames", num_frames=4, image_size=32, progress=False)
    return packing_report.write_report(folder / "out")


@pytest.fixture(scope="module")
def browser():
    with open_browser("1280,1000") as opened:
        yield opened


def show(browser, page, width, theme, language):
    set_view(browser, width, theme)
    browser.get(page.as_uri())
    if browser.execute_script("return document.documentElement.lang") != language:
        browser.find_element("id", "lang").click()
    browser.execute_async_script(OPEN)


@pytest.mark.parametrize("report", ["comparison", "people", "outside", "packing"])
def test_a_report_is_accessible(report, request, browser):
    page = request.getfixturevalue(report)
    for view in VIEWS:
        show(browser, page, *view)
        assert axe_violations(browser, (".clip:nth-child(n + 4)",)) == [], view


@pytest.mark.parametrize("report", ["comparison", "people", "outside", "packing"])
def test_a_report_fits_a_phone_and_follows_the_switches(report, request, browser):
    page = request.getfixturevalue(report)
    backgrounds = {}
    for width, theme, language in VIEWS:
        show(browser, page, width, theme, language)
        ran = browser.execute_script
        if width == 390:
            see_charts(browser)
        assert ran("return document.documentElement.scrollWidth <= innerWidth"), (width, language)
        assert ran(SMALL) == [] and ran(HALF) == []
        assert ran("return document.documentElement.lang") == language
        assert ran("return document.querySelectorAll('h1').length") == 1
        assert ran("return document.title") == ran("return document.querySelector('h1').innerText")
        assert ran("return [...document.querySelectorAll('th')].every(e => e.scope)")
        names = ran(
            "return [...document.querySelectorAll('[role=img], img')].map(e => e.alt || e.getAttribute('aria-label'))"
        )
        assert names and all(names)
        korean = [name for name in names if any("가" <= letter <= "힣" for letter in name)]
        assert bool(korean) == (language == "ko")
        backgrounds[theme] = ran("return getComputedStyle(document.body).backgroundColor")
        # Wherever columns are out of sight a line says so, and the keyboard can scroll.
        for box in browser.find_elements("css selector", ".scroll"):
            wide = ran("return arguments[0].scrollWidth > arguments[0].clientWidth + 1", box)
            hint = box.find_element("xpath", "following-sibling::p")
            if ran("return arguments[0].checkVisibility()", box):
                assert hint.is_displayed() == wide == (box.get_attribute("tabindex") == "0")
    assert len({*backgrounds.values()}) == 2
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("view", VIEWS)
def test_costs_are_read_on_a_phone_without_scrolling_sideways(people, browser, view):
    show(browser, people, *view)
    table = browser.find_element("id", "costs")
    for row in table.find_elements("css selector", "tbody tr"):
        cells = row.find_elements("css selector", "td")
        assert len(cells) == 1 + len(COST)
        boxes = [cell.rect for cell in cells]
        assert all(0 <= box["x"] and box["x"] + box["width"] <= view[0] for box in boxes)
        for cell, (english, korean, _) in zip(cells[1:], COST.values(), strict=True):
            labelled = cell.text.startswith(korean if view[2] == "ko" else english)
            assert labelled == (view[0] == 390)
