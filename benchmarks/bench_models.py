"""Suite models: how much of popular networks becomes sparse, and whether all works with them then.

python -m benchmarks models                      on demand only: minutes, and needs torchvision, timm and transformers

Each network is made from its configuration, nothing is downloaded. Those of transformers are tiny, so that embeddings
weigh more there than in real sizes. Each runs in a process of its own with a limit of time.

``UASPARSE_BENCH_NETWORKS``: some of them, by parts of their names, separated by commas.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import uasparse_kernels as ua
from benchmarks import harness
from uasparse_kernels._attention import as_dense_names

SPARSITY, LIMIT_S = 0.9, 300.0


class Network(NamedTuple):
    """``make`` gives the model; ``call`` its output; ``compared`` that which is compared, where another is."""

    make: Callable[[], nn.Module]
    call: Callable[[Any], Any]
    compared: Callable[[Any], Any] | None = None


def images(size: int, batch: int = 2) -> Callable[[Any], Any]:
    def call(model: Any) -> Any:
        return model(torch.randn(batch, 3, size, size))

    return call


def tv(name: str, size: int = 64, **options: Any) -> Network:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, **({"weights": None, "num_classes": 10} | options))

    return Network(make, images(size))


def detector(name: str) -> Network:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64
        )

    def call(model: Any) -> Any:
        target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
        given = [torch.rand(3, 64, 64) for _ in range(2)]
        return model(given, [target, target]) if model.training else model(given)

    return Network(make, call, lambda model: model.backbone(torch.randn(1, 3, 64, 64)))


def tm(name: str, size: int = 64, registered: bool = False, **options: Any) -> Network:
    def make() -> nn.Module:
        import timm

        if registered:
            register_timms()
        return timm.create_model(name, num_classes=10, **options)

    return Network(make, images(size))


def register_timms() -> None:
    """Two classes of timm's whose forward is another spelling of the built-in one."""
    from timm.layers import Conv2dSame, Linear, pad_same

    class SparseConv2dSame(ua.SparseConv2d):
        def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
            return pad_same(input, self.kernel_size, self.stride, self.dilation), (0, 0)

    ua.register_layer(Linear, ua.SparseLinear.from_dense, lambda layer: layer.to_dense(Linear))
    ua.register_layer(Conv2dSame, SparseConv2dSame.from_dense, lambda layer: layer.to_dense(Conv2dSame))


def hf(name: str, config: str, call: Callable[[Any], Any], **settings: Any) -> Network:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**settings))

    return Network(make, call)


def tokens(model: Any) -> Any:
    return model(input_ids=torch.randint(0, 100, (2, 16)), use_cache=False)


def words(model: Any) -> Any:
    return model(input_ids=torch.randint(0, 100, (2, 16)))


def pairs(model: Any) -> Any:
    ids = torch.randint(0, 100, (2, 16))
    return model(input_ids=ids, decoder_input_ids=ids[:, :8], use_cache=False)


def pixels(size: int) -> Callable[[Any], Any]:
    return lambda model: model(pixel_values=torch.randn(2, 3, size, size))


def whisper(model: Any) -> Any:
    return model(input_features=torch.randn(2, 16, 40), decoder_input_ids=torch.zeros(2, 4).long(), use_cache=False)


def torchs(make: Callable[[], nn.Module], *shape: int, whole: bool = False, **options: Any) -> Network:
    """Of torch's own layers, for an input of this shape (two of it for ``whole``, an encoder and a decoder)."""
    kind = options.get("dtype", torch.float32)

    def call(model: Any) -> Any:
        def draw() -> Tensor:
            return torch.randn(shape) if kind.is_floating_point else torch.randint(0, 50, shape)

        return model(draw(), draw()) if whole else model(draw())

    return Network(make, call)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.fc = nn.Embedding(50, 32), nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embed(x))[0])


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


class Plain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)


