"""The models as timm, torchvision and transformers build them, with the very weights of our ONNX files. Needs PyTorch.

With the same weights a peer's output can be checked against the same reference as ours. Peers get what they like best:
images in channels-last; the mask of BERT ready as numbers to add (a boolean one makes SDPA several times slower);
causal attention without any mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from benchmarks.cases.models import ARCHITECTURES, BERT, EFFICIENTNET, GPT2, MINILM, VISION
from benchmarks.models.store import weights_file

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    """`call` maps `arguments` of some feeds to the model's output named `output`. `module`: transformers' own, of a
    BERT."""

    output: str
    call: Callable[..., torch.Tensor]
    arguments: Callable[[Mapping[str, np.ndarray]], tuple[torch.Tensor, ...]]
    module: torch.nn.Module | None = None


def network(model: str, path: Path, device: str = "cuda", dtype: torch.dtype = torch.float16) -> Network:
    """The model's twin on a device. `path` is its ONNX file, an architecture's with its weights beside it. Raises
    ValueError where its weights are not those of the file."""
    if model in ARCHITECTURES:
        with np.load(weights_file(path)) as archive:
            weights: Weights = dict(archive)
    else:
        weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    if model in VISION:
        return _torchvision(model, weights, device, dtype)
    return _BUILDERS[model](weights, device, dtype)


def _torchvision(model: str, weights: Weights, device: str, dtype: torch.dtype) -> Network:
    import torchvision

    module = torchvision.models.get_model(model, weights=None)
    _load(module, weights)
    return _of_images(module, device, dtype)


def _efficientnet_lite0(weights: Weights, device: str, dtype: torch.dtype) -> Network:
    import timm

    module = timm.create_model("tf_efficientnet_lite0")
    positions = [f"{stage}.{block}" for stage, blocks in enumerate(module.blocks) for block in range(len(blocks))]
    _load(module, {efficientnet_name(name, positions): value for name, value in weights.items() if name[0] == "_"})
    return _of_images(module, device, dtype)


def _of_images(module: torch.nn.Module, device: str, dtype: torch.dtype) -> Network:
    module = module.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)

    def arguments(feeds: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
        image = torch.from_numpy(feeds["input"]).to(device, dtype)
        return (image.contiguous(memory_format=torch.channels_last),)

    return Network("logits", module, arguments)


_PLAIN = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def efficientnet_name(name: str, positions: list[str]) -> str:
    """timm's name of a weight. `positions` are its blocks' places, stage and number in the stage."""
    match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+?)\.(\w+)", name)
    if match is None:
        layer, _, field = name.partition(".")
        return f"{_PLAIN[layer]}.{field}"
    block, layer, field = int(match[1]), match[2], match[3]
    # The first block has no expansion: there the projection is timm's `conv_pw`, and normalisations count from one.
    if layer.startswith("_bn"):
        layer = f"bn{int(layer[3:]) + (block > 0)}"
    else:
        project = "conv_pwl" if block else "conv_pw"
        layer = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": project}[layer]
    return f"blocks.{positions[block]}.{layer}.{field}"


def _all_minilm_l6_v2(weights: Weights, device: str, dtype: torch.dtype) -> Network:
    named = {name: value for name, value in weights.items() if name.startswith(("embeddings.", "encoder."))}
    del named["embeddings.position_ids"]
    suffix = "_transposed"
    named = {k.removesuffix(suffix): v.T if k.endswith(suffix) else v for k, v in named.items()}
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return _bert(named, shape, device, dtype)


def _bert_base(weights: Weights, device: str, dtype: torch.dtype) -> Network:
    return _bert(weights, {}, device, dtype)


def _bert(weights: Weights, shape: Mapping[str, int], device: str, dtype: torch.dtype) -> Network:
    from transformers import BertConfig, BertModel

    module = BertModel(BertConfig(**shape), add_pooling_layer=False)
    _load(module, weights)
    module = module.eval().requires_grad_(False).to(device, dtype)

    def call(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        added = (1 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        added = added.expand(-1, -1, ids.shape[1], -1)
        return module(input_ids=ids, attention_mask=added, token_type_ids=types).last_hidden_state

    def arguments(feeds: Mapping[str, np.ndarray]) -> tuple[torch.Tensor, ...]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return tuple(torch.from_numpy(feeds[name]).to(device) for name in names)

    return Network("last_hidden_state", call, arguments, module)


def _gpt2(weights: Weights, device: str, dtype: torch.dtype) -> Network:
    from transformers import AttentionInterface, GPT2Config, GPT2Model
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Under a name for which transformers makes no mask, SDPA gets `is_causal`, which its fast kernels take.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    module = GPT2Model(GPT2Config(use_cache=False, attn_implementation="sdpa_causal"))
    _load(module, weights)
    module = module.eval().requires_grad_(False).to(device, dtype)

    def call(ids: torch.Tensor) -> torch.Tensor:
        return module(input_ids=ids).last_hidden_state

    return Network("last_hidden_state", call, lambda feeds: (torch.from_numpy(feeds["input_ids"]).to(device),))


_BUILDERS = {EFFICIENTNET: _efficientnet_lite0, MINILM: _all_minilm_l6_v2, BERT: _bert_base, GPT2: _gpt2}


def _load(module: torch.nn.Module, weights: Weights) -> None:
    """Give a module its weights: all of them, and no others."""
    counters = {name for name in module.state_dict() if name.endswith("num_batches_tracked")}
    wanted = set(module.state_dict()) - counters
    if wanted != set(weights):
        raise ValueError(f"the weights of the file and of PyTorch's model differ: {sorted(wanted ^ set(weights))[:4]}")
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    module.load_state_dict({**module.state_dict(), **tensors})
