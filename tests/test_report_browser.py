"""The page in a real browser: an installed Chromium, headless, from a file and without a network."""

import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_report import many_rows, study

import report_page
from analysis.configurations import MEASURES
from analysis.recommendation import PREFERENCES, Bounds, recommend
from analysis.result_rows import model_label
from analysis.tables import TableSection
from report import report_html
from visualizations import pareto_mask

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120  # seconds; on an idle machine nothing takes longer than a few
HOSTILE = [
    "</script><script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 1">',
    '"><svg onload="window.hacked = 1">', "<a href='javascript:window.hacked = 1'>x</a>", "<!--", "{{ 7 * 7 }}",
    "a\u2028b", "${window.hacked = 1}",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    chosen = os.environ.get("BNQ_CHROMIUM")
    found = chosen or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is on the path and BNQ_CHROMIUM is not set")
    if not Path(found).is_file():
        pytest.fail(f"BNQ_CHROMIUM={chosen}: no such file", pytrace=False)
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


def small_study():
    """120 configurations of two models and an FP32, one cell failed; hostile strings wherever data has strings."""
    rows = many_rows(120)
    rows.loc[5, ["status", "error", "accuracy", "size_mb", "delta_accuracy"]] = ["failed", HOSTILE[0], None, None, None]
    rows.loc[7, ["options", "model", "worst_group"]] = [HOSTILE[1], HOSTILE[3], HOSTILE[2]]
    # on the front of the plot, and not recommended: its worst group loses too much
    rows.loc[9, ["model", "size_mb", "accuracy", "worst_group_accuracy"]] = [HOSTILE[1], 0.01, 0.95, 0.7]
    evil = pd.DataFrame({text: HOSTILE for text in HOSTILE[:3]})
    base = study()
    return replace(
        base,
        rows=rows,
        changes=base.changes.iloc[:0],
        data=base.data.assign(attribute=HOSTILE[3], group=HOSTILE[:2]),
        findings=HOSTILE,
        hypotheses=base.hypotheses.assign(statement=HOSTILE[0], sentence=HOSTILE[1], rule=HOSTILE[2]),
        targets={"synthetic": HOSTILE[4]},
        missing=[("quantization", HOSTILE[0])],
        leftovers=HOSTILE,
        figures=[("a.png", HOSTILE[2])],
        sections=[TableSection("evil", HOSTILE[1], HOSTILE[0], evil)],
        environment={HOSTILE[0]: HOSTILE[1]},
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    pixel = Path(__file__).parent.parent / "docs/images/default_accuracy.png"
    file.write_text(report_html(small_study(), {"a.png": pixel.read_bytes()}), encoding="utf-8")
    return file


@pytest.fixture
def open_page(browser):
    """Opens a file with what the browser context takes; at the end nothing must have been said or asked for."""
    opened = []

    def open_it(file, **context):
        page = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        opened.append((page, said, asked, file))
        page.goto(file.as_uri())
        return page

    yield open_it
    for page, said, asked, file in opened:
        page.context.close()
        assert said == [] and [url for url in asked if not url.startswith("data:image/png")] == [file.as_uri()]


def draw(page):
    """Scroll to the plot; its points, an array of texts a trace."""
    page.locator("#ui-plot").scroll_into_view_if_needed()
    page.locator("#ui-plot .main-svg").first.wait_for()
    return page.evaluate("document.getElementById('ui-plot').data.map(t => t.x.filter(x => x !== null).length)")


def wait(page, condition):
    """Playwright's own waiting evaluates a string in the page, which the page's policy forbids."""
    for _ in range(PATIENCE * 20):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def results(page):
    return page.locator('[aria-label="All results"] table')


def column(page, name):
    """The shown texts of a column of the table of all results."""
    return results(page).evaluate(
        """(table, name) => {
          const at = [...table.tHead.rows[0].cells].findIndex(head => head.textContent.trim() === name);
          return [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
        }""",
        name,
    )


def sort(page, name):
    results(page).get_by_role("button", name=name, exact=True).click()


# ------------------------------------------------------------------------------------------------------------- the page


def test_it_opens_from_a_file_and_draws_without_a_word_and_without_a_network(open_page, small):
    page = open_page(small, offline=True)
    assert page.title() == "What quantization did to each group"
    counts = draw(page)
    assert sum(counts) >= 119  # every finished configuration, the front and the recommended one
    front = set(page.evaluate("document.getElementById('ui-plot').data[0].y"))
    assert 95.0 in {round(y, 9) for y in front}
    image = page.locator("figure img").first
    image.scroll_into_view_if_needed()
    wait(page, "document.querySelector('figure img').naturalWidth > 100")


def test_hostile_strings_are_shown_as_they_are_and_do_nothing(open_page, small):
    page = open_page(small)
    draw(page)
    page.locator("#ui-y").select_option("worst_group_accuracy")
    sort(page, "model")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 1 and page.locator("svg[onload], a[href^='javascript']").count() == 0
    text = page.locator("main").inner_text()
    for hostile in HOSTILE[:6]:
        assert hostile in text
    drawn = page.locator("#ui-plot .legendtext").all_text_contents()
    assert HOSTILE[1] in drawn and HOSTILE[3] in drawn
    for loss in ("largest_loss", "largest_worst_group_loss"):
        page.locator(f"#ui-{loss}").fill("")
    page.locator("#ui-model").select_option(HOSTILE[1])
    assert page.locator("#ui-recommended").inner_text().startswith(HOSTILE[1])


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_width_of_a_phone_and_of_a_desk(open_page, small, width):
    page = open_page(small, viewport={"width": width, "height": 700})
    draw(page)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('input, select, button:not(.sort), #ui-plot')]"
        ".filter(each => each.offsetParent).map(each => each.getBoundingClientRect().right))"
    )
    assert right <= width


