"""Backbones: images in, named features out.

Every backbone says which features it has, how its parameters lie in layers (for layer-wise decay
and gradual unfreezing) and which weight matrix is the last one that all heads share. torchvision's
networks keep torchvision's parameter names, so that its weight files fit as they are.
"""

# B batch, H W pixels, F features, N tokens

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from mtl_cli.errors import CheckpointError, ConfigError, DataError, nearest

log = logging.getLogger(__name__)

Layers = list[tuple[str, tuple[str, ...]]]

# Parameters under these names are torchvision's 1000-class head; they are left behind on purpose.
_CLASSIFIERS = ("fc.", "classifier.", "heads.")


class Backbone(nn.Module):
    """Base of all backbones.

    Args:
        available: every feature that the network has -> its number of channels.
        features: the features that ``forward`` returns.

    Attributes:
        channels: feature name -> number of channels, for the features asked for.

    Shape:
        images float [B,3,H,W], normalised -> {"pool": [B,F], "c2".."c5": [B,F,H/s,W/s] at stride
        s = 4, 8, 16, 32, "tokens": [B,N,F]}, as far as asked for and available.
    """

    def __init__(self, available: Mapping[str, int], features: Sequence[str]) -> None:
        super().__init__()
        unknown = [name for name in features if name not in available]
        if unknown or not features:
            found = f"found {', '.join(unknown)}" if unknown else "found none"
            hint = nearest(unknown[0], available) if unknown else ""
            raise ConfigError(
                f"backbone.features: not what {type(self).__name__} has "
                f"({found}, expected some of {', '.join(available)}){hint}"
            )
        self.channels = {name: available[name] for name in features}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> {feature name: tensor}."""
        raise NotImplementedError

    def layers(self) -> Layers:
        """Layers from the input up: (name, prefixes of parameter names at a dot)."""
        raise NotImplementedError

    def last_shared(self) -> str:
        """Name of the last module with a weight matrix: GradNorm's last shared layer."""
        names = [n for n, p in self.named_parameters() if n.endswith(".weight") and p.ndim > 1]
        return names[-1].removesuffix(".weight")

    def _asked(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: found[name] for name in self.channels}


class Tiny(Backbone):
    """Four blocks of convolution, BatchNorm and ReLU: quick at 32-64 pixels on a CPU.

    Each block halves the resolution; the width grows 1, 2, 4, 8 times.

    Args:
        width: channels of the first block.
        features: some of pool, c2, c3, c4 (strides 4, 8, 16).
    """

    def __init__(self, width: int = 24, features: Sequence[str] = ("pool",)) -> None:
        widths = [width, 2 * width, 4 * width, 8 * width]
        maps = dict(zip(("c2", "c3", "c4"), widths[1:], strict=True))
        super().__init__({"pool": widths[-1], **maps}, features)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            )
            for before, after in zip([3, *widths], widths, strict=False)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> {feature name: tensor}."""
        x, maps = images, {}
        for stage, block in enumerate(self.blocks, start=1):
            x = maps[f"c{stage}"] = block(x)
        return self._asked({**maps, "pool": x.mean((2, 3))})

    def layers(self) -> Layers:
        """The four blocks."""
        names = ("stem", "block1", "block2", "block3")
        return [(name, (f"blocks.{i}",)) for i, name in enumerate(names)]


class ResNet(Backbone):
    """He et al., CVPR 2016 (arXiv 1512.03385); torchvision's networks without the classifier.

    Args:
        name: resnet18, resnet34 or resnet50.
        pretrained: false, true (torchvision's ImageNet weights) or the path of a state_dict.
        features: some of pool, c2, c3, c4, c5.
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    names = ("resnet18", "resnet34", "resnet50")
    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self, name: str, pretrained: bool | str = False, features: Sequence[str] = ("pool",)
    ) -> None:
        net = _torchvision(name, self.names)
        width = net.fc.in_features
        super().__init__({"pool": width, **_pyramid(width)}, features)
        for child_name, child in net.named_children():
            if child_name not in ("avgpool", "fc"):
                self.add_module(child_name, child)
        load_pretrained(self, name, pretrained)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> {feature name: tensor}."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = {}
        for stage, layer in enumerate(self.stages, start=2):
            x = maps[f"c{stage}"] = getattr(self, layer)(x)
        return self._asked({**maps, "pool": x.mean((2, 3))})

    def layers(self) -> Layers:
        """The stem and the four stages."""
        return [("stem", ("conv1", "bn1")), *((name, (name,)) for name in self.stages)]


class _Staged(Backbone):
    """A torchvision network whose ``features`` are one sequence, cut into stages.

    Class attributes:
        stages: (layer name, index of the first module, index after the last, map or "").
    """

    stages: tuple[tuple[str, int, int, str], ...]

    def __init__(self, net: Any, available: Mapping[str, int], features: Sequence[str]) -> None:
        super().__init__(available, features)
        self.features = net.features

    def _maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, maps = images, {}
        modules = list(self.features)
        for _, first, end, name in self.stages:
            for module in modules[first:end]:
                x = module(x)
            maps[name] = x
        return x, maps

    def layers(self) -> Layers:
        """The stem and the stages."""
        return [
            (layer, tuple(f"features.{i}" for i in range(first, end)))
            for layer, first, end, _ in self.stages
        ]


