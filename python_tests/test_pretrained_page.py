"""The code of docs/pretrained.md runs, from the top of the page to its end."""

import pages


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = [block for _, blocks in pages.sections("docs/pretrained.md") for block in blocks]
    shown = [code for language, code in blocks if language == "text"]
    pages.run([block for block in blocks if block[0] == "python"], {}, tmp_path, None)
    # What the page shows of the summary, but for the rows, whose densities are of random weights.
    printed = capsys.readouterr().out.splitlines()
    (table,) = shown
    lines = [line for line in table.splitlines() if line.startswith(("Layer", "Other"))]
    assert len(lines) == 2 and set(lines) <= set(printed)
