"""Checkpoints of several ranks, each with a piece of every tensor."""

from collections.abc import Sequence

import numpy as np

from dsjax.errors import CheckpointError
from policies.base import Shape
from policies.sources.files import FLOATS, FileTensor, aligned_empty, check_kind


def by_name(origin: str, ranks: Sequence[dict[str, FileTensor]]) -> dict[str, list[FileTensor]]:
    """The ranks' pieces of each tensor.

    Args:
      origin: where they come from, for messages.
      ranks: what each holds.

    Raises:
      CheckpointError: they do not hold equal pieces of the same tensors.
    """
    for rank, part in enumerate(ranks):
        if part.keys() != ranks[0].keys():
            name = min(part.keys() ^ ranks[0].keys())
            raise CheckpointError(
                f"{origin}: ranks 0 and {rank} should hold pieces of the same tensors, but only one has '{name}'"
            )
    pieces = {name: [part[name] for part in ranks] for name in ranks[0]}
    for name, (first, *others) in pieces.items():
        if any(other.shape != first.shape or other.kind != first.kind for other in others):
            raise CheckpointError(f"{origin}: the pieces of tensor '{name}' differ in shape or dtype")
    return pieces


class Pieces:
    """Reads tensors that lie in pieces in the files of several ranks; a subclass says how they were cut."""

    pieces: dict[str, list[FileTensor]]

    def cut_axis(self, name: str, piece: Shape) -> int | None:
        """The axis along which a tensor was cut into such pieces, or `None` where each rank has the whole."""
        raise NotImplementedError

    def _axis(self, name: str) -> int | None:
        pieces = self.pieces[name]
        return None if len(pieces) == 1 else self.cut_axis(name, pieces[0].shape)

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name, its pieces put together."""
        return {name: self._shape(name) for name in self.pieces}

    def _shape(self, name: str) -> Shape:
        pieces, axis = self.pieces[name], self._axis(name)
        return tuple(size * (len(pieces) if i == axis else 1) for i, size in enumerate(pieces[0].shape))

    def stored(self, name: str) -> tuple[str, int]:
        """The dtype of one tensor as safetensors spells it, and its size in bytes.

        Raises:
          CheckpointError: the dtype is not read; it is named.
        """
        pieces = self.pieces[name]
        check_kind(pieces[0].kind, f"{pieces[0].path}: tensor '{name}'")
        return pieces[0].kind, pieces[0].nbytes * (1 if self._axis(name) is None else len(pieces))

    def read(self, name: str) -> np.ndarray:
        """One tensor in memory of its own, as stored.

        Raises:
          CheckpointError: a file is missing or was damaged since its header was read.
        """
        pieces, axis = self.pieces[name], self._axis(name)
        if axis is None:
            return pieces[0].read()
        whole = aligned_empty(self._shape(name), FLOATS[pieces[0].kind])
        self.join(name, pieces, whole, axis)
        return whole

    def join(self, name: str, pieces: list[FileTensor], whole: np.ndarray, axis: int) -> None:
        """Read the pieces into the whole tensor."""
        for piece, part in zip(pieces, np.split(whole, len(pieces), axis), strict=True):
            piece.read(part)