def test_a_table_of_sentences_needs_no_scrolling_sideways_on_a_phone_nor_on_a_desk(open_page, tmp_path):
    columns = {name: ["inconclusive"] * len(HOSTILE) for name in ("ours", "beside it")} | {"name": HOSTILE}
    columns |= {name: [f"{text} {'word ' * 25}{'L' * 200}" for text in HOSTILE] for name in ("finding", "source")}
    file = tmp_path / "report.html"
    section = TableSection("sentences", "Sentences", "", pd.DataFrame(columns))
    file.write_text(report_html(replace(small_study(), sections=[section]), {}), encoding="utf-8")
    for width in (360, 1280):
        page = open_page(file, viewport={"width": width, "height": 700})
        region = page.locator("#sentences ~ .scroll").first
        assert region.evaluate("each => each.scrollWidth <= each.clientWidth"), width
        cell = region.locator("tbody td").nth(3)
        assert cell.inner_text().startswith(HOSTILE[0])
        named = cell.evaluate("each => getComputedStyle(each, '::before').content")
        assert named == ('"finding: "' if width == 360 else "none")
        assert region.locator("thead button").count() == 5  # it still sorts
        assert region.locator("thead").is_visible() == (width == 1280)
        assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_light_and_on_dark(open_page, small, scheme):
    """Contrast of every text with its background is at least 4.5 (WCAG AA), and the scheme is followed."""
    page = open_page(small, color_scheme=scheme)
    draw(page)
    colours = page.evaluate(
        """() => {
          const back = (each) => { // of the nearest ancestor that has one
            for (; each; each = each.parentElement) {
              const colour = getComputedStyle(each).backgroundColor;
              if (!colour.endsWith(", 0)")) return colour;
            }
          };
          const found = new Set();
          for (const each of document.querySelectorAll("body *"))
            if (each.checkVisibility() && !each.disabled && !each.closest("svg") &&
                [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
              found.add(getComputedStyle(each).color + "|" + back(each));
          found.add(document.querySelector("#ui-plot .legendtext").style.fill + "|" + back(document.body));
          return [...found];
        }"""
    )
    assert len(colours) >= 5
    for pair in colours:
        text, back = (luminance(colour) for colour in pair.split("|"))
        assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5, pair
    body = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert body < 0.05 if scheme == "dark" else body > 0.9


