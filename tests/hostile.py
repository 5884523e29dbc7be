"""Actions that are other ones when they are looked at again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Changes:
    """The action at the first reading; later readings and copies are something else."""

    def __init__(self, action: Array) -> None:
        self.action = action.copy()
        self.later = np.full_like(action, 9)
        self.readings = 0

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:  # noqa: ANN401
        self.readings += 1
        return self.action if self.readings == 1 else self.later

    def __deepcopy__(self, memo: object) -> Array:
        return self.later

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return self.later[index]

    def __len__(self) -> int:
        return len(self.later)


class Lies(np.ndarray):
    """An array whose methods tell of another one."""

    def copy(self, *_: Any) -> Array:  # type: ignore[override]  # noqa: ANN401
        return np.full(self.shape, 9, self.dtype)

    def __deepcopy__(self, memo: object) -> Array:
        return self.copy()

    def astype(self, *_: Any, **__: Any) -> Array:  # type: ignore[override]  # noqa: ANN401
        return self.copy()

    def reshape(self, *_: Any, **__: Any) -> Array:  # type: ignore[override]  # noqa: ANN401
        return self.copy()

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401
        return self.copy()[index]


def hostile(action: Array) -> list[Any]:
    """Return an action, or a batch of them, as objects that deceive whoever reads them twice."""
    masked = np.ma.masked_array(action.copy(), mask=np.ones_like(action, dtype=bool))
    return [Changes(action), action.copy().view(Lies), masked]
