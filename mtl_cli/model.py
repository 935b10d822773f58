"""The network: a backbone that runs once, and one head per task on its features."""

# B batch, H W pixels, F features, C outputs of a head

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from mtl_cli.task import mix64

Part = TypeVar("Part", bound=nn.Module)


class ByTask(nn.Module, Generic[Part]):
    """Modules by task name; unlike ``nn.ModuleDict`` a task may be called ``type`` or ``train``."""

    def __init__(self, modules: Mapping[str, Part]) -> None:
        super().__init__()
        self._modules.update(modules)

    def __getitem__(self, task: str) -> Part:
        return cast(Part, self._modules[task])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)


class MultiTaskModel(nn.Module):
    """Hard parameter sharing: every head reads the features of one backbone pass.

    Args:
        backbone: images [B,3,H,W] -> {feature name: tensor}.
        heads: task name -> head, features -> [B,C].
    """

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = ByTask(heads)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Run the backbone once."""
        features: dict[str, Tensor] = self.backbone(images)
        return features

    def outputs(
        self, features: dict[str, Tensor], tasks: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Run the heads of ``tasks`` (all by default) on the features."""
        names = self.heads if tasks is None else tasks
        return {name: self.heads[name](features) for name in names}

    def forward(self, images: Tensor, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Images [B,3,H,W], normalised -> raw outputs {task: [B,C]}."""
        return self.outputs(self.features(images), tasks)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that more than one task can reach."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def task_parameters(self, task: str) -> list[nn.Parameter]:
        """Trainable parameters of one task's head."""
        return [p for p in self.heads[task].parameters() if p.requires_grad]

    def last_layer(self) -> nn.Module:
        """The last layer with a weight matrix that all tasks pass through."""
        name: str = self.backbone.last_shared()  # type: ignore[operator]
        return self.backbone.get_submodule(name)

    def last_shared(self) -> list[nn.Parameter]:
        """Trainable parameters of the last shared layer."""
        return [p for p in self.last_layer().parameters() if p.requires_grad]

    def layers(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        """The backbone's layers from the input up: (name, parameter-name prefixes)."""
        layers: Sequence[tuple[str, tuple[str, ...]]] = self.backbone.layers()  # type: ignore[operator]
        return layers


class NamedSeed:
    """Context in which initialisation depends on (seed, module name) alone.

    Adding a head then leaves the initial weights of all others as they were.
    """

    def __init__(self, seed: int, name: str) -> None:
        self.seed = mix64(seed, zlib.crc32(name.encode()))

    def __enter__(self) -> None:
        self.fork = torch.random.fork_rng(devices=[])
        self.fork.__enter__()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        self.fork.__exit__(None, None, None)
