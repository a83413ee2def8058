"""The committed pages in a real browser: what a reader would see and do, on a desk and
on a phone, by day and by night."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from book import ROOT, notebook_paths, read_book

DOCS = ROOT / "docs"
PAGES = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.html"))
CHAPTERS = [f"{n.name}.html" for n in read_book()]
THEMES = ["light", "dark"]
WIDTHS = [1280, 390]


class Links(HTMLParser):
    """The links, images, scripts and ids of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or name == "name" and tag == "a":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def pages():
    return {page: Links(DOCS / page) for page in PAGES}


def test_links_and_anchors(pages):
    """Every link inside the site leads to a file, every anchor to an element."""
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            if urlparse(target).scheme or target.startswith("//"):
                continue
            path, anchor = urldefrag(unquote(urljoin(f"/{page}", target)))
            path = urlparse(path).path.lstrip("/") or "index.html"
            if not (DOCS / path).is_file():
                broken.append(f"{page}: {target} is not there")
            elif anchor and path in pages and anchor not in pages[path].ids:
                broken.append(f"{page}: {target} has no such anchor")
    assert not broken, "\n".join(broken)


def test_no_page_asks_another_machine(pages):
    """Scripts, styles and pictures come from the site; links out go to papers and
    notes, never to a repository that is not there."""
    import configparser

    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert not list(DOCS.rglob("*.map"))
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for tag in (
            '<script src="http',
            '<link rel="stylesheet" href="http',
            '<img src="http',
            "@import url(http",
        ):
            assert tag not in text, f"{page}: {tag}"
        if not settings["DEFAULT"].get("git_url"):
            assert "colab.research.google.com" not in text, page


def test_size():
    assert sum(p.stat().st_size for p in DOCS.rglob("*") if p.is_file()) < 42e6
    assert not list(DOCS.rglob("*.doctree")) and not (DOCS / ".doctrees").exists()


# resolved behind the second frame from now: one is laid out and drawn in between
DRAWN = """() => new Promise(done =>
    requestAnimationFrame(() => requestAnimationFrame(done)))"""


def overflow(page) -> list[str]:
    """What sticks out of the page to the right."""
    return page.evaluate("""() => {
        const W = document.documentElement.clientWidth;
        if (document.documentElement.scrollWidth <= W) return [];
        return [...document.querySelectorAll('main *')]
            .filter(e => e.getBoundingClientRect().right > W + 1)
            .map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 60)}`)
            .slice(0, 5);
    }""") or (
        []
        if page.evaluate(
            "document.documentElement.scrollWidth <= "
            "document.documentElement.clientWidth"
        )
        else ["the page scrolls sideways"]
    )


@pytest.mark.parametrize("name", PAGES)
def test_page(name, open_page, by_day):
    """Nothing fails to load, nothing is reported, formulas and pictures are drawn, and
    nothing sticks out at either width."""
    page = open_page(name, context=by_day)
    formulas = page.evaluate("document.querySelectorAll('.math').length")
    if formulas:
        page.wait_for_function(
            "document.querySelectorAll('.math mjx-container svg').length >= "
            "document.querySelectorAll('.math').length"
        )
    assert (
        page.evaluate(
            "document.querySelectorAll('mjx-container [data-mjx-error], "
            "mjx-merror').length"
        )
        == 0
    )
    unloaded = page.evaluate("""async () => {
        const images = [...document.images];
        images.forEach(i => { i.loading = 'eager'; });
        await Promise.allSettled(images.map(i => i.decode()));
        return images.filter(i => !i.complete || !i.naturalWidth).map(i => i.src);
    }""")
    assert not unloaded
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 844})
        page.evaluate(DRAWN)
        assert not overflow(page), f"at {width} px"
    assert not page.problems, "\n".join(page.problems)


