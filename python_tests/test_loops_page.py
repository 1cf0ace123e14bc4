"""The code of docs/loops.md and docs/processes.md runs, section by section."""

import pages
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig

import uasparse_kernels as ua

PAGE = [
    (heading, blocks)
    for page in ("docs/loops.md", "docs/processes.md")
    for heading, blocks in pages.sections(page)
    if blocks
]


def make_network():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 11))


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heading, blocks", PAGE, ids=[heading for heading, _ in PAGE])
def test_a_section_runs(heading, blocks, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if heading in ("DistributedDataParallel", "FSDP2"):
        request.getfixturevalue("one_process")
    x = torch.randn(96, 12)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    names = {
        "ua": ua,
        "torch": torch,
        "make_network": make_network,
        "loader": DataLoader(TensorDataset(x, torch.arange(96) % 11), batch_size=4),
        "quiet": quiet,
        "bert_config": BertConfig(vocab_size=30, **sizes),
        "dataset": [{"input_ids": torch.randint(30, (6,)), "labels": i % 2} for i in range(240)],
    }
    pages.run(blocks, names, tmp_path, {})
    if "topology" in names:
        assert names["topology"].frozen or names["topology"].steps == 0