def luminance(colour):
    shares = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_changing_the_scheme_recolours_the_plot(open_page, small):
    page = open_page(small, color_scheme="light")
    draw(page)
    before = page.evaluate("document.querySelector('#ui-plot .legendtext').style.fill")
    page.emulate_media(color_scheme="dark")
    wait(page, f"document.querySelector('#ui-plot .legendtext').style.fill !== {before!r}")


# --------------------------------------------------------------------------------------------------------------- tables


def test_results_sort_both_ways_with_what_is_missing_last(open_page, small):
    page = open_page(small)
    sort(page, "accuracy %")
    rising = column(page, "accuracy %")
    sort(page, "accuracy %")
    falling = column(page, "accuracy %")
    assert len(rising) == len(falling) == report_page.ROWS
    assert rising[0] == "89.9 ± 1.0" and falling[0] == "95.0 ± 1.0"
    heads = results(page).locator("th").all()
    assert [head.get_attribute("aria-sort") for head in heads if head.inner_text().startswith("accuracy %")] == [
        "descending"
    ]
    assert sum(head.get_attribute("aria-sort") != "none" for head in heads) == 1
    for _ in range(2):
        page.get_by_role("button", name="Next").click()
    assert column(page, "accuracy %")[-1] == "–" and column(page, "status")[-1] == "failed"


def test_sorting_uses_the_value_and_not_the_rounded_text(open_page, small):
    page = open_page(small)
    sort(page, "accuracy %")
    settings = column(page, "setting")
    grids = [int(re.search(r"grid=(\d+)", text)[1]) for text in settings if "grid=" in text]
    assert grids == sorted(grids, reverse=True) and len(set(column(page, "accuracy %"))) < 10


def test_results_filter_by_words_and_by_choice_and_page(open_page, small):
    page = open_page(small)
    tools = page.get_by_role("group", name="Filter: All results")
    status = page.locator('[aria-label="Filter: All results"] + .pager [role=status]')
    assert status.inner_text() == "120 rows; 1 to 50 shown"
    page.get_by_role("button", name="Next").click()
    assert status.inner_text() == "120 rows; 51 to 100 shown"
    tools.get_by_label("model").select_option("MobileNetV2")
    assert status.inner_text() == "58 of 120 rows; 1 to 50 shown" and set(column(page, "model")) == {"MobileNetV2"}
    tools.get_by_label("Rows with the words").fill("GRID=1 mobilenet")
    assert all("grid=1" in text for text in column(page, "setting")) and status.inner_text() == "11 of 120 rows"
    tools.get_by_label("Rows with the words").fill("no such words")
    assert status.inner_text() == "No row: 0 of 120 rows" and column(page, "model") == []
    tools.get_by_label("Rows with the words").fill("")
    tools.get_by_label("model").select_option("")
    tools.get_by_label("status").select_option("failed")
    assert column(page, "status") == ["failed"]


def test_without_scripts_everything_but_the_controls_is_there(open_page, small):
    page = open_page(small, java_script_enabled=False)
    assert results(page).locator("tbody tr").count() == 120
    assert results(page).locator("tbody tr").last.is_visible()
    assert not page.locator("#ui-bounds").is_visible() and not page.locator("#ui-plot").is_visible()
    assert "It has the smallest file" in page.locator("#ui-answer").inner_text()
    assert page.locator("noscript").first.is_visible()


