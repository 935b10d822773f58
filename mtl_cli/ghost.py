"""Products of one layer's weight gradients, without the weight gradients."""

# K objectives, B batch, T positions (batch x places of a convolution), D inputs, C outputs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_cli.rows import Grads, gramian_of, zeros_for


class GhostLayer:
    """Watches one forward pass of a linear or convolution layer; gives its exact Gramian.

    The weight gradient of objective i is delta_i' X, so <delta_i' X, delta_j' X> = <delta_i, A
    delta_j> with A = X X' [T,T], which all objectives share (Goodfellow 2015, arXiv 1510.01799;
    Li et al., ICLR 2022, arXiv 2110.05679, call it the ghost norm). It costs T^2 (D + K C)
    multiplications against K T D C of the explicit gradients: less where the maps are small.

    Args:
        layer: the module; anything but a plain linear or 2-d convolution layer is not handled.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._seen: tuple[Tensor, Tensor, int] | None = None
        self._hook = layer.register_forward_hook(self._keep) if _handled(layer) else None

    def gramian(self, features: Sequence[Tensor], rows: Sequence[Grads]) -> Tensor | None:
        """The Gramian of the layer's parameters, or None where explicit gradients are cheaper.

        Args:
            features: what the graph ends in.
            rows: K gradients of the features.

        Returns:
            [K,K] float64 on the CPU.
        """
        seen = self.release()
        if seen is None:
            return None
        inputs, output, version = seen
        if output._version != version:  # overwritten in place: its gradient is another one's
            return None
        x = _as_matrix(self.layer, inputs.detach())
        count, (positions, depth), channels = len(rows), x.shape, output.shape[_channel(self.layer)]
        if positions * (depth + count * channels) >= count * depth * channels:
            return None
        deltas = []
        for row in rows:
            (delta,) = torch.autograd.grad(
                features, [output], grad_outputs=row, retain_graph=True, allow_unused=True
            )
            (delta,) = zeros_for([output], [delta])
            deltas.append(delta.movedim(_channel(self.layer), -1).reshape(-1, channels).to(x.dtype))
        products = x @ x.T
        bias = getattr(self.layer, "bias", None)
        if bias is not None and bias.requires_grad:
            products += 1
        return gramian_of([[d] for d in deltas], [[products @ d] for d in deltas])

    def release(self) -> tuple[Tensor, Tensor, int] | None:
        """Stop watching; what was seen (input, output, the output's version)."""
        if self._hook is not None:
            self._hook.remove()
        seen, self._seen, self._hook = self._seen, None, None
        return seen

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._seen = (inputs[0], output, output._version)


def _handled(layer: nn.Module) -> bool:
    """True for layers whose weight gradient is delta' X, weight trainable."""
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str) and layer.weight.requires_grad
    return type(layer) is nn.Linear and layer.weight.requires_grad


def _channel(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Conv2d) else -1


def _as_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's inputs as [T,D] float64: products in float32 would hide dependent gradients."""
    x = x.double() if x.device.type != "mps" else x.float()
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return columns.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)
