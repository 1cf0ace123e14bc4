"""Code blocks of the documentation, which tests run as they stand."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sections(page):
    """(heading, [(language, code), ...]) of a Markdown page, in order; "" for what comes before the first heading."""
    found, blocks, heading = [], [], ""
    pattern = re.compile(
        r"^#{1,6} (?P<heading>[^\n]+)$|^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
    )
    for match in pattern.finditer((ROOT / page).read_text()):
        if match["heading"]:
            found.append((heading, blocks))
            heading, blocks = match["heading"], []
        else:
            blocks.append((match["language"], match["code"]))
    return [*found, (heading, blocks)]


def run(blocks, namespace, folder, environment):
    """Runs Python and sh blocks one after the other; the process has to be in `folder`."""
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "<page>", "exec"), namespace)
        elif language == "sh":
            done = subprocess.run(["sh", "-e", "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            raise AssertionError(f"Expected blocks of python or sh, got {language}.")
