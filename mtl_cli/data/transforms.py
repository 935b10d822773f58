"""Augmentation: what a training image may look like, as torchvision.transforms.v2 pipelines.

A pipeline draws from torch's global generator; :func:`seeded` makes every draw a function of one
integer and gives the caller's stream back untouched. The loader seeds each sample with
(seed, stage, epoch, index), so an image does not depend on the batch, the worker or a resume.
"""

# S side of the decoded image, H = W side of what the network sees

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import v2

from mtl_cli.errors import ConfigError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block with torch's CPU generator seeded, then restore it.

    ``torch.manual_seed`` is 20 times slower: it also queues seeds for every CUDA device.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


class Augment:
    """A family of pipelines, one per output size.

    Shape:
        image uint8 [3,S,S] -> uint8 [3,H,W] with H = W = size <= S.
    """

    def __init__(self) -> None:
        self._pipelines: dict[int, v2.Transform] = {}

    def pipeline(self, size: int) -> v2.Transform:
        """The torchvision pipeline that ends in ``size`` x ``size``."""
        raise NotImplementedError

    def __call__(self, image: Tensor, size: int) -> Tensor:
        """Apply the pipeline once, drawing from torch's global generator."""
        if size not in self._pipelines:
            self._pipelines[size] = self.pipeline(size)
        out: Tensor = self._pipelines[size](image)
        return out


class Plain(Augment):
    """No augmentation: the centre crop that evaluation uses."""

    def pipeline(self, size: int) -> v2.Transform:
        """Centre crop."""
        return v2.CenterCrop(size)


class Light(Augment):
    """Random crop inside the decoded margin, and horizontal flip.

    Args:
        flip: probability of a horizontal flip.
    """

    def __init__(self, flip: float = 0.5) -> None:
        super().__init__()
        self.flip = _probability("augment.flip", flip)

    def pipeline(self, size: int) -> v2.Transform:
        """Random crop, then flip."""
        return v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip(self.flip)])


class Strong(Augment):
    """Random crop, flip, RandAugment and random erasing.

    RandAugment: Cubuk et al., NeurIPS 2020 (arXiv 1909.13719). Random erasing: Zhong et al., AAAI
    2020 (arXiv 1708.04896).

    Args:
        flip: probability of a horizontal flip.
        ops: how many random operations are applied in turn.
        magnitude: their strength, 0..30.
        erase: probability of erasing a rectangle.
    """

    def __init__(
        self, flip: float = 0.5, ops: int = 2, magnitude: int = 9, erase: float = 0.25
    ) -> None:
        super().__init__()
        self.flip = _probability("augment.flip", flip)
        self.erase = _probability("augment.erase", erase)
        if not 0 <= magnitude <= 30:
            raise ConfigError(f"augment.magnitude: found {magnitude}, expected 0..30")
        self.ops, self.magnitude = ops, magnitude

    def pipeline(self, size: int) -> v2.Transform:
        """Random crop, flip, RandAugment, erasing."""
        return v2.Compose(
            [
                v2.RandomCrop(size),
                v2.RandomHorizontalFlip(self.flip),
                v2.RandAugment(num_ops=self.ops, magnitude=self.magnitude),
                v2.RandomErasing(self.erase, value=[124.0, 116.0, 104.0]),
            ]
        )


def _probability(key: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{key}: found {value}, expected a probability 0..1")
    return value
