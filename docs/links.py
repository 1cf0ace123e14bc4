"""Makes of the pages a site: hooks of mkdocs.

Pages link to files outside of docs/ (results, plots, sources) by relative paths, as they are read in the repository.
These files are copied into the site, and the links follow. Docstrings have Sphinx's roles and ``::``, which Markdown
does not know.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # pages of the site that lie beside docs/


def on_files(files, config):
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in OUTSIDE:
        return markdown.replace("](docs/", "](")
    folder = posixpath.dirname(page.file.src_uri)

    def follow(match):
        path = posixpath.normpath(posixpath.join("docs", folder, match["path"]))
        if path.startswith(("docs/", "..")) or not (ROOT / path).is_file():
            return match[0]
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return f"]({posixpath.relpath(path, folder or '.')})"

    return re.sub(r"\]\((?P<path>\.\./[^)#]+)\)", follow, markdown)


def on_page_content(html, page, config, files):
    html = re.sub(r":(?:func|class|meth|mod|attr):<code>", "<code>", html)
    return html.replace("::</p>", ":</p>")
