"Sphinx's settings; all names come from settings.ini"

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent / "tools"))

import vendor  # noqa: E402
from nbdev.config import get_config  # noqa: E402

config = get_config(path=here.parent)
project, author, version, copyright = config.title, config.author, config.version, config.copyright
extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design", "nb2myst"]
exclude_patterns = ["_*", "**/.*", "**/_*", "*.yml", "**.ipynb_checkpoints"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}
templates_path = []

# Notebooks: outputs are in the files; HTML comes before pictures, live widgets are left to
# JupyterLab
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None),
    ("html", "text/html", 0),
    ("html", "text/markdown", 5),
]
myst_enable_extensions = [
    "alert",
    "amsmath",
    "attrs_block",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
    "html_image",
    "strikethrough",
    "tasklist",
]
myst_heading_anchors = 4
myst_heading_slug_func = "nb2myst.slug"
myst_dmath_double_inline = True


def script(name):
    "The copy beside the site, if `vendor.py` could fetch one"
    return f"vendor/{name}" if vendor.ready() else vendor.cdn(name)


mathjax_path = script("tex-svg.js")
mathjax_options = dict(defer="defer") | vendor.attributes("tex-svg.js")
mermaid_js = script("mermaid.min.js")

html_theme = "sphinx_book_theme"
html_title = config.title
html_static_path = [str(here / "_static")]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = dict(
    repository_url=config.git_url,
    repository_branch=config.branch,
    path_to_docs=config.nbs_path.name,
    use_repository_button=True,
    use_source_button=True,
    use_edit_page_button=False,
    use_download_button=False,
    home_page_in_toc=True,
    navbar_persistent=[],
    show_navbar_depth=1,
    show_toc_level=2,
    navigation_with_keys=True,
    launch_buttons=dict(
        colab_url="https://colab.research.google.com", notebook_interface="jupyterlab"
    ),
    pygments_light_style="github-light",
    pygments_dark_style="github-dark",
)
