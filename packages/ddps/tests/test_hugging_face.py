"""HuggingFace's SegFormer and MobileNetV2: encoders under its names compute the same features here."""

import pytest
import timm
import torch
from torch import nn

from ddps_seg.configs import BaseModelConfig, DDPSConfig
from ddps_seg.official import from_hugging_face
from segcore.checkpoints.load import load_init
from segcore.errors import UserError

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def random_state(model):
    """Fill a model with random numbers, also its batch norms' statistics; return a copy of its tensors."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (0.5 if tensor.ndim == 1 else 0.1))
            tensor.add_(0.5 if name.endswith("var") else 0 if tensor.ndim == 1 else -0.05)
    return model.eval()


def saved(model, folder):
    """Save as HuggingFace does: the names in the file are not those of the modules."""
    model.save_pretrained(folder)
    return str(folder / "model.safetensors")


def test_names_and_shapes():
    block, theirs = "backbone.layers.1.1.2", "segformer.encoder.block.1.2"
    state = {
        f"{theirs}.attention.self.{part}.weight": torch.full((8, 8), float(i))
        for i, part in enumerate(("key", "query", "value"))
    }
    state |= {f"{theirs}.layer_norm_1.bias": torch.ones(8), f"{theirs}.mlp.dense1.weight": torch.ones(32, 8)}
    found = from_hugging_face(state | {"classifier.weight": torch.ones(2, 8)})
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        f"{block}.norm1.bias": (8,),
        f"{block}.ffn.layers.0.weight": (32, 8, 1, 1),
        f"{block}.attn.attn.in_proj_weight": (24, 8),
        "classifier.weight": (2, 8),
    }
    assert found[f"{block}.attn.attn.in_proj_weight"][::8, 0].tolist() == [1, 0, 2], "queries, keys, values"
    assert from_hugging_face(ours := {"backbone.layers.0.0.norm.bias": torch.ones(1)}) is ours


@pytest.mark.parametrize(
    "shapes",
    [
        {
            f"segformer.encoder.block.0.0.attention.self.{part}.bias": (4,) * n
            for n, part in enumerate(("key", "query"))
        },
        {f"segformer.encoder.block.0.0.attention.self.{part}.bias": (4, len(part)) for part in ("key", "query")},
        {"mobilenet_v2.layer.99.conv_3x3.convolution.weight": (3,)},
    ],
)
def test_other_shapes_and_layers_are_refused(shapes):
    with pytest.raises(UserError, match="do not fit this backbone"):
        BaseModelConfig(num_classes=5, backbone="mit_b0").build().load_pretrained(
            {name: torch.ones(shape) for name, shape in shapes.items()}
        )


@torch.no_grad()
@pytest.mark.oracle
@pytest.mark.parametrize("classifier", [False, True])
def test_segformer(tmp_path, classifier):
    transformers = pytest.importorskip("transformers")
    kind = transformers.SegformerForImageClassification if classifier else transformers.SegformerForSemanticSegmentation
    theirs = random_state(kind(transformers.SegformerConfig(num_labels=19)))
    path = saved(theirs, tmp_path)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # the authors' and ours; HuggingFace has 1e-5
    expected = theirs.segformer(IMAGES, output_hidden_states=True).hidden_states
    for config in (BaseModelConfig(num_classes=5, backbone="mit_b0"), DDPSConfig(num_classes=5, backbone="mit_b0")):
        ours = config.build().eval()
        assert "backbone only: loaded 160 tensors" in load_init(ours, path)
        for got, wanted in zip(ours.backbone(IMAGES), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.oracle
def test_mobilenet(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=19, tf_padding=False)
    theirs = random_state(transformers.MobileNetV2ForSemanticSegmentation(config))
    ours = BaseModelConfig(num_classes=5, backbone="mobilenet_v2").build()
    assert "backbone only" in load_init(ours, saved(theirs, tmp_path))
    expected = theirs.mobilenet_v2(IMAGES, output_hidden_states=True).hidden_states
    undilated = timm.create_model("mobilenetv2_100", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    undilated.load_state_dict(ours.backbone.net.state_dict())
    for got, layer in zip(undilated(IMAGES), (1, 4, 11, 15), strict=True):
        torch.testing.assert_close(got, expected[layer], atol=1e-4, rtol=1e-4)
