"""Using a trained model: ``mtl_cli.load(RUN).predict(image)``."""

# B batch, S side of the decoded image, H W pixels the network sees

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from mtl_cli import build, checkpoint, device
from mtl_cli.data import images
from mtl_cli.errors import DataError
from mtl_cli.metrics import predict
from mtl_cli.model import MultiTaskModel
from mtl_cli.precision import as_input
from mtl_cli.task import Task

BATCH = 64


class Predictor:
    """A model with all that it needs to read images and to say what it sees.

    Args:
        config: the run's config.
        tasks: the tasks, with classes, units and scales.
        model: the model, in eval mode.
        where: device of the model.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tasks: Sequence[Task],
        model: MultiTaskModel,
        where: torch.device,
    ) -> None:
        self.tasks = tuple(tasks)
        self.model = model.to(where).eval()
        self.device = where
        self.dtype = "fp64" if config["precision"]["dtype"] == "fp64" else "fp32"
        data = config["data"]
        self.size: int = data["image_size"]
        self.decoded_size = round(self.size * (1 + data["margin"]))
        self.resize: str = data["resize"]

    @classmethod
    def load(cls, run: str | Path, device: str = "auto") -> Predictor:
        """From a run directory (best checkpoint) or a checkpoint file.

        Raises:
            CheckpointError: there is no usable checkpoint.
        """
        state = checkpoint.load(checkpoint.find(Path(run).expanduser()))
        config, tasks, model = build.reopen(state)
        return cls(config, tasks, model, _device(device))

    def predict(self, image: str | Path | Image.Image | np.ndarray) -> dict[str, dict[str, Any]]:
        """Predict every task for one image.

        Args:
            image: a path, a Pillow image, or a uint8 array [H,W,3].

        Returns:
            task -> ``{"value", "unit"}``, ``{"class", "probabilities"}`` or
            ``{"labels", "probabilities"}``.

        Raises:
            DataError: the image cannot be decoded.
        """
        raw = self.raw(self.decode(image).unsqueeze(0))
        return {task.name: predict(task, raw[task.name][0]) for task in self.tasks}

    def decode(self, image: str | Path | Image.Image | np.ndarray) -> Tensor:
        """Read, resize and crop as the evaluation does: uint8 [3,H,W]."""
        if isinstance(image, (str, Path)):
            pixels = images.load(image, self.decoded_size, self.resize)
        else:
            _refuse_odd(image)
            opened = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            pixels = images.square(images.to_rgb(opened), self.decoded_size, self.resize)
        whole = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
        cropped: Tensor = center_crop(whole, [self.size, self.size])
        return cropped

    def raw(self, batch: Tensor) -> dict[str, Tensor]:
        """Raw outputs {task: [B,C]} of uint8 images [B,3,H,W]."""
        with torch.inference_mode():
            outputs = self.model(as_input(batch.to(self.device), self.dtype))
        return {name: out.float().cpu() for name, out in outputs.items()}

    def batches(
        self, paths: Sequence[str], failed: list[str]
    ) -> Iterator[tuple[Sequence[str], dict[str, Tensor]]]:
        """Names and raw outputs of many files, ``BATCH`` at a time.

        Args:
            paths: the files.
            failed: takes a message for every file that cannot be decoded; it is left out.
        """
        for start in range(0, len(paths), BATCH):
            names, decoded = [], []
            for path in paths[start : start + BATCH]:
                try:
                    decoded.append(self.decode(path))
                except DataError as error:
                    failed.append(str(error))
                else:
                    names.append(path)
            if names:
                yield names, self.raw(torch.stack(decoded))


def _refuse_odd(image: object) -> None:
    """Raise a DataError on anything but a Pillow image or a uint8 array [H,W,3]."""
    if isinstance(image, Image.Image):
        return
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        if image.shape[2] == 3:
            return
        found = f"a uint8 array {list(image.shape)}"
    elif isinstance(image, np.ndarray):
        found = f"a {image.dtype} array {list(image.shape)}"
    else:
        found = f"a {type(image).__name__}"
    raise DataError(
        f"predict: found {found}, expected a path, a Pillow image or a uint8 array [H,W,3]"
    )


def _device(name: str) -> torch.device:
    return device.resolve(name)