class MobileNetV3(_Staged):
    """Howard et al., ICCV 2019 (arXiv 1905.02244); torchvision's network without the classifier.

    Args:
        name: mobilenet_v3_large.
        pretrained: false, true (torchvision's ImageNet weights) or the path of a state_dict.
        features: some of pool, c2, c3, c4, c5.
    """

    names = ("mobilenet_v3_large",)
    stages = (
        ("stem", 0, 2, ""),
        ("stage1", 2, 4, "c2"),
        ("stage2", 4, 7, "c3"),
        ("stage3", 7, 13, "c4"),
        ("stage4", 13, 17, "c5"),
    )

    def __init__(
        self, name: str, pretrained: bool | str = False, features: Sequence[str] = ("pool",)
    ) -> None:
        available = {"pool": 960, "c2": 24, "c3": 40, "c4": 112, "c5": 960}
        super().__init__(_torchvision(name, self.names), available, features)
        load_pretrained(self, name, pretrained)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> {feature name: tensor}."""
        x, maps = self._maps(images)
        return self._asked({**maps, "pool": x.mean((2, 3))})


class ConvNeXt(_Staged):
    """Liu et al., CVPR 2022 (arXiv 2201.03545); torchvision's network without the classifier.

    The classifier's LayerNorm stays: it belongs to the features.

    Args:
        name: convnext_tiny.
        pretrained: false, true (torchvision's ImageNet weights) or the path of a state_dict.
        features: some of pool, c2, c3, c4, c5.
    """

    names = ("convnext_tiny",)
    stages = (
        ("stem", 0, 1, ""),
        ("stage1", 1, 2, "c2"),
        ("stage2", 2, 4, "c3"),
        ("stage3", 4, 6, "c4"),
        ("stage4", 6, 8, "c5"),
    )

    def __init__(
        self, name: str, pretrained: bool | str = False, features: Sequence[str] = ("pool",)
    ) -> None:
        net = _torchvision(name, self.names)
        width = net.classifier[2].in_features
        super().__init__(net, {"pool": width, **_pyramid(width)}, features)
        self.classifier = net.classifier[:1]  # keeps the name classifier.0 of the weight files
        load_pretrained(self, name, pretrained)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> {feature name: tensor}."""
        x, maps = self._maps(images)
        pool = self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)
        return self._asked({**maps, "pool": pool})

    def layers(self) -> Layers:
        """The stem and the stages; the last norm lies in the last stage."""
        *lower, (name, prefixes) = super().layers()
        return [*lower, (name, (*prefixes, "classifier"))]


class ViT(Backbone):
    """Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929); torchvision's network without the head.

    Args:
        name: vit_b_16.
        image_size: side of the images in pixels, a multiple of the patch size 16. Pretrained
            positional embeddings of another size are interpolated (bicubic).
        pretrained: false, true (torchvision's ImageNet weights) or the path of a state_dict.
        features: some of pool (the class token) and tokens (the patches, row by row).
    """

    names = ("vit_b_16",)
    patch_size = 16

    def __init__(
        self,
        name: str,
        image_size: int,
        pretrained: bool | str = False,
        features: Sequence[str] = ("pool",),
    ) -> None:
        if image_size % self.patch_size or image_size <= 0:
            raise ConfigError(
                f"backbone.image_size: must be a multiple of {self.patch_size} for {name} "
                f"(found {image_size}); set data.image_size="
                f"{max(1, round(image_size / self.patch_size)) * self.patch_size}"
            )
        net = _torchvision(name, self.names, image_size=image_size)
        super().__init__({"pool": net.hidden_dim, "tokens": net.hidden_dim}, features)
        self.image_size = image_size
        self.class_token, self.conv_proj, self.encoder = net.class_token, net.conv_proj, net.encoder
        load_pretrained(self, name, pretrained)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> {feature name: tensor}."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ConfigError(
                f"backbone.image_size: the images are {images.shape[-2]}x{images.shape[-1]} "
                f"(expected {self.image_size}x{self.image_size}); set it to data.image_size"
            )
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(patches), -1, -1)
        tokens = self.encoder(torch.cat([first, patches], dim=1))
        return self._asked({"pool": tokens[:, 0], "tokens": tokens[:, 1:]})

    def layers(self) -> Layers:
        """The embedding and the encoder's blocks; the last norm lies in the last block."""
        blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(len(self.encoder.layers))]
        layers: Layers = [("stem", ("class_token", "conv_proj", "encoder.pos_embedding"))]
        layers += [(f"block{i + 1}", (prefix,)) for i, prefix in enumerate(blocks)]
        layers[-1] = (layers[-1][0], (blocks[-1], "encoder.ln"))
        return layers


