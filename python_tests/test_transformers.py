"""The callback for Hugging Face's Trainer, its files of sparse models, LoRA on a sparse base, and Accelerate's loop."""

import copy
import os

import processes
import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import uasparse_kernels as ua
from uasparse_kernels.integrations.peft import with_sparse_layers
from uasparse_kernels.integrations.transformers import DynamicSparsityCallback, from_pretrained

pytestmark = pytest.mark.filterwarnings("ignore")
transformers.utils.logging.disable_progress_bar()
METHODS = [("rigl", 0.8), ("set", 0.8), ("granet", 0.3)]
STEPS, BATCH = 8, 4


def bert(sparsity=0.8, seed=1, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, **sizes, **drops))
    return ua.sparsify(model, sparsity, include_dense=True, **options)


def llama(**options):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ua.sparsify(LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes, **options)), 0.7)


def examples():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(30, (STEPS * BATCH, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]


def train(model, folder, callback, *, resume=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **({"save_strategy": "no", "num_train_epochs": 1} | options),
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def callback(method="rigl", **options):
    return DynamicSparsityCallback(method=method, delta_t=2, generator=torch.Generator().manual_seed(5), **options)


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state[key], expected[key]), key


def blocks(model):
    return [m.pattern.blocks() for m in model.modules() if isinstance(m, ua.SparseLinear)]


@pytest.mark.parametrize("method, sparsity", METHODS)
def test_an_interrupted_training_is_the_uninterrupted_one(method, sparsity, tmp_path):
    whole, counted = bert(sparsity), callback(method)
    before = blocks(whole)
    train(whole, tmp_path, counted, save_strategy="steps", save_steps=3)
    assert counted.topology.steps == STEPS
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, blocks(whole), strict=True))
    resumed = bert(sparsity, seed=9)
    again = DynamicSparsityCallback(method=method, delta_t=2)
    train(resumed, tmp_path / "elsewhere", again, resume=str(tmp_path / "checkpoint-3"))
    assert again.topology.steps == STEPS
    assert_same(resumed, whole)


def test_accumulated_batches_are_one_step(tmp_path):
    counted = callback()
    train(bert(), tmp_path, counted, gradient_accumulation_steps=2)
    assert counted.topology.steps == STEPS // 2 == counted.topology.schedule.total_steps


def test_a_checkpoint_without_the_callback_or_with_other_settings_is_refused(tmp_path):
    train(bert(), tmp_path, transformers.TrainerCallback(), save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match="without it"):
        train(bert(), tmp_path, callback(), resume=str(tmp_path / "checkpoint-4"))
    train(bert(), tmp_path / "rigl", callback(), save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match="method"):
        train(bert(), tmp_path / "rigl", callback("set"), resume=str(tmp_path / "rigl" / "checkpoint-4"))


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_a_sparse_model_is_saved_and_loaded(storage, tmp_path):
    model = bert(storage=storage, overrides={"classifier": {"sparsity": 0.5, "block": (2, 1)}}).eval()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(BertForSequenceClassification, tmp_path)
    assert_same(loaded, model)
    sparse = {name for name, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}
    assert {name for name, m in loaded.named_modules() if isinstance(m, ua.nn.SparseLayer)} == sparse
    assert {loaded.get_submodule(name).storage for name in sparse} == {storage}
    ids = torch.randint(30, (3, 6))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_in_half_precision_with_shards(tied, tmp_path):
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = from_pretrained(AutoModelForCausalLM, tmp_path)
    assert_same(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.randint(30, (2, 5))
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_files_of_other_layers_are_refused(tmp_path):
    bert().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        from_pretrained(BertForSequenceClassification, tmp_path)
    (tmp_path / "other.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing"):
        from_pretrained(BertForSequenceClassification, tmp_path, num_hidden_layers=2)


# ---- LoRA ----


def test_adapters_beside_sparse_layers(tmp_path):
    base = llama().eval()
    before, ids = copy.deepcopy(base), torch.randint(30, (2, 5))
    targets = ["q_proj", "down_proj"]
    model = get_peft_model(base, with_sparse_layers(LoraConfig(r=2, target_modules=targets, init_lora_weights=False)))
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 24)
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    expected = nn.functional.linear(x, layer.get_base_layer().dense_weight() + low_rank)
    torch.testing.assert_close(layer(x), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    topology = ua.DynamicSparsity(model, optimizer, method="set", total_steps=10, delta_t=1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    topology.step()  # the base is frozen
    topology.detach()
    with pytest.raises(RuntimeError, match="cannot be merged"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    config = with_sparse_layers(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path, config=config)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    dense = PeftModel.from_pretrained(ua.densify(copy.deepcopy(before)), tmp_path).merge_and_unload()
    torch.testing.assert_close(dense(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert_same(model.unload(), before)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_read_the_weight_are_refused(variant):
    with pytest.raises(ValueError, match=r"init_lora_weights|variant"):
        get_peft_model(llama(), with_sparse_layers(LoraConfig(target_modules=["q_proj"], **variant)))


# ---- Accelerate ----


def accelerated(folder, *, steps=8, saves=None, resume=None, seed=1):
    """A loop as Accelerate's documentation has it, with three lines for the topology."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = ua.sparsify(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 2)), 0.7, distribution="uniform")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8 * steps, 12, generator=generator)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=steps, delta_t=2)
    accelerator.register_for_checkpointing(topology)
    first = 0
    if resume:
        accelerator.load_state(resume)
        first = 2 * topology.steps
    for inputs, labels in accelerator.skip_first_batches(loader, first):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            if accelerator.sync_gradients:
                topology.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and topology.steps == saves:
            accelerator.save_state(folder)
    return accelerator.unwrap_model(model), topology


def test_accelerate_resumes_bit_for_bit(tmp_path):
    torch.manual_seed(1)
    whole, topology = accelerated(tmp_path, saves=3)
    torch.manual_seed(7)
    resumed, again = accelerated(tmp_path, resume=tmp_path)
    assert topology.steps == again.steps == 8
    assert_same(resumed, whole)


# ---- two processes ----


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    model = bert(seed=rank)  # each rank another pattern
    train(model, f"{folder}/run", callback())
    torch.save(model.state_dict(), f"{folder}/trainer-{rank}.pt")
    torch.manual_seed(rank)
    model, _ = accelerated(folder, steps=4)
    torch.save(model.state_dict(), f"{folder}/accelerate-{rank}.pt")


@pytest.mark.distributed
def test_two_processes_end_alike(tmp_path):
    processes.start(worker, tmp_path, 2)
    for loop in ("trainer", "accelerate"):
        mine, theirs = (torch.load(tmp_path / f"{loop}-{rank}.pt") for rank in range(2))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), loop