def test_ten_thousand_cells_stay_usable(open_page, tmp_path):
    rows = many_rows(10_000)
    file = tmp_path / "report.html"
    file.write_text(report_html(replace(study(), rows=rows, changes=study().changes.iloc[:0]), {}), encoding="utf-8")
    page = open_page(file)
    assert page.evaluate("document.querySelectorAll('tr').length") < 200
    assert sum(draw(page)) < 2200
    assert "of 10000 configurations are drawn" in page.locator("#ui-plot-shown").inner_text()
    sort(page, "MB")
    assert column(page, "MB")[0] == "1.01"
    page.get_by_role("group", name="Filter: All results").get_by_label("Rows with the words").fill("grid=4999")
    assert len(column(page, "model")) == 2
    page.locator("#ui-largest_loss").fill("")
    page.locator("#ui-largest_worst_group_loss").fill("")
    assert "of the 10000 of 10000" in page.locator("#ui-answer").inner_text()


# ------------------------------------------------------------------------------------------------------- recommendation


def test_the_recommendation_follows_the_bounds_as_python_has_it(open_page, small):
    page = open_page(small)
    configs = small_study().configurations

    def told():
        return page.locator("#ui-recommended").inner_text()

    def expected(among, **bounds):
        found = recommend(among, Bounds(**bounds))
        if not found.order:
            return f"None of the {len(among)} finished configurations holds every bound."
        row = among.iloc[found.order[0]]
        return f"{model_label(row['model'])} at {row['setting']}"

    assert told() == expected(configs)
    answers = {told()}
    for name, value in (
        ("smallest_accuracy", 89.95), ("largest_loss", None), ("largest_worst_group_loss", None), ("largest_gap", 7.5),
        ("largest_size_mb", 1.5), ("smallest_accuracy", 0.0), ("largest_size_mb", 0.001),
    ):  # fmt: skip
        page.locator(f"#ui-{name}").fill("" if value is None else str(value))
        bounds = {key: None for key in Bounds().limits()} | {
            field: float(text)
            for field in report_page.FIELDS
            if (text := page.locator(f"#ui-{field}").input_value()) != ""
        }
        assert told() == expected(configs, **bounds), (name, value)
        answers.add(told())
    assert len(answers) >= 3
    page.get_by_role("button", name="Back to the study's bounds").click()
    page.locator("#ui-prefer").select_option("accuracy")
    assert told() == expected(configs, prefer="accuracy")
    page.locator("#ui-model").select_option("mobilenet_v2")
    of_model = configs[configs["model"] == "mobilenet_v2"].reset_index(drop=True)
    assert (
        told() == expected(of_model, prefer="accuracy") == "None of the 57 finished configurations holds every bound."
    )


def test_the_plot_marks_what_is_recommended_and_follows_its_axes(open_page, small):
    page = open_page(small)
    draw(page)
    ring = """(() => {
      const ring = document.getElementById("ui-plot").data.find(trace => trace.name === "recommended");
      return [ring.x[0], ring.y[0]];
    })()"""
    first = page.evaluate(ring)
    for loss in ("largest_loss", "largest_worst_group_loss"):
        page.locator(f"#ui-{loss}").fill("")
    page.locator("#ui-prefer").select_option("accuracy")
    page.locator("#ui-largest_size_mb").fill("1.5")
    page.locator("#ui-smallest_accuracy").fill("80")
    second = page.evaluate(ring)
    assert first[0] > 0 and first != second and second[0] <= 1.5
    page.locator("#ui-y").select_option("accuracy_gap")
    assert page.evaluate(ring)[1] == pytest.approx(7.0)
    assert page.locator("#ui-x option").count() == 1  # no latency was measured


def test_a_bound_that_is_no_number_is_none_and_shown_as_wrong(open_page, small):
    page = open_page(small)
    field = page.locator("#ui-largest_size_mb")
    field.press_sequentially("1e")
    assert (
        field.get_attribute("aria-invalid") == "true" and "file at most" not in page.locator("#ui-answer").inner_text()
    )
    field.fill("2")
    assert (
        field.get_attribute("aria-invalid") is None and "file at most 2 MB" in page.locator("#ui-answer").inner_text()
    )