def luminance(colour: str) -> float:
    red, green, blue = (
        float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]
    )
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(
    "name", [CHAPTERS[0], "claims.html", "models.html", "search.html"]
)
def test_theme(name, theme, open_page):
    """Text and page are dark on light or light on dark, with contrast; pictures stand
    on a light card either way."""
    page = open_page(name, theme=theme)
    ink, paper = page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.color, "
        "s.backgroundColor]; })()"
    )
    difference = luminance(paper) - luminance(ink)
    assert difference > 0.6 if theme == "light" else difference < -0.6
    for card in page.evaluate(
        "[...document.querySelectorAll('.cell_output img')].map(i => "
        "getComputedStyle(i).backgroundColor)"
    ):
        assert card.endswith(", 0)"), card
    for code in page.evaluate(
        "[...document.querySelectorAll('.highlight')].slice(0, 5).map(e => "
        "getComputedStyle(e).backgroundColor)"
    ):
        assert (
            luminance(code) > 0.9
            if theme == "light"
            else luminance(code) < 0.2 or code.endswith(", 0)")
        )


@pytest.mark.parametrize("theme", THEMES)
def test_theme_is_chosen_and_kept(theme, open_page):
    """The reader's choice wins over the system's, and the next page remembers it."""
    page = open_page("index.html", theme="light" if theme == "dark" else "dark")
    page.click(".theme-switch-button >> visible=true")
    page.click(f'.theme-change-button[data-mode="{theme}"] >> visible=true')
    page.goto(page.url.replace("index", "claims"))
    assert page.evaluate("document.documentElement.dataset.theme") == theme


@pytest.mark.parametrize("words", ["attention", "梯度", "梯度消失"])
def test_search_finds(words, open_page, address):
    """An English and a Chinese word of the book are found, and the result leads to a
    page that has it."""
    page = open_page("search.html?q=" + words)
    page.wait_for_selector("ul.search li a", timeout=20_000)
    target = page.get_attribute("ul.search li a >> nth=0", "href")
    assert not page.problems
    page.goto(urljoin(address + "search.html", target))
    assert words.lower() in page.inner_text("main").lower()


def test_search_from_a_page(open_page):
    """The search field of a chapter leads to results."""
    page = open_page(CHAPTERS[0])
    page.keyboard.press("Control+k")
    page.fill("#pst-search-dialog input", "softmax")
    page.keyboard.press("Enter")
    page.wait_for_selector("ul.search li a", timeout=20_000)


def test_a_chapter_has_its_parts(open_page):
    """Sidebar by part, previous and next, copy buttons, download of the notebook, links
    from code to the reference and back."""
    page = open_page("sequence/01_cells.html")
    assert page.locator(".bd-sidebar-primary p.caption").count() >= 4
    assert page.locator(".prev-next-area a").count() == 2
    assert page.locator(".copybtn").count() > 3
    assert page.locator('a[href$="_sources/sequence/01_cells.ipynb"]').count() >= 1
    assert page.locator(".cell-strip.claim .verdict").count() >= 9
    link = page.locator("a.code-link").first.get_attribute("href")
    page.goto(urljoin(page.url, link))
    assert page.locator(f"[id='{link.split('#')[1]}']").count() == 1
    back = page.locator(".api-defined a").first.get_attribute("href")
    page.goto(urljoin(page.url, back))
    assert page.locator(f"[id='{back.split('#')[1]}']").count() == 1


def test_the_reference_leads_back_to_the_book(open_page):
    """A page of the reference lists the modules beside it, and the ways home and to the
    workshop; what it offers to download is there."""
    page = open_page("api/data.boxes.html")
    shown = page.locator(".bd-sidebar-primary .toctree-l1 a")
    targets = shown.evaluate_all(
        "links => links.map(link => link.getAttribute('href'))"
    )
    assert {"../index.html", "../workshop.html", "../claims.html"} < {*targets}
    assert "data.coco.html" in targets
    assert not any("sequence/" in target for target in targets)
    current = page.locator(".bd-sidebar-primary .current")
    assert current.all_inner_texts() == ["boxes"]
    assert page.locator('a[href*="_sources"]').count() == 0
    shown.first.click()
    page.wait_for_url("**/index.html")


@pytest.mark.parametrize("path", notebook_paths(ROOT / "nbs"), ids=lambda p: p.stem)
def test_download_is_the_notebook(path):
    """But for the outputs, which a reader who runs it makes."""
    target = DOCS / "_sources" / path.relative_to(ROOT / "nbs")
    got, want = (json.loads(p.read_text(encoding="utf-8")) for p in (target, path))
    for cell in want["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    assert got == want


def test_only_notebooks_are_downloaded():
    assert {p.suffix for p in (DOCS / "_sources").rglob("*.*")} == {".ipynb"}
