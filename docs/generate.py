"""`make docs`, or `python -m docs.generate`: writes the pages of docs/ that follow from the code."""

from __future__ import annotations

from pathlib import Path

from docs import architecture, settings

FOLDER = Path(__file__).parent
PAGES = {"architecture.md": architecture.page, "settings.md": settings.page}
"""Name of a generated page -> what gives its text. tests/test_docs.py compares each with its file."""


def main() -> None:
    """Write all generated pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
