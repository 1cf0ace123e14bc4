"""The code of the documentation runs, in the order of each page, and prints what the page shows."""

import logging
import os
import re
import shlex
import tomllib

import pages
import pytest
import torch

import uasparse_kernels as ua
from uasparse_kernels import _library, ops, topology, unknowns
from uasparse_kernels.nn import registry

DOCS = sorted(path.relative_to(pages.ROOT).as_posix() for path in (pages.ROOT / "docs").rglob("*.md"))
# Pages whose code needs names or a surrounding of their own, and the tests that give it.
ELSEWHERE = {
    "docs/loops.md": "test_loops_page.py",
    "docs/processes.md": "test_loops_page.py",
    "docs/pretrained.md": "test_pretrained_page.py",
    "docs/serving.md": "test_inference_engines.py",
    "docs/methods.md": "test_methods.py",
}
PYTHON = [page for page in DOCS if page not in ELSEWHERE and "```python" in (pages.ROOT / page).read_text()]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="pages show the compiled part"),
]


@pytest.fixture(autouse=True)
def log_level():
    """What pages set stays with them."""
    logger = logging.getLogger("uasparse_kernels")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def registry_as_it_was():
    """Pages register layers, which other tests are not to know."""
    kinds = dict(registry._KINDS)
    yield
    registry._KINDS.clear()
    registry._KINDS.update(kinds)


def words(text):
    """A text without its digits, rules, spaces and line breaks."""
    return " ".join(re.sub(r"\d[\d.,]*", "#", re.sub(r"[=-]{3,}", "", text)).split())


@pytest.mark.usefixtures("registry_as_it_was")
@pytest.mark.parametrize("page", PYTHON)
def test_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "page"}, ""
    for _, blocks in pages.sections(page):
        for language, code in blocks:
            if language == "python":
                capsys.readouterr()
                pages.run([(language, code)], names, tmp_path, None)
                printed = capsys.readouterr().out
            elif language == "text" and printed:
                parts = [re.escape(words(part)) for part in re.split(r"^\.\.\.$", code, flags=re.MULTILINE)]
                assert re.fullmatch(".*".join(parts), words(printed)), f"{page} shows\n{code}but prints\n{printed}"


@pytest.mark.parametrize("page", ELSEWHERE)
def test_other_pages_have_a_test(page):
    assert page in (pages.ROOT / "python_tests" / ELSEWHERE[page]).read_text()


COMMANDS = [
    (page, line)
    for page in ("README.md", *DOCS)
    for _, blocks in pages.sections(page)
    for language, code in blocks
    if language == "sh" and page != "docs/serving.md"  # which runs its own
    for line in code.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("page, line", COMMANDS)
def test_a_command_exists(page, line, monkeypatch, capsys):
    """make has the target, pip the extras, a program the options (which it parses before it prints its help)."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        makefile = (pages.ROOT / "Makefile").read_text()
        targets = [argument for argument in arguments if "=" not in argument]
        assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif program == "pip":
        project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
        wanted = ",".join(re.findall(r"\.\[(.*?)\]", line)).split(",") if "[" in line else []
        assert arguments[0] == "install" and set(wanted) <= project["optional-dependencies"].keys()
        assert "--no-build-isolation" in arguments or not wanted  # else the build is for pip's torch, not the user's
    else:
        assert (program, arguments[0]) == ("python", "-m"), f"{page}: {line}"
        help_of(arguments[1], arguments[2:], monkeypatch, capsys)


def help_of(module, arguments, monkeypatch, capsys):
    if module == "uasparse_kernels":
        assert not arguments
        return
    monkeypatch.setenv("COLUMNS", "200")
    if module == "training":
        pytest.importorskip("pytorch_ood")
        from uasparse_kernels.training.__main__ import app as program
    else:
        assert module == "benchmarks"
        import typer

        from benchmarks.__main__ import SUITES, main

        assert {a for a in arguments if not a.startswith("-") and os.sep not in a} <= SUITES.keys()
        program = typer.Typer()
        program.command()(main)
    with pytest.raises(SystemExit) as stop:
        program([a for a in arguments if a != "--help"] + ["--help"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_the_api_page_has_every_public_name():
    page = (pages.ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"^::: [\w.]*?(\w+)$", page, re.MULTILINE))
    modules = {"inference", "nn", "ops", "topology", "unknowns", "METHODS"}
    references = {name for name in ops.__all__ if name.endswith("_reference")}
    public = {*ua.__all__, *ua.nn.__all__, *ops.__all__, *topology.__all__, *ua.inference.__all__}
    public |= {*unknowns.__all__}
    assert public - modules - references - {"SparseLayer"} <= shown


def test_every_page_is_in_the_navigation():
    navigation = (pages.ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert {page.removeprefix("docs/") for page in DOCS} <= set(re.findall(r"[\w/-]+\.md", navigation))


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(8, 12), torch.arange(8)
    names = {"torch": torch, "epochs": 6, "loader": [(x, y)] * 2, "x": x}
    names["model"] = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 11))
    blocks = [block for _, blocks in pages.sections("README.md") for block in blocks if block[0] == "python"]
    pages.run(blocks, names, tmp_path, None)
    assert names["loss_fn"].steps == names["topology"].steps == 12
