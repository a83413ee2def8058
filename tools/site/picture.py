"""Take the picture of a page that the home page shows, from docs/ as it stands.

    python tools/site/picture.py [PAGE] [SECTION]      default: sequence/01_cells, its first section

Needs Chromium. The picture goes to nbs/images/page.png; build the site again afterwards.
"""

import io
import shutil
import sys
import threading

import serve
from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1280, 860


def main(name: str = "sequence/01_cells", section: str = "") -> None:
    with serve.server(0) as here, sync_playwright() as playwright:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light"
        )
        page.goto(f"http://127.0.0.1:{here.server_port}/{name}.html")
        page.wait_for_timeout(2500)
        page.evaluate(
            "id => id && window.scrollTo(0, document.getElementById(id).getBoundingClientRect().top - 70)",
            section,
        )
        page.wait_for_timeout(500)
        shot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
        here.shutdown()
    target = serve.DOCS.parent / "nbs" / "images" / "page.png"
    target.parent.mkdir(exist_ok=True)
    shot.convert("RGB").quantize(160, dither=Image.Dither.NONE).save(
        target, optimize=True
    )
    print(
        f"{target.relative_to(serve.DOCS.parent)}: {target.stat().st_size / 1000:.0f} KB"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
