"""The hand-written loop that the benchmarks compare with: PyTorch and torchvision, nothing else."""

# B batch, N images, S decoded side, C outputs of a head

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms import v2

IGNORED = -100  # cross_entropy's mark of a missing class
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255


@dataclass(frozen=True)
class Arrays:
    """A decoded data set on disk, as the tool's cache keeps it.

    Args:
        pixels: raw uint8 file [N,S,S,3].
        side: S.
        rows: training rows.
        kinds: task -> regression, binary or multiclass.
        widths: task -> outputs of its head.
        hidden: width of the heads' hidden layer, 0 for linear heads.
        targets: task -> [N] float, or int64 with ``IGNORED`` where missing.
    """

    pixels: str
    side: int
    rows: list[int]
    kinds: dict[str, str]
    widths: dict[str, int]
    hidden: int
    targets: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write ``arrays.json`` and ``targets.pt``."""
        facts = {k: v for k, v in vars(self).items() if k != "targets"}
        (folder / "arrays.json").write_text(json.dumps(facts))
        torch.save(self.targets, folder / "targets.pt")

    @classmethod
    def load(cls, folder: Path) -> Arrays:
        """Inverse of :meth:`save`."""
        facts = json.loads((folder / "arrays.json").read_text())
        return cls(**facts, targets=torch.load(folder / "targets.pt", weights_only=True))


class PlainModel(nn.Module):
    """torchvision's ResNet-18 and one head per task."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.trunk = resnet18(weights=None)
        width, self.trunk.fc = self.trunk.fc.in_features, nn.Identity()
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(width, arrays.hidden), nn.ReLU(), nn.Linear(arrays.hidden, outputs)
                )
                if arrays.hidden
                else nn.Linear(width, outputs)
                for name, outputs in arrays.widths.items()
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [B,3,H,W] -> raw outputs {task: [B,C]}."""
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


class PlainLoop:
    """Epochs over the training rows: crop and flip per sample, one AdamW step per batch.

    Args:
        arrays: the data.
        size: side of the crops.
        batch_size: B.
        lr: learning rate.
    """

    def __init__(self, arrays: Arrays, size: int, batch_size: int, lr: float) -> None:
        self.arrays, self.batch_size = arrays, batch_size
        side = arrays.side
        raw = np.memmap(arrays.pixels, np.uint8, "c").reshape(-1, side, side, 3)
        self.pixels = torch.from_numpy(raw)
        self.rows = torch.tensor(arrays.rows)
        self.augment = v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip(0.5)])
        self.model = PlainModel(arrays)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr, weight_decay=0.05, fused=True
        )

    def epoch(self) -> int:
        """One pass; returns the number of steps."""
        self.model.train()
        order = self.rows[torch.randperm(len(self.rows))]
        batches = order.split(self.batch_size)[: len(order) // self.batch_size]
        for rows in batches:
            images = torch.stack(
                [self.augment(self.pixels[row].permute(2, 0, 1)) for row in rows.tolist()]
            )
            raw = self.model(images.float().sub_(MEAN).div_(STD))
            loss = sum(self.loss(name, out, rows) for name, out in raw.items())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return len(batches)

    def loss(self, name: str, raw: Tensor, rows: Tensor) -> Tensor:
        """Mean loss of one task over the batch's labels."""
        target = self.arrays.targets[name][rows]
        kind = self.arrays.kinds[name]
        if kind == "multiclass":
            return F.cross_entropy(raw, target, ignore_index=IGNORED)
        if kind == "binary":
            return F.binary_cross_entropy_with_logits(raw.squeeze(1), target)
        return F.l1_loss(raw.squeeze(1), target)