_TEXT = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _TEXT | {"intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
_SPEECH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SPEECH |= {"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "vocab_size": 32}
_SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
_WHISPER = {"vocab_size": 100, "num_mel_bins": 16, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
_WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128}
_WHISPER |= {"decoder_ffn_dim": 128, "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0}
_WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def _encoder(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 128, **options)


NETWORKS: dict[str, Network] = {
    "tv.convnext_tiny": tv("convnext_tiny"),
    "tv.deeplabv3_resnet50": tv("deeplabv3_resnet50", weights_backbone=None, aux_loss=True),
    "tv.densenet121": tv("densenet121"),
    "tv.densenet121 memory_efficient": tv("densenet121", memory_efficient=True),
    "tv.efficientnet_b0": tv("efficientnet_b0"),
    "tv.fasterrcnn_resnet50_fpn": detector("fasterrcnn_resnet50_fpn"),
    "tv.googlenet": tv("googlenet", 80, init_weights=False, aux_logits=True),
    "tv.inception_v3": tv("inception_v3", 299, init_weights=False, aux_logits=True),
    "tv.maxvit_t": tv("maxvit_t", 224),
    "tv.mobilenet_v3_large": tv("mobilenet_v3_large"),
    "tv.r3d_18": Network(lambda: _r3d(), lambda model: model(torch.randn(2, 3, 4, 32, 32))),
    "tv.regnet_y_400mf": tv("regnet_y_400mf"),
    "tv.resnet50": tv("resnet50"),
    "tv.retinanet_resnet50_fpn": detector("retinanet_resnet50_fpn"),
    "tv.shufflenet_v2": tv("shufflenet_v2_x1_0"),
    "tv.swin_t": tv("swin_t"),
    "tv.swin_v2_t": tv("swin_v2_t"),
    "tv.vgg16_bn": tv("vgg16_bn"),
    "tv.vit_b_16": tv("vit_b_16", 32, image_size=32),
    "timm.beit_base_patch16_224": tm("beit_base_patch16_224", img_size=64),
    "timm.caformer_s18": tm("caformer_s18"),
    "timm.coat_tiny": tm("coat_tiny", 224),
    "timm.convnextv2_atto": tm("convnextv2_atto"),
    "timm.davit_tiny": tm("davit_tiny"),
    "timm.deit_tiny_distilled_patch16_224": tm("deit_tiny_distilled_patch16_224", img_size=64),
    "timm.efficientvit_b0": tm("efficientvit_b0"),
    "timm.eva02_tiny_patch14_224": tm("eva02_tiny_patch14_224", 56, img_size=56),
    "timm.fastvit_t8": tm("fastvit_t8"),
    "timm.hiera_tiny_224": tm("hiera_tiny_224", 64, img_size=64),
    "timm.levit_128s": tm("levit_128s", 224),
    "timm.maxxvit_rmlp_nano_rw_256": tm("maxxvit_rmlp_nano_rw_256", 256),
    "timm.mixer_s16_224": tm("mixer_s16_224", img_size=64),
    "timm.mobilenetv4_conv_small": tm("mobilenetv4_conv_small"),
    "timm.mobilenetv4_conv_small, registered": tm("mobilenetv4_conv_small", registered=True),
    "timm.nf_resnet50": tm("nf_resnet50"),
    "timm.repvgg_a0": tm("repvgg_a0"),
    "timm.resnet50": tm("resnet50"),
    "timm.resnetv2_50": tm("resnetv2_50"),
    "timm.swin_tiny_patch4_window7_224": tm("swin_tiny_patch4_window7_224", 224),
    "timm.swinv2_tiny_window8_256": tm("swinv2_tiny_window8_256", 256),
    "timm.tf_efficientnet_b0": tm("tf_efficientnet_b0"),
    "timm.tf_efficientnet_b0, registered": tm("tf_efficientnet_b0", registered=True),
    "timm.vit_small_patch16_dinov3": tm("vit_small_patch16_dinov3"),
    "timm.vit_tiny_patch16_224": tm("vit_tiny_patch16_224", img_size=64),
    "timm.volo_d1_224": tm("volo_d1_224", 224),
    "timm.xcit_nano_12_p16_224": tm("xcit_nano_12_p16_224"),
    "hf.BertForSequenceClassification": hf(
        "BertForSequenceClassification", "BertConfig", words, **_TEXT, intermediate_size=128
    ),
    "hf.ConvNextForImageClassification": hf(
        "ConvNextForImageClassification", "ConvNextConfig", pixels(64), hidden_sizes=[32, 64, 96, 128], depths=[1] * 4
    ),
    "hf.GPT2LMHeadModel": hf(
        "GPT2LMHeadModel", "GPT2Config", tokens, vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    ),
    "hf.LlamaForCausalLM tied": hf(
        "LlamaForCausalLM", "LlamaConfig", tokens, **_LLAMA, tie_word_embeddings=True
    ),
    "hf.LlamaForCausalLM": hf("LlamaForCausalLM", "LlamaConfig", tokens, **_LLAMA),
    "hf.MambaForCausalLM": hf(
        "MambaForCausalLM", "MambaConfig", tokens, vocab_size=100, hidden_size=64, num_hidden_layers=2, state_size=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
    "hf.MixtralForCausalLM": hf("MixtralForCausalLM", "MixtralConfig", tokens, **_LLAMA, num_local_experts=4),
    "hf.Qwen3ForCausalLM": hf("Qwen3ForCausalLM", "Qwen3Config", tokens, **_LLAMA, head_dim=16),
    "hf.SegformerForSemanticSegmentation": hf(
        "SegformerForSemanticSegmentation", "SegformerConfig", pixels(64), hidden_sizes=[16, 32, 48, 64],
        depths=[1] * 4, decoder_hidden_size=64,
    ),
    "hf.T5ForConditionalGeneration": hf(
        "T5ForConditionalGeneration", "T5Config", pairs, vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2,
        num_heads=4,
    ),
    "hf.ViTForImageClassification": hf(
        "ViTForImageClassification", "ViTConfig", pixels(32), **_VISION, image_size=32, patch_size=8
    ),
    "hf.Wav2Vec2ForCTC": hf(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", lambda model: model(torch.randn(2, 2000)), **_SPEECH,
        num_feat_extract_layers=3,
    ),
    "hf.WhisperForConditionalGeneration": hf(
        "WhisperForConditionalGeneration", "WhisperConfig", whisper, **_WHISPER
    ),
    "nn.Conv1d + Linear": torchs(
        lambda: nn.Sequential(nn.Conv1d(8, 64, 5), nn.ReLU(), nn.Conv1d(64, 64, 3), nn.Flatten(), nn.Linear(640, 10)),
        2, 8, 16,
    ),
    "nn.Conv3d + Linear": torchs(
        lambda: nn.Sequential(nn.Conv3d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)), 2, 3, 4, 4, 4
    ),
    "nn.ConvTranspose2d + Conv2d": torchs(
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(16, 16, 3)), 2, 3, 8, 8
    ),
    "nn.Embedding + LSTM + Linear": torchs(Recurrent, 2, 8, dtype=torch.int64),
    "nn.MultiheadAttention + Linear": torchs(Attended, 2, 8, 64),
    "nn.Transformer": torchs(
        lambda: nn.Transformer(64, 4, 1, 1, 128, batch_first=True), 2, 8, 64, whole=True
    ),
    "nn.TransformerDecoderLayer": torchs(
        lambda: nn.TransformerDecoderLayer(64, 4, 128, batch_first=True), 2, 8, 64, whole=True
    ),
    "nn.TransformerEncoder": torchs(
        lambda: nn.TransformerEncoder(_encoder(batch_first=True), 2), 2, 8, 64
    ),
    "nn.TransformerEncoderLayer": torchs(_encoder, 8, 2, 64),
    "nn.TransformerEncoderLayer batch_first": torchs(lambda: _encoder(batch_first=True), 2, 8, 64),
    "weight_norm Linear + Linear": torchs(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64)), 2, 64
    ),
    "plain subclass of nn.Linear": torchs(lambda: nn.Sequential(Plain(), nn.ReLU(), nn.Linear(64, 64)), 2, 64),
}  # fmt: skip


