"""A Hugging Face encoder, 90 % sparse, trained by the Trainer, saved, and read again.

python examples/bert_trainer.py [--small]
"""

import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import uasparse_kernels as ua
from uasparse_kernels.integrations.transformers import DynamicSparsityCallback, from_pretrained

small = "--small" in sys.argv
WORDS, LENGTH = 100, 16


def sentences(count, seed):
    """Made-up texts: is word 1 in it more often than word 2?"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.5] = 1
    ids[torch.rand(ids.shape, generator=generator) < 0.35] = 2
    labels = ((ids == 1).sum(1) > (ids == 2).sum(1)).long()
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, labels, strict=True)]


def metrics(predicted):
    return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}


torch.manual_seed(0)
# Pretrained: BertForSequenceClassification.from_pretrained("bert-base-uncased"), and sparsify(..., keep="magnitude").
size = 64 if small else 256
config = BertConfig(
    vocab_size=WORDS,
    hidden_size=size,
    intermediate_size=4 * size,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=LENGTH,
)
model = ua.sparsify(BertForSequenceClassification(config), 0.9)
print(ua.summary(model))  # embeddings have no sparse form

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=2 if small else 3,
        per_device_train_batch_size=32,
        learning_rate=2e-3 if small else 1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=sentences(1024 if small else 4096, 1),
        eval_dataset=sentences(512, 2),
        compute_metrics=metrics,
        callbacks=[DynamicSparsityCallback(method="rigl", delta_t=10)],
    )
    trainer.train()
    print(f"test accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")

    model.save_pretrained(folder)
    again = from_pretrained(BertForSequenceClassification, folder)
print(f"read from its files: sparsity of its matrices {ua.summary(again).sparsity:.3f}")
