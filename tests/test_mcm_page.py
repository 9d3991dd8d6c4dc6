"""The report in a real browser, as a person reads it: bright and dark, on a wide and on a narrow screen."""

import shutil

import pytest
from test_mcm_report import runs  # noqa: F401 (a fixture)

from mcm.report import report

pytestmark = pytest.mark.slow

# The luminance contrast (WCAG 2) of every element with a text of its own against what lies behind it.
CONTRAST = """() => {
  const light = rgb => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    const color = element ? getComputedStyle(element).backgroundColor : "rgb(255, 255, 255)";
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color;
  };
  const own = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  document.querySelectorAll("details").forEach(details => details.open = true);
  const texts = [...document.querySelectorAll("body, body *")].filter(own);
  return texts.filter(element => element.tagName !== "SCRIPT").map(element => {
    const [x, y] = [getComputedStyle(element).color, behind(element)].map(light);
    return [(Math.max(x, y) + .05) / (Math.min(x, y) + .05), element.tagName];
  });
}"""
# Elements that reach beyond the right border of the screen, but not inside a box that scrolls.
BEYOND = """() => [...document.querySelectorAll("body *")]
  .filter(element => !element.closest(".box, pre") && element.getBoundingClientRect().right > innerWidth + 1)
  .map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium or google-chrome")
    with playwright.sync_playwright() as engine:
        yield engine.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def shown(browser, runs, tmp_path):  # noqa: F811
    """Opens the report; anything that the browser reports or requests beyond the file fails the test."""
    report(runs, tmp_path / "r.html", note="a note")
    seen, pages = [], []

    def show(width, scheme):
        pages.append(browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme))
        pages[-1].on("console", lambda message: seen.append(message.text))
        pages[-1].on("pageerror", lambda error: seen.append(str(error)))
        pages[-1].on("request", lambda request: seen.append(request.url[:80]))
        pages[-1].goto((tmp_path / "r.html").as_uri())
        return pages[-1]

    yield show
    loaded = {address for address in seen if not address.startswith("data:image/")}
    assert loaded == {(tmp_path / "r.html").as_uri()}
    for page in pages:
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_everything_is_visible_and_readable(shown, width, scheme):
    page = shown(width, scheme)
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 50 and {"TD", "BUTTON", "FIGCAPTION", "A", "PRE"} <= {tag for _, tag in contrasts}
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    assert page.evaluate("document.documentElement.scrollWidth") <= width and page.evaluate(BEYOND) == []
    images = "[...document.images].map(i => [i.alt, i.naturalWidth, i.clientWidth, i.clientHeight])"
    found = page.evaluate(images)
    assert len(found) == 15 and all(alt and decoded and min(shown) >= 100 for alt, decoded, *shown in found)
    dark_backs = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark_backs == (scheme == "dark")


def test_a_table_sorts_by_each_column_and_is_copied(shown):
    page = shown(1280, "light")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    figure = page.locator("figure.table").first

    def models():
        return figure.locator("td:first-child").all_inner_texts()

    assert models() == ["random init", "mcm", "teacher cache"]
    for column, orders in {
        "k-NN full": (["teacher cache", "mcm", "random init"], ["random init", "mcm", "teacher cache"]),
        "fine-tuned": (["mcm", "random init", "teacher cache"], ["random init", "mcm", "teacher cache"]),
    }.items():
        for order, direction in zip(orders, ("descending", "ascending"), strict=True):
            figure.get_by_role("button", name=column, exact=True).click()
            assert models() == order  # a missing value is last in both directions
            assert figure.locator(f"th[aria-sort={direction}]").all_inner_texts() == [column]
    figure.get_by_role("button", name="copy as TSV").click()
    figure.get_by_role("button", name="copied").wait_for()
    head, *lines = page.evaluate("navigator.clipboard.readText()").split("\n")
    assert head.split("\t")[:3] == ["model", "k-NN full", "linear full"]
    assert [line.split("\t")[0] for line in lines] == models() and lines[1].split("\t")[1] == "72.0"