def _r3d() -> nn.Module:
    import torchvision

    return torchvision.models.video.r3d_18(weights=None, num_classes=10)


def row(name: str) -> dict[str, Any]:
    """Coverage, and the first thing that is not as it should be, or "ok"."""
    network, begin = NETWORKS[name], time.perf_counter()
    torch.manual_seed(0)
    model = network.make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # heads that start at zero would hide everything
            if parameter.dim() > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
    dense = copy.deepcopy(model)
    found: dict[str, Any] = {"shape": name}
    try:
        ua.sparsify(model, SPARSITY)
        told = ua.summary(model)
        reasons: Counter[str] = Counter()
        for line in told.rows:
            if line.dense_because:
                reasons[f"{line.kind}: {line.dense_because}"] += torch.Size(line.shape).numel()
        found |= {
            "weights": told.weights,
            "layers": sum(not line.dense_because for line in told.rows),
            "covered": told.covered / told.weights,
            "sparsity": told.sparsity,
            "dense": {reason: count / told.weights for reason, count in reasons.most_common(3)},
        }
        found["verdict"] = _check(model, dense, network) or "ok"
    except Exception as error:  # a network may fail in any way
        found["verdict"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return found | {"s": round(time.perf_counter() - begin, 1)}


def _check(model: Any, dense: Any, network: Network) -> str:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}
    if not layers:
        return "no layer became sparse"
    compared = network.compared or network.call
    weights = _dense_weights(model)
    with torch.no_grad():
        for name, weight in weights.items():
            dense.get_parameter(name).copy_(weight)
    if (error := _error(_outputs(model, compared), _outputs(dense, compared))) > 1e-4:
        return f"the forward pass is not that of the masked dense model, by {error:.1e}"
    kinds = {name: type(dense.get_submodule(name.rpartition(".")[0])) for name in weights}
    del dense
    before = {name: layer.pattern.blocks() for name, layer in layers.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    topology = ua.DynamicSparsity(model.train(), optimizer, method="rigl", total_steps=10, delta_t=1)
    sum(t.float().square().mean() for t in _tensors(network.call(model))).backward()  # type: ignore[union-attr]
    optimizer.step()
    if not topology.step() or all(torch.equal(before[n], layer.pattern.blocks()) for n, layer in layers.items()):
        return "no topology update came"
    topology.detach()
    weights = {name: weight.clone() for name, weight in _dense_weights(model).items()}
    expected = _outputs(model.eval(), compared)
    ua.densify(model)
    for name, weight in weights.items():
        same = torch.equal(model.get_parameter(name), weight)
        if type(model.get_submodule(name.rpartition(".")[0])) is not kinds[name] or not same:
            return f"densify() does not give {name} back"
    if (error := _error(_outputs(model, compared), expected)) > 1e-4:
        return f"the densified model is another one, by {error:.1e}"
    return ""


def _dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of what became sparse, as the dense model has and names them."""
    own: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, ua.nn.SparseLayer):
            own[f"{name}.weight"] = module.dense_weight()
        elif isinstance(module, ua.SparseMultiheadAttention):
            own |= {f"{name}.{n}.weight": m.weight for n, m in module.projections().items() if isinstance(m, nn.Linear)}
    return as_dense_names(model, own)


def _outputs(model: Any, call: Callable[[Any], Any]) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return _tensors(call(model))


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value; infinite where something is not finite, or is zero."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        size = float(b.abs().max())
        error = float((a - b).abs().max()) / size if size > 0 and bool(a.isfinite().all()) else float("inf")
        worst = max(worst, error)
    return worst if found else float("inf")


def _apart(name: str, results: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results.put(row(name))


def run(seconds: float = 1.0) -> list[dict[str, Any]]:
    """All of them, one after the other, in processes that have the libraries already."""
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    wanted = os.environ.get("UASPARSE_BENCH_NETWORKS", "").split(",")
    return harness.rows(_one(name) for name in NETWORKS if any(part in name for part in wanted))


def _one(name: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=_apart, args=(name, results))
    worker.start()
    worker.join(LIMIT_S)
    if worker.exitcode == 0:
        return results.get()
    slow = worker.is_alive()
    worker.kill()
    return {"shape": name, "verdict": f"over {LIMIT_S:.0f} s" if slow else f"the process ended with {worker.exitcode}"}
