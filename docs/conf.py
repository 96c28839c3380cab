"""How Sphinx builds these pages: `make docs`."""

import re
from collections.abc import Iterator
from pathlib import Path

import equigrad

project = "equigrad"
author = "The equigrad developers"
release = version = equigrad.__version__
project_copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "**/README.*"]
html_theme = "furo"
html_title = "equigrad"
html_static_path = ["_static"]
html_css_files = ["equigrad.css"]
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]

# Docstrings write code in single backticks, as Markdown does; what is an object of the API becomes
# a link, and all else is shown as code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

intersphinx_mapping: dict[str, tuple[str, None]] = {}

sphinx_gallery_conf = {
    "examples_dirs": str(Path(__file__).parent.parent / "examples" / "gallery"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "min_reported_time": 1,
    "show_memory": False,
    "write_computation_times": False,
    "capture_repr": (),  # what a script prints, and no more
    "download_all_examples": False,
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
}

_SECTION = re.compile(r"(Args|Arguments|Attributes|Example|Examples|Raises|Returns|Yields|Note):$")


def _with_formulas(lines: list[str]) -> Iterator[str]:
    """A docstring whose indented formulas are literal blocks, as they would be in Markdown."""
    prose, formula = True, False
    for line in lines:
        prose = prose and not _SECTION.match(line)
        if line.strip():
            indented = prose and line.startswith("    ")
            if indented and not formula:
                yield from ("::", "")
            formula = indented
        yield line


def setup(app) -> None:
    """Register what reads docstrings as they are written."""

    def process(app, what, name, obj, options, lines: list[str]) -> None:
        lines[:] = list(_with_formulas(lines))

    def skip(app, what, name, obj, skip, options) -> bool | None:
        """Leave out what scikit-learn adds to every estimator for routing metadata."""
        return True if re.fullmatch(r"set_\w+_request", name) else None

    def gallery(app, name, content: list[str]) -> None:
        """The gallery's scripts in the repository are its pages here."""
        content[0] = content[0].replace("](../examples/gallery/README.rst)", "](gallery/index.rst)")

    app.connect("source-read", gallery)
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
