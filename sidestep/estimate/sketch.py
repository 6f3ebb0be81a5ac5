"""The mean gradient of every layer as random sketches, and its leading singular directions out of them.

For the mean gradient G [O, I] and fixed random matrices, Y = G Omega and Z = G^T Psi are accumulated; G is then known
to be near Q X, where Q spans Y and X solves Psi^T Q X = Z^T. Source: Tropp, Yurtsever, Udell, Cevher, "Practical
sketching algorithms for low-rank matrix approximation", 2017, algorithm 4. Where the sketches are as wide as the layer
this is exact.

B batch, S positions, I inputs, O outputs, K and L columns of the sketches, R directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sidestep.estimate.taps import Shape
from sidestep.model.capabilities import capabilities

OVERSAMPLING = (
    8  # Columns beyond the directions wanted; 5 to 10 are usual (Halko, Martinsson, Tropp 2011, section 4.2).
)


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading singular triplets of a layer's mean gradient: `left_OR`, `values_R` falling, `right_IR`.

    The vectors are in the model's dtype, on its device; the values in float32, on the CPU.
    """

    left_OR: Tensor
    values_R: Tensor
    right_IR: Tensor


class _PerSample:
    """Collects numbers of every sample, a batch at a time, where a captured pass can write them again and again."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._places: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []
        self.now = torch.empty(0)
        self.count = 0

    def begin(self, samples: int) -> None:
        """Make `now` a place for a batch of so many samples: the same one each time."""
        if samples not in self._places:
            self._places[samples] = torch.zeros(samples, *self._shape, device=self._device)
        self.now = self._places[samples]

    def end(self) -> None:
        """Keep what is in `now`."""
        self._kept.append(self.now.clone())
        self.count += len(self.now)

    def all(self) -> Tensor:
        """Return what was kept, [samples, ...]."""
        return torch.cat(self._kept)


class Sketch:
    """A recorder that accumulates both sketches of every layer, and estimates the norm of each sample's gradient.

    `scale` is what losses were multiplied by. Random matrices have orthonormal columns and are shared by all layers of
    a size, so what is held is (O x K + I x L) float32 numbers a layer.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        *,
        width: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> None:
        self._shapes = shapes
        self._scale = scale
        self._device = device
        self._dtype = dtype
        self._row = {module: row for row, module in enumerate(shapes)}
        width += OVERSAMPLING
        outputs, inputs = ({shape[side] for shape in shapes.values()} for side in (0, 1))
        # Rounded to the model's dtype once: the decomposition has to know the very numbers that were multiplied by.
        self._omega = {size: _orthonormal(size, width, seed, device).to(dtype) for size in inputs}
        self._psi = {size: _orthonormal(size, 2 * width, -seed - 1, device).to(dtype) for size in outputs}
        self._range: dict[str, Tensor] = {}
        self._corange: dict[str, Tensor] = {}
        for module, (outputs, inputs) in shapes.items():
            self._range[module] = torch.zeros(outputs, self._omega[inputs].shape[1], device=device)
            self._corange[module] = torch.zeros(inputs, self._psi[outputs].shape[1], device=device)
        self.samples = _PerSample(len(shapes), device=device)

    def take(self, module: str, inputs_BSI: Tensor, gradients_BSO: Tensor) -> None:
        """Add a layer's gradient to its sketches."""
        outputs, inputs = self._shapes[module]
        omega_IK = self._omega[inputs]
        image_BOK = gradients_BSO.mT @ (inputs_BSI @ omega_IK)
        coimage_BIL = inputs_BSI.mT @ (gradients_BSO @ self._psi[outputs])
        self._range[module] += image_BOK.float().sum(0)
        self._corange[module] += coimage_BIL.float().sum(0)
        # Random orthonormal columns keep K / I of the squared norm on average.
        share = omega_IK.shape[1] / inputs
        self.samples.now[:, self._row[module]] = image_BOK.float().square().sum((1, 2)) / share

    def norms(self) -> Tensor:
        """Return the norm of each sample's gradient, [samples, layers], in the order they were taken."""
        return self.samples.all().sqrt() / self._scale

    def directions(self, module: str, count: int) -> Directions:
        """Return up to `count` singular directions of a layer's mean gradient, and let its sketches go."""
        outputs, _ = self._shapes[module]
        # In float64, and rounded afterwards: LAPACK's last digits depend on where in memory its input lies.
        basis_OK = torch.linalg.qr(_precise(self._range.pop(module))).Q
        seen_LK = _precise(self._psi[outputs]).T @ basis_OK
        core_KI = torch.linalg.lstsq(seen_LK, _precise(self._corange.pop(module)).T).solution
        # A tall factor first: the decomposition itself is then of a small square.
        right_IK, triangle_KK = torch.linalg.qr(core_KI.T)
        left_KK, values_K, turned_KK = torch.linalg.svd(triangle_KK.T)
        count = min(count, len(values_K))
        return Directions(
            left_OR=self._rounded(basis_OK @ left_KK[:, :count]),
            values_R=(values_K[:count] / (self.samples.count * self._scale)).float().cpu(),
            right_IR=self._rounded(right_IK @ turned_KK[:count].T),
        )

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)


class Probe:
    """A recorder of how much of each sample's gradient lies along given directions: u_i^T G v_i, exactly."""

    def __init__(self, directions: Mapping[str, Directions], *, scale: float = 1.0) -> None:
        self._directions = directions
        self._row = {module: row for row, module in enumerate(directions)}
        width = max(len(found.values_R) for found in directions.values())
        self.samples = _PerSample(len(directions), width, device=next(iter(directions.values())).left_OR.device)
        self._scale = scale

    def take(self, module: str, inputs_BSI: Tensor, gradients_BSO: Tensor) -> None:
        """Take the parts of a layer's gradient along its directions."""
        along = self._directions[module]
        left_BSR = gradients_BSO @ along.left_OR
        right_BSR = inputs_BSI @ along.right_IR
        parts_BR = (left_BSR.float() * right_BSR.float()).sum(1)
        self.samples.now[:, self._row[module], : parts_BR.shape[1]] = parts_BR

    def parts(self) -> Tensor:
        """Return [samples, layers, directions]; zero beyond a layer's own directions."""
        return self.samples.all() / self._scale


def _precise(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU where the device has no such numbers."""
    return tensor.double() if capabilities(tensor.device).has_float64 else tensor.cpu().double()


def _orthonormal(size: int, width: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + size)
    return torch.linalg.qr(torch.randn(size, min(size, width), generator=generator)).Q.to(device)
