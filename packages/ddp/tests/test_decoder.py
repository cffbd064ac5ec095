"""Inference on a CPU takes faster paths than training and gives the same numbers."""

import pytest
import torch

from ddp_seg.configs import DDPConfig
from ddp_seg.decoder import ROWS, MapDecoder, make_grid
from segcore.models.layers import resize


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("size", [(45, 50), (3, 4)])
def test_tokens_in_chunks(dtype, atol, size):
    torch.manual_seed(0)
    decoder = MapDecoder(32, 5, layers=2, heads=4, points=4, time_dim=128).to(dtype)
    for layer in decoder.layers:  # the initial weights attend uniformly
        torch.nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.1)
        torch.nn.init.normal_(layer.attention.attention_weights.weight, std=0.1)
    x, time = torch.randn(2, 32, *size, dtype=dtype), torch.randn(1, 128, dtype=dtype)
    assert (size[0] * size[1] > 2 * ROWS) == (size == (45, 50))
    before = x.clone()
    with torch.no_grad():
        parts = decoder(x, time, make_grid(x))
    whole = decoder(x, time)
    assert whole.requires_grad
    assert parts.dtype == dtype
    torch.testing.assert_close(parts, whole.detach(), rtol=0, atol=atol)
    assert torch.equal(x, before)


def test_features_are_the_merged_maps():
    torch.manual_seed(0)
    model = DDPConfig(num_classes=5, backbone="resnet18", width=32, decoder_layers=1, heads=4).build().eval()
    images = torch.randn(2, 3, 70, 99)
    with torch.no_grad():
        maps = model.fpn(model.backbone(images))
        plain = model.fuse_conv(torch.cat([resize(x, maps[0].shape[-2:]) for x in maps], 1))
        torch.testing.assert_close(model.encode(images), plain, rtol=0, atol=1e-5)