def test_python_and_javascript_recommend_the_same_on_random_tables(browser):
    page = browser.new_page()
    page.add_script_tag(content=(report_page.FOLDER / "recommend.js").read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for _ in range(400):
        n = int(rng.integers(0, 12))
        # values on a coarse grid, so that ties and bounds met exactly are frequent; some missing
        values = np.round(rng.uniform(80, 84, size=(n, len(MEASURES))), int(rng.integers(0, 3)))
        values[rng.random(values.shape) < 0.15] = np.nan
        frame = pd.DataFrame(values, columns=list(MEASURES)).assign(is_fp32=rng.random(n) < 0.3)
        limits = [
            float(np.round(rng.choice([80, 81, 82, 83, 0.5, 1, 2]), 1)) if rng.random() < 0.4 else None
            for _ in range(6)
        ]
        bounds = Bounds(*limits, prefer=str(rng.choice(list(PREFERENCES))))
        cases.append({"rows": frame.to_dict("records"), "bounds": asdict(bounds)})
        expected.append(recommend(frame, bounds)._asdict())
    answers = page.evaluate(f"({report_page.to_json(cases)}).map(each => recommend(each.rows, each.bounds))")
    page.close()
    assert answers == expected
    assert len({len(each["order"]) for each in expected}) > 5 and any(each["reference"] for each in expected)


def test_the_front_drawn_is_the_non_dominated_set(browser):
    page = browser.new_page()
    page.add_script_tag(content=(report_page.FOLDER / "recommend.js").read_text(encoding="utf-8"))
    rng = np.random.default_rng(1)
    for case in range(60):
        points = rng.integers(0, 8, size=(int(rng.integers(0, 25)), 2)).astype(float)
        up = bool(case % 2)
        front = page.evaluate(f"paretoFront({points.tolist()}, {str(up).lower()})")
        assert sorted(front) == np.flatnonzero(pareto_mask(points, [False, up])).tolist()
    page.close()


# ------------------------------------------------------------------------------------------------------------- keyboard


def test_the_keyboard_reaches_everything_and_shows_where_it_is(open_page, small):
    page = open_page(small)
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    assert skip.evaluate("each => each === document.activeElement && each.getBoundingClientRect().top >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = []
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                """() => {
                  const each = document.activeElement;
                  const style = getComputedStyle(each);
                  const seen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
                  return [each.id || each.textContent.trim() || each.type || each.className, seen];
                }"""
            )
        )
        if reached[-1][0] == "Next":
            break
    names = [name for name, _ in reached]
    assert all(seen for _, seen in reached), [name for name, seen in reached if not seen]
    fields = [f"ui-{name}" for name in ("model", "prefer", *report_page.FIELDS, "reset", "x", "y")]
    assert [name for name in names if name in fields] == fields and names[-1] == "Next"


def test_tables_are_worked_by_the_keyboard(open_page, small):
    page = open_page(small)
    results(page).get_by_role("button", name="MB", exact=True).focus()
    page.keyboard.press("Enter")
    assert column(page, "MB")[0] == "0.0100"
    page.keyboard.press("Space")
    assert column(page, "MB")[0] == "94.0"
    page.get_by_role("button", name="Next").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the last page: Next is off, and the focus is not lost
    assert page.evaluate("document.activeElement.textContent") == "Previous"


def test_every_control_has_a_name_and_every_id_is_one_of_a_kind(open_page, small):
    page = open_page(small)
    draw(page)
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter(each => !each.labels.length).map(each => each.id)"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].filter(e => !e.closest('svg')).map(each => each.id)")
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(each => each.hash.slice(1))")
    assert nameless == [] and len(ids) == len(set(ids)) and set(targets) <= set(ids)
    assert page.locator("img:not([alt])").count() == 0 and page.locator("html").get_attribute("lang") == "en"
