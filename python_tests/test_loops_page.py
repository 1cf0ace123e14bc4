"""The code of docs/loops.md and docs/processes.md runs, section by section, each after the page's first lines."""

import pages
import pytest
import torch.distributed as dist

PAGES = {
    page: [(heading, blocks) for heading, blocks in pages.sections(page) if blocks]
    for page in ("docs/loops.md", "docs/processes.md")
}
SECTIONS = [(page, heading) for page, (_, *sections) in PAGES.items() for heading, _ in sections]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page, heading", SECTIONS, ids=[heading for _, heading in SECTIONS])
def test_a_section_runs(page, heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        if page == "docs/processes.md":  # as torchrun says to a single process
            monkeypatch.setenv(name, value)
    (_, first), *sections = PAGES[page]
    names = {}
    try:
        pages.run([*first, *dict(sections)[heading]], names, tmp_path, {})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if "topology" in names:
        assert names["topology"].frozen or names["topology"].steps == 0
