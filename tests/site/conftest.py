"""A real browser on the committed site. A reader without Chromium skips these tests;
continuous integration fails without."""

import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools" / "site")]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
).split()
DESK = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def address():
    """The site, served on this machine."""
    import serve

    with serve.server(0) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{here.server_port}/"
        here.shutdown()


@pytest.fixture(scope="session")
def browser():
    chromium = (
        shutil.which("chromium-headless-shell")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not chromium:
        reason = "no Chromium here (Debian: apt-get install chromium-headless-shell)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def by_day(browser):
    """On a desk, by day: one for all pages that nothing is chosen on, which keeps the
    site's scripts from page to page, as a reader's browser does."""
    with browser.new_context(viewport=DESK, color_scheme="light") as context:
        yield context


@pytest.fixture
def open_page(browser, address):
    """Open a page of the site: open_page(name, width, theme), in a context of its own
    or in the one that is given. What goes wrong on it is collected in page.problems."""
    opened = []

    def open_page(name, width=1280, theme="light", context=None):
        if context is None:
            size = DESK | {"width": width}
            context = browser.new_context(viewport=size, color_scheme=theme)
            opened.append(context)
        page = context.new_page()
        opened.append(page)
        page.problems = []
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and page.problems.append(f"console: {message.text}")
            ),
        )
        page.on("pageerror", lambda error: page.problems.append(f"script: {error}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:", "blob:"))
                or page.problems.append(f"leaves: {request.url}")
            ),
        )
        page.on(
            "response",
            lambda response: (
                response.status >= 400
                and page.problems.append(f"{response.status}: {response.url}")
            ),
        )
        page.goto(address + name, wait_until="load")
        page.wait_for_function(
            "!window.MathJax || !window.MathJax.startup || "
            "window.MathJax.startup.document && MathJax.startup.promise.then(() => "
            "true)"
        )
        return page

    yield open_page
    for one in reversed(opened):
        one.close()
