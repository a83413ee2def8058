"""Sphinx configuration of the site. build.py stages the pages and runs Sphinx with this
file."""

import configparser
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

settings = configparser.ConfigParser()
settings.read(HERE.parents[1] / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
version = release = settings["version"]
language = "en"
root_doc = "index"
exclude_patterns = ["artifacts"]

extensions = ["myst_nb", "sphinx_copybutton", "sphinx.ext.mathjax", "attn_site"]

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["alert", "amsmath", "dollarmath", "attrs_inline", "deflist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["mystnb.unknown_mime_type"]
numfig = True
math_numfig = False
math_eqref_format = "({number})"
copybutton_selector = (
    "div.cell_input div.highlight pre, article div.highlight-python > div.highlight "
    "pre, article div.highlight-bash > div.highlight pre"
)

html_theme = "sphinx_book_theme"
html_title = project
templates_path = [str(HERE / "templates")]
html_static_path = [str(HERE / "static")]
html_css_files = ["book.css"]
html_favicon = str(HERE / "static" / "favicon.svg")
html_context = {"default_mode": "auto"}
mathjax_path = "tex-svg.js"
mathjax3_config = {"svg": {"fontCache": "global"}, "options": {"enableMenu": False}}
html_copy_source = True
html_sourcelink_suffix = ""
html_show_sphinx = False
html_show_copyright = False
html_last_updated_fmt = None
html_permalinks_icon = "§"
html_use_index = False
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "max_navbar_depth": 2,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "collapse_navbar": True,  # the sidebar opens the chapter of the page alone
    "toc_title": "On this page",
    "footer_content_items": [],
    "navbar_persistent": [],
    "path_to_docs": settings["nbs_path"],
}
if settings.get("git_url"):  # only a project that has an address links to it
    html_theme_options |= {
        "repository_url": settings["git_url"],
        "repository_branch": settings["branch"],
        "use_repository_button": True,
        "use_source_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }
html_sidebars = {
    "**": ["navbar-logo.html", "search-button-field.html", "sbt-sidebar-nav.html"]
}
