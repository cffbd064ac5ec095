"""DDP on a CUDA device: the contract, agreement with the CPU, a training run. Collected by `nox -s gpu_tests`."""

import pytest
import torch

from ddp_seg.configs import DDPConfig
from segcore.checkpoints.run_checkpoint import newest
from segcore.cli.main import main
from segcore.demo.toy import generate
from segcore.testing import contract

pytestmark = pytest.mark.gpu
SMALL = {"num_classes": 5, "width": 32, "decoder_layers": 2, "heads": 4, "drop_path": 0.0}


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_t", "swin_t"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_logits_and_gradients_match_the_cpu(backbone, sampler):
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cpu = DDPConfig(backbone=backbone, sampler=sampler, **SMALL).build().eval()
    gpu = DDPConfig(backbone=backbone, sampler=sampler, **SMALL).build().eval()
    gpu.load_checkpoint(cpu.state_dict())
    gpu.cuda()
    gpu.noise_device = "cpu"
    images, labels = contract.images(2), contract.labels(cpu, 2)
    with torch.no_grad():
        # One step: with more, a pixel whose two best classes differ only by rounding may diverge.
        ours = gpu.predict_steps(images.cuda(), steps=(1,), seeds=[1, 2])["1"].cpu()
        torch.testing.assert_close(ours, cpu.predict_steps(images, steps=(1,), seeds=[1, 2])["1"], atol=1e-3, rtol=1e-3)
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        model.losses(images.to(device), labels.to(device), seeds=[3, 4])["loss"].backward()
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        norm = a.grad.norm().item()
        assert b.grad.norm().item() == pytest.approx(norm, rel=1e-2, abs=1e-5), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_test_and_predict(tmp_path, precision):
    generate(tmp_path / "toy", train=3, val=2, height=64, width=128)
    words = [
        f"--data.root={tmp_path / 'toy'}", "--device=cuda", "--model.width=32", "--data.crop", "64", "128",
        "--data.img-scale", "128", "64", "--evaluate.img-scale", "128", "64", f"--train.precision={precision}",
    ]  # fmt: skip
    run = str(tmp_path / "run")
    main("ddp_seg", ["train", "ddp_resnet18_toy", f"--work-dir={run}", "--schedule.iterations=4", *words])
    assert newest(tmp_path / "run").name == "iter_4"
    main("ddp_seg", ["test", "ddp_resnet18_toy", run, f"--json={tmp_path / 'out.json'}", *words])
    images = str(tmp_path / "toy" / "leftImg8bit" / "val")
    main("ddp_seg", ["predict", "ddp_resnet18_toy", run, images, str(tmp_path / "out"), *words])
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 2
