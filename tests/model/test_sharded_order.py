# SPDX-License-Identifier: Apache-2.0
"""Weights that are sharded are gathered by all processes together, so all must ask for them in one order."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor

from support import load_model, render_image


class Gathers:
    """Writes down which modules are run, and whose weights are read from outside, in order.

    Args:
        model: to watch.
        monkeypatch: undoes the watching.
    """

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.order: list[str] = []
        names = {module: name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
        running: list[nn.Module] = []
        for module in names:
            module.register_forward_pre_hook(lambda module, _: running.append(module))
            module.register_forward_pre_hook(lambda module, _: self.order.append(names[module]))
            module.register_forward_hook(lambda module, *_: running.remove(module))
        read = nn.Module.__getattr__

        def read_and_note(module: nn.Module, name: str) -> object:
            value = read(module, name)
            if isinstance(value, nn.Parameter) and module in names and module not in running:
                self.order.append(f"{names[module]}.{name} from outside")
            return value

        monkeypatch.setattr(nn.Module, "__getattr__", read_and_note)

    def of(self, model: nn.Module, inputs: dict) -> list[str]:
        self.order.clear()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return list(self.order)


@pytest.fixture(params=[0, 16], ids=["plain", "with text queries"])
def asked(request, tiny_repo):
    """A model in training, and its processor."""
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    config.resampler_config.num_text_queries = request.param
    processor = AutoProcessor.from_pretrained(tiny_repo, trust_remote_code=True, num_text_queries=request.param)
    return load_model(tiny_repo, config=config).train(), processor


def test_weights_are_gathered_in_one_order_whatever_the_images(asked, monkeypatch):
    model, processor = asked
    gathers = Gathers(model, monkeypatch)
    wide, tall, small = render_image(60, 180), render_image(150, 60, seed=1), render_image(40, 40, seed=2)
    rows = {
        "text": ("Hi", None),
        "one image": ("<image>Hi", [wide]),
        "images of three shapes": ("<image>a<image>b<image>c", [wide, tall, small]),
    }
    orders = {}
    for name, (text, images) in rows.items():
        inputs = processor(text=text, images=images, return_tensors="pt")
        orders[name] = gathers.of(model, inputs)
        assert all(parameter.grad is not None for parameter in model.model.resampler.parameters()), name
    assert orders["one image"] == orders["text"]
    assert orders["images of three shapes"] == orders["text"]
    vision = [name for name in orders["text"] if "resampler" in name]
    assert len(set(vision)) == len(vision), "each of the resampler's weights is gathered once"
    assert not [name for name in vision if name.endswith("from outside")]


def test_a_pass_without_images_adds_nothing(asked):
    model, processor = asked
    inputs = processor(text="Hi", return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    found = model.train()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.model.resampler.parameters())