def weight_file(name: str) -> tuple[str, Path]:
    """Where torchvision's default weights of a network come from and where they are kept.

    Args:
        name: torchvision's name of the network, e.g. ``resnet50``.

    Returns:
        the URL and the path in torch's download cache.
    """
    from torchvision import models

    url = models.get_model_weights(name).DEFAULT.url
    return url, Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def load_pretrained(backbone: Backbone, name: str, pretrained: bool | str) -> None:
    """Fill a backbone with torchvision's weights or with those of a file.

    Args:
        backbone: freshly initialised.
        name: torchvision's name of the network.
        pretrained: false does nothing; true takes torchvision's default weights from its download
            cache, else from the network; a path is a state_dict, loaded with ``weights_only``.

    Raises:
        DataError: there is no such file, or it cannot be downloaded.
        CheckpointError: the file is damaged, or it does not fit the backbone.
    """
    if pretrained is False:
        return
    if pretrained is True:
        source, state = _published(name)
    else:
        source, state = str(pretrained), _read_state(Path(pretrained))
    if isinstance(backbone, ViT):
        state = _at_image_size(state, backbone)
    _fill(backbone, state, source)


def _torchvision(name: str, names: Sequence[str], **arguments: Any) -> Any:
    """The network with its classifier, initialised as torchvision does."""
    if name not in names:
        raise ConfigError(
            f"backbone.name: no such network (found {name}, expected {', '.join(names)})"
            f"{nearest(name, names)}"
        )
    from torchvision import models  # takes seconds; the default backbone does without

    return models.get_model(name, weights=None, **arguments)


def _pyramid(width: int) -> dict[str, int]:
    """Channels of c2..c5 where each stage doubles them up to ``width``."""
    return {"c2": width // 8, "c3": width // 4, "c4": width // 2, "c5": width}


def _published(name: str) -> tuple[str, dict[str, Tensor]]:
    from torchvision import models

    url, path = weight_file(name)
    bring = f"bring {url} to {path}, or set backbone.pretrained=false or to the path of a file"
    try:
        weights = models.get_model_weights(name).DEFAULT
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        problem = f"cannot download the weights of {name} ({error})"
        raise DataError(f"backbone.pretrained: {problem}; {bring}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        problem = f"damaged weights of {name} ({_first_line(error)})"
        raise DataError(f"backbone.pretrained: {problem}; delete {path}, then {bring}") from error
    return str(path), cast("dict[str, Tensor]", state)


def _read_state(path: Path) -> dict[str, Tensor]:
    """Read a state_dict; one level of ``state_dict`` or ``model`` around it is taken off."""
    try:
        state = torch.load(path.expanduser(), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        message = (
            f"backbone.pretrained: no such file (found {path}); give a state_dict, true or false"
        )
        raise DataError(message) from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: not a file of plain tensors ({_first_line(error)}); save a state_dict"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict (found {type(state).__name__})")
    return {_bare(name): tensor for name, tensor in state.items()}


def _bare(name: str) -> str:
    """Name without what wrappers and whole models put before it."""
    return name.removeprefix("module.").removeprefix("backbone.")


def _at_image_size(state: dict[str, Tensor], backbone: ViT) -> dict[str, Tensor]:
    """Interpolate a ViT's positional embedding to the backbone's image size."""
    embedding = state.get("encoder.pos_embedding")
    own = backbone.encoder.pos_embedding
    if embedding is None or embedding.shape == own.shape or embedding.shape[-1] != own.shape[-1]:
        return state
    from torchvision.models.vision_transformer import interpolate_embeddings

    log.info(
        "positional embedding interpolated from %d to %d tokens", embedding.shape[1], own.shape[1]
    )
    new = interpolate_embeddings(backbone.image_size, backbone.patch_size, dict(state))
    return cast("dict[str, Tensor]", new)


def _fill(backbone: Backbone, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of the backbone from ``state`` or refuse, and report what was left over."""
    own = backbone.state_dict()
    # Files from before torch 0.4.1 lack this counter, which no evaluation reads.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    other_shape = [n for n in own if n in state and state[n].shape != own[n].shape]
    if missing or other_shape:
        examples = [f"{n} missing" for n in missing[:2]]
        for name in other_shape[:2]:
            found, expected = list(state[name].shape), list(own[name].shape)
            examples.append(f"{name} is {found}, expected {expected}")
        raise CheckpointError(
            f"{source}: does not fit the backbone ({len(missing)} tensors missing, "
            f"{len(other_shape)} of another shape of {len(own)}: {'; '.join(examples)})"
        )
    unexpected = [n for n in state if n not in own and not n.startswith(_CLASSIFIERS)]
    if unexpected:
        listed = ", ".join(unexpected[:3])
        log.warning("%s: %d tensors have no place: %s", source, len(unexpected), listed)
    backbone.load_state_dict({n: t for n, t in state.items() if n in own}, strict=False)
    log.info("%s: %d of %d backbone tensors loaded", source, len(own), len(own))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
