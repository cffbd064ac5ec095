"""Published methods on other backbones of timm, with timm's ImageNet weights.

segcore train examples/backbones.py:ddp_mobilenet
segcore train examples/backbones.py:deeplab_regnet
"""

from dataclasses import replace

from segcore import Experiment, load_experiment


def on(config: str, backbone: str, tag: str) -> Experiment:
    """Return a configuration with another backbone and its start weights."""
    exp = load_experiment(config)
    model, train = replace(exp.model, backbone=backbone), replace(exp.train, init_from=f"{backbone}.{tag}")
    return replace(exp, name=f"{exp.name}_{backbone}", model=model, train=train)


def ddp_mobilenet() -> Experiment:
    """DDP, whose feature pyramid takes maps at strides 4, 8, 16 and 32."""
    return on("ddp_convnext_t_4x4_512x1024_160k_cityscapes", "mobilenetv3_small_050", "lamb_in1k")


def deeplab_regnet() -> Experiment:
    """DeepLabV3+, whose backbone is dilated to output stride 8."""
    return on("deeplabv3plus_r50_d8_512x1024_80k_cityscapes", "regnety_002", "pycls_in1k")
