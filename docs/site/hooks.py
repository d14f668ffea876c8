"""What the site has besides the pages in docs/: README as its start, the studies, the references, the changes.

Read by mkdocs (`hooks` in mkdocs.yml). References are made from what they describe: the parsers and the docstrings.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import flowback
from flowback.cli import VERBS, build_parser

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "flowback"
PACKAGES = sorted({file.parent.name for file in SOURCE.glob("*/__init__.py")} - {"cli", "studio"})  # each with a page


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {
        "index.md": beside_docs("README.md"),
        "changelog.md": beside_docs("CHANGELOG.md"),
        "contributing.md": beside_docs("CONTRIBUTING.md"),
        "reference/cli.md": command_line(),
        "reference/python/index.md": public_names(),
    }
    pages |= {f"reference/python/{package}.md": modules(package) for package in PACKAGES}
    for file in sorted((ROOT / "studies").glob("*/*.md")):
        pages[file.relative_to(ROOT).as_posix()] = file.read_text("utf-8").replace("](../../docs/", "](../../")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted((ROOT / "studies").glob("*/*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """In the repository the studies lie beside docs/, on the site below it."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../studies/", "](studies/")


def beside_docs(name: str) -> str:
    """A page that lies beside docs/ in the repository, and on the site among its pages."""
    text = (ROOT / name).read_text("utf-8").replace("](docs/", "](").replace("](README.md", "](index.md")
    return text.replace("](CHANGELOG.md", "](changelog.md").replace("](CONTRIBUTING.md", "](contributing.md")


def command_line() -> str:
    """The help of every command."""
    parts = ["# Command line", "The same as `flowback COMMAND --help` prints.", ""]
    for verb, (_, summary) in VERBS.items():
        _, commands = build_parser(verb)
        help_text = re.sub(r"\x1b\[[0-9;]*m", "", commands[verb][0].format_help())
        parts += [f"## {verb}", "", summary, "", "```text", help_text.strip(), "```", ""]
    return "\n".join(parts)


def public_names() -> str:
    """A line for each name that `import flowback` offers."""
    lines = ["# Python", "", "What `import flowback` offers; the pages beside this one have every module.", ""]
    for name in sorted(set(flowback.__all__) - {"__version__"}):
        found = getattr(flowback, name)
        summary = (found.__doc__ or "").strip().split("\n")[0]
        lines.append(f"- [`flowback.{name}`][{found.__module__}.{found.__qualname__}]: {summary}")
    return "\n".join([*lines, "", "::: flowback.encoders", ""])


def modules(package: str) -> str:
    """Every module of a package."""
    found = sorted(file.stem for file in (SOURCE / package).glob("[!_]*.py"))
    entries = (f"::: flowback.{package}.{name}\n    options:\n      show_root_full_path: true\n" for name in found)
    return "\n".join([f"# flowback.{package}", "", *entries])
