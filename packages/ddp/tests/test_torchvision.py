"""torchvision's ResNet and DeepLabV3: the ResNet under its names computes the same features here."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models.feature_extraction import create_feature_extractor

from ddp_seg.configs import DDPConfig
from segcore.checkpoints.load import load_init


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "deeplabv3_resnet50"])
def test_resnet(tmp_path, name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, **({"weights_backbone": None} if "deeplab" in name else {}))
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(0, 0.1)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    kind = name.split("_")[-1]
    ours = DDPConfig(num_classes=5, backbone=kind, drop_path=0.0, width=64, decoder_layers=1, heads=4).build().eval()
    report = load_init(ours, str(tmp_path / "a.safetensors"))
    assert "backbone only" in report
    assert ("of classifier" if "deeplab" in name else "of fc") in report
    plain = torchvision.models.get_model(kind).eval()  # DeepLabV3's dilates the last stages
    plain.load_state_dict(getattr(theirs, "backbone", theirs).state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    expected = create_feature_extractor(plain, [f"layer{i}" for i in range(1, 5)])(images).values()
    for got, wanted in zip(ours.backbone(images), expected, strict=True):
        torch.testing.assert_close(got, wanted)
