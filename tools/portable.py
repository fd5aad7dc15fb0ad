"""Helpers of the site: `show_doc` with parameter tables, portable Markdown made into Quarto's own.

Only the site needs them (`renderer` and `procs` in settings.ini): they are no part of the library.
"""

import html
import re
from inspect import Parameter, formatannotation, getsourcelines

from fastcore.docments import MarkdownRenderer, docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import exec_show_docs

# `show_doc` ---------------------------------------------------------------------------------------


def _given(o):
    return o is not None and o is not Parameter.empty


def _code(text):
    return "<code>" + html.escape(text).replace("|", "&#124;") + "</code>"


def _type(o):
    "Without the modules: `Tensor`, not `torch.Tensor`"
    text = o if isinstance(o, str) else formatannotation(o) if _given(o) else ""
    return _code(re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)) if text else ""


def _row(name, doc):
    "One parameter as a row; a pipe in a type such as `int | None` must not end its column"
    returns = name == "return"
    default = _code(repr(doc["default"])) if not returns and _given(doc.get("default")) else ""
    words = (doc.get("docment") or "").replace("\n", " ").replace("|", "&#124;")
    return (
        f"| {'**returns**' if returns else _code(name)} | {_type(doc.get('anno'))} | {default} |"
        f" {words} |"
    )


def parameters(symbol):
    "The table of documented parameters, or nothing when none is documented"
    try:
        docs = {k: v for k, v in docments(symbol, full=True).items() if k not in ("self", "cls")}
    except Exception:  # a constant, a built-in: there is nothing to tell
        return ""
    if not any(v.get("docment") for v in docs.values()):
        return ""
    rows = [
        _row(k, v)
        for k, v in docs.items()
        if k != "return" or v.get("docment") or _given(v.get("anno"))
    ]
    return "\n".join(["| | Type | Default | Details |", "|---|---|---|---|", *rows])


def source_link(name, symbol):
    "Where the forge shows the source of `symbol`"
    link = (NbdevLookup().code(name) or "").partition("#")[0]
    try:
        return f"{link}#L{getsourcelines(symbol)[1]}" if link else ""
    except (OSError, TypeError):  # no function or class
        return link


class TableRenderer(MarkdownRenderer):
    """`show_doc` with a link to the source that looks well in every front end,
    and the table of parameters"""

    def _repr_markdown_(self):
        source = source_link(self.fn, self.sym)
        link = (
            f'<a class="nb-source" href="{source}" target="_blank" rel="noopener">source</a>'
            if source
            else ""
        )
        parts = [
            "---",
            link,
            f"{'#' * self.title_level} {self.nm}",
            super()._repr_markdown_(),
            parameters(self.sym),
        ]
        return "\n\n".join(p for p in parts if p)


class ShowDocs(exec_show_docs):
    """Runs the `show_doc` cells against the exported module;
    nbdev's own runs the lesson's imports and definitions again"""

    def begin(self):
        super().begin()
        config = get_config()
        source = (config.nbs_path / self.nb.path_).read_text(encoding="utf-8")
        module = re.search(r"#\| *default_exp +([\w.]+)", source)
        if self.nb.has_docs_ and module:
            self.k.run_cell(f"from {config.lib_path.name}.{module[1]} import *")
        self.links = NbdevLookup()

    def __call__(self, cell):
        if cell.cell_type == "code" and re.search(r"^show_doc\(", cell.source, re.M):
            self.k.cell(cell)
            if self.k.exc:
                raise ValueError(
                    f"{self.nb.path_}: {cell.source} failed; is the package what the notebooks"
                    " export?"
                ) from self.k.exc
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = [
                        self.links.link_line(s) for s in output["data"]["text/markdown"]
                    ]

    def end(self):
        "No widget state: saved pages hold static widgets"


# Portable Markdown --------------------------------------------------------------------------------

KINDS = {"note", "tip", "important", "warning", "caution"}
CALLOUT = re.compile(
    r"^> \*\*(Note|Tip|Important|Warning|Caution|Exercise|Key idea)[:.]\*\*[ ]?((?:.*)(?:\n>.*)*)",
    re.M,
)


def callouts(text, made):
    """Block quotes that begin with `**Note:**` and the like become what `made(kind,
    title, body)` returns"""

    def replace(m):
        kind = m[1].lower()
        return made(kind if kind in KINDS else None, m[1], re.sub(r"^> ?", "", m[2], flags=re.M))

    return CALLOUT.sub(replace, text)


def lower_anchors(text):
    "JupyterLab keeps capitals in the anchors of headings, the sites do not"
    return re.sub(
        r"(\]\((?:[^)\s]+\.ipynb)?)(#[^)\s]+)\)", lambda m: m[1] + m[2].lower() + ")", text
    )


def _quarto_callout(kind, title, body):
    head = f".callout-{kind}" if kind else f'.callout-note title="{title}"'
    return f"::: {{{head}}}\n{body}\n:::\n"


def to_quarto(cell):
    "Processor for `nbdev_docs`"
    if cell.cell_type == "markdown" and cell.source:
        cell.source = re.sub(
            r"^```mermaid$",
            "```{mermaid}",
            lower_anchors(callouts(cell.source, _quarto_callout)),
            flags=re.M,
        )
