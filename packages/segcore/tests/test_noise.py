"""Where a model's noise is drawn, and that it depends on the image's seed alone."""

import threading

import numpy as np
import pytest
import torch

from segcore.config.schema import DataConfig, EvalConfig
from segcore.evaluation.predictor import Predictor
from segcore.models import noise
from segcore.models.noise import draw, draw_steps, generators
from segcore.testing.tiny import Tiny, TinyStepwise

GPU = torch.device("meta")
"""Stands in for a device that is not the CPU."""


def normal(generator):
    return torch.randn(3, generator=generator, device=generator.device)


@pytest.fixture
def no_copies(monkeypatch):
    """Leave numbers on the CPU, where they can be compared; name the devices that generators were made for."""
    devices = []

    def generator(device="cpu"):
        devices.append(str(device))
        return torch._C.Generator("cpu")

    monkeypatch.setattr(noise, "to_device", lambda tensor, device: tensor)
    monkeypatch.setattr(noise.torch, "Generator", generator)
    return devices


def test_on_a_cpu_an_image_has_one_generator():
    (first, second) = generators([5, 6], 2, device=torch.device("cpu"))
    assert first.host is first.maps
    assert second.host is second.maps
    assert torch.equal(normal(first.maps), torch.randn(3, generator=torch.Generator().manual_seed(5)))


def test_a_number_of_seeds_that_does_not_fit():
    with pytest.raises(ValueError, match="2 seeds for 3 images; give one seed per image"):
        generators([1, 2], 3)


@pytest.mark.parametrize(("setting", "devices"), [("model", ["cpu", "meta"]), ("cpu", ["cpu"])])
def test_maps_are_drawn_on_the_device_of_the_model_unless_told_otherwise(no_copies, setting, devices):
    (image,) = generators([5], 1, device=GPU, noise_device=setting)
    assert no_copies == devices
    assert image.host.initial_seed() == image.maps.initial_seed() == 5


@pytest.mark.usefixtures("no_copies")
def test_threads_draw_what_the_main_thread_draws():
    seeds = [*range(20)]
    expected = torch.stack([normal(each.maps) for each in generators(seeds, 20)])
    assert torch.equal(draw(normal, generators(seeds, 20), torch.device("cpu")), expected)
    assert torch.equal(draw(normal, generators(seeds, 20), GPU), expected)


@pytest.mark.usefixtures("no_copies")
def test_steps_drawn_ahead_are_those_drawn_when_asked_for():
    expected = [*draw_steps(normal, generators([1, 2], 2), torch.device("cpu"), 5)]
    assert len(expected) == 5
    assert torch.equal(torch.stack([*draw_steps(normal, generators([1, 2], 2), GPU, 5)]), torch.stack(expected))


@pytest.mark.usefixtures("no_copies")
def test_a_step_is_drawn_before_it_is_asked_for():
    drawn, second = [], threading.Event()

    def noted(generator):
        drawn.append(normal(generator))
        if len(drawn) == 2:
            second.set()
        return drawn[-1]

    steps = draw_steps(noted, generators([1], 1), GPU, 5)
    next(steps)
    assert second.wait(60)
    assert len(drawn) == 2
    steps.close()


def test_an_image_draws_the_same_alone_and_in_a_batch():
    together = draw(normal, generators([7, 8, 9], 3), torch.device("cpu"))
    assert torch.equal(draw(normal, generators([8], 1), torch.device("cpu"))[0], together[1])


def test_the_setting_reaches_the_models():
    model, other = (TinyStepwise(3, lambda x: x) for _ in range(2))
    image = [np.zeros((4, 6, 3), np.uint8)]
    both = Predictor(model, EvalConfig(noise_device="cpu"), DataConfig(), (other,))
    alone = Predictor(model, EvalConfig(), DataConfig())
    for predictor, devices in ((both, ["cpu", "cpu"]), (alone, ["model", "cpu"]), (both, ["cpu", "cpu"])):
        predictor.classes(image, [1])
        assert [model.noise_device, other.noise_device] == devices
    Predictor(Tiny(3, lambda x: x), EvalConfig(noise_device="cpu"), DataConfig()).classes(image, [1])  # draws nothing


@pytest.mark.parametrize("setting", ["model", "cpu"])
def test_a_stepwise_model_asks_for_generators_on_the_device_of_its_features(no_copies, setting):
    model = TinyStepwise(3, lambda x: x)
    model.noise_device = setting
    model.generators_for(torch.empty(2, 1, device=GPU), [1, 2])
    assert ("meta" in no_copies) == (setting == "model")


@pytest.mark.gpu
def test_on_a_gpu():
    gpu = torch.device("cuda")
    alone = draw(normal, generators([8], 1, device=gpu), gpu)
    assert alone.device.type == "cuda"
    assert torch.equal(draw(normal, generators([7, 8], 2, device=gpu), gpu)[1], alone[0])
    on_host = draw(normal, generators([7, 8], 2, device=gpu, noise_device="cpu"), gpu)
    assert torch.equal(on_host.cpu(), draw(normal, generators([7, 8], 2), torch.device("cpu")))
