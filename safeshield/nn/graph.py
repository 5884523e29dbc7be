"""A third kind of array, after NumPy's and PyTorch's: a value of an ONNX graph that is written.

Networks, actors and the shield on tensors are functions of tensors. Called with a `Traced` in place
of a tensor, they compute nothing and write the nodes of an ONNX graph that computes the same:

    recorder = Recorder()
    x = recorder.input("x", torch.float32, (BATCH, 3))
    recorder.output("y", network(params, x)[0])
    graph = recorder.graph("network")

PyTorch calls `Traced.__torch_function__` wherever one of its functions meets a `Traced`. Weights
remain tensors, and become constants of the graph. Shapes are known except for one axis, `BATCH`,
whose size is known only when the graph runs. Only the operations that the package needs, and those
of the usual policy networks, can be written; any other raises `CannotExportError`.

The format is that of the package onnx (the extra `onnx`), opset 18.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

BATCH = -1
"""Size, in the shape of a `Traced`, of the axis whose size is known only when the graph runs."""
OPSET, IR_VERSION = 18, 10
"""Versions of the operators and of the file format: ONNX Runtime reads them from 1.18 on."""
ONNX_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float64: 11,
}
_FEW = 64
"""Length of an axis up to which its maximum and minimum are chains of the nodes Max and Min, which
keep NaN. Longer axes use the nodes ReduceMax and ReduceMin."""


class CannotExportError(NotImplementedError):
    """An operation, a policy or a shield that no ONNX graph can be written for."""


class Recorder:
    """The inputs, constants, nodes and outputs of an ONNX graph that is being written."""

    def __init__(self) -> None:
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: list[Any] = []
        self._nodes: list[NodeProto] = []
        self._count = itertools.count()

    def input(
        self,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        default: Tensor | None = None,
        batch: str = "batch",
    ) -> Traced:
        """Return a new input of the graph.

        Args:
            name: Name of the input.
            dtype: Its dtype.
            shape: Its shape, with `BATCH` for an axis of any size.
            default: Value where the input is not given; None for an input that is needed.
            batch: Name of the axis of any size.
        """
        self._inputs.append(_described(name, dtype, shape, batch))
        if default is not None:
            self._initializers.append(_stored(name, default))
        return Traced(self, name, dtype, shape)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [one.name for one in self._inputs]

    def output(self, name: str, value: Traced) -> None:
        """Make a value an output of the graph, under the name `name`."""
        self.node("Identity", [value], value.dtype, value.shape, name)
        self._outputs.append(_described(name, value.dtype, value.shape, "batch"))

    def graph(self, name: str) -> GraphProto:
        """Return the graph, under the name `name`."""
        from onnx import helper

        return helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._initializers)

    def include(self, graph: GraphProto, prefix: str, inputs: dict[str, Traced]) -> dict[str, str]:
        """Add the nodes of another graph, and return the new names of its outputs by the old ones.

        Args:
            graph: The other graph.
            prefix: Beginning of the new names of its values.
            inputs: Values that take the place of its inputs, by name.
        """
        from onnx import compose

        own = compose.add_prefix_graph(graph, prefix)
        self._initializers.extend(own.initializer)
        for name, value in inputs.items():
            self.node("Identity", [value], value.dtype, value.shape, prefix + name)
        self._nodes.extend(own.node)
        return {one.name: prefix + one.name for one in graph.output}

    def constant(self, array: Tensor) -> str:
        """Return the name of a constant of the graph."""
        plain = array.detach().cpu().contiguous()
        key = str(plain.dtype), tuple(plain.shape), plain.numpy().tobytes()
        if key not in self._constants:
            name = self._constants[key] = f"c{next(self._count)}"
            self._initializers.append(_stored(name, plain))
        return self._constants[key]

    def node(
        self,
        kind: str,
        inputs: Sequence[Traced | Tensor],
        dtype: torch.dtype,
        shape: Sequence[int],
        name: str | None = None,
        **attributes: Any,  # noqa: ANN401 - attributes of an ONNX operator
    ) -> Traced:
        """Write a node with one output, and return the output.

        Args:
            kind: Name of the ONNX operator.
            inputs: Its inputs; tensors become constants.
            dtype: Dtype of the output.
            shape: Shape of the output.
            name: Name of the output; None for a new one.
            **attributes: Attributes of the operator.
        """
        from onnx import helper

        names = [one.name if isinstance(one, Traced) else self.constant(one) for one in inputs]
        out = f"v{next(self._count)}" if name is None else name
        self._nodes.append(helper.make_node(kind, names, [out], **attributes))
        return Traced(self, out, dtype, tuple(shape))

    def where_any(
        self, rows: Traced, then: Callable[[], Sequence[Traced]], otherwise: Sequence[Traced]
    ) -> list[Traced]:
        """Return the results of a function that runs only where a flag of `rows` (n,) is True.

        Args:
            rows: Flags (n,).
            then: Function whose nodes form the branch; it may use all earlier values.
            otherwise: The results where no flag is True, of the same dtypes and shapes.
        """
        from onnx import helper

        asked = rows.any_row()

        def branch(what: Callable[[], Sequence[Traced]], name: str) -> GraphProto:
            with self._nodes_apart() as nodes:
                # A branch must have values of its own as outputs.
                made = [self.node("Identity", [one], one.dtype, one.shape) for one in what()]
            told = [_described(one.name, one.dtype, one.shape, "batch") for one in made]
            return helper.make_graph(nodes, name, [], told)

        branches = branch(then, "replace"), branch(lambda: otherwise, "keep")
        names = [f"v{next(self._count)}" for _ in otherwise]
        self._nodes.append(
            helper.make_node(
                "If", [asked.name], names, then_branch=branches[0], else_branch=branches[1]
            )
        )
        return [
            Traced(self, name, one.dtype, one.shape)
            for name, one in zip(names, otherwise, strict=True)
        ]

    @contextmanager
    def _nodes_apart(self) -> Iterator[list[NodeProto]]:
        own, self._nodes = self._nodes, []
        try:
            yield self._nodes
        finally:
            self._nodes = own


class Traced:
    """A value of an ONNX graph, with the methods of a tensor that the package uses.

    Attributes:
        recorder: The graph.
        name: Name of the value in the graph.
        dtype: Its dtype.
        shape: Its shape, with `BATCH` for the axis whose size is known only when the graph runs.
    """

    device = torch.device("cpu")

    def __init__(
        self, recorder: Recorder, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        self.recorder, self.name, self.dtype, self.shape = recorder, name, dtype, shape

    def __repr__(self) -> str:
        return f"Traced({self.name!r}, {self.dtype}, {self.shape})"

    def __len__(self) -> int:
        if self.shape[0] == BATCH:
            raise CannotExportError(
                "the number of rows is known only when the graph runs, and len() needs it now"
            )
        return self.shape[0]

    def __iter__(self) -> Iterator[Traced]:
        return iter([self[at] for at in range(len(self))])

    def __bool__(self) -> bool:
        raise CannotExportError(
            "a value of the graph is known only when the graph runs, and `if` needs it now: write "
            "torch.where in its place"
        )

    def __float__(self) -> float:
        raise CannotExportError(
            "a value of the graph is known only when the graph runs, and float() or int() need it "
            "now: compute with tensors, and write torch.where in place of `if`"
        )

    def __int__(self) -> int:
        return int(float(self))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever PyTorch's function returns
        """Write a function of PyTorch that has met a `Traced`."""
        name = func.__name__.strip("_")
        own = _FUNCTIONS.get(name) or getattr(cls, _OTHER_NAMES.get(name, name), None)
        if own is None:
            raise CannotExportError(
                f"the operation torch.{name} cannot be written as ONNX here: export the policy "
                "yourself, torch.onnx.export(module, ...), and pass the .onnx file as policy"
            )
        if args and not isinstance(args[0], Traced | list | tuple) and own is not _where:
            of = next((one for one in _flat((args, kwargs or {})) if isinstance(one, Traced)), None)
            assert of is not None
            args = (lifted(of.recorder, args[0]), *args[1:])
        return own(*args, **(kwargs or {}))

    # -- writing nodes ---------------------------------------------------------------------------

    def _node(
        self,
        kind: str,
        others: Sequence[Traced | Tensor],
        dtype: torch.dtype | None = None,
        shape: Sequence[int] | None = None,
        **attributes: Any,  # noqa: ANN401 - attributes of an ONNX operator
    ) -> Traced:
        return self.recorder.node(
            kind,
            [self, *others],
            self.dtype if dtype is None else dtype,
            self.shape if shape is None else shape,
            **attributes,
        )

    def _binary(
        self,
        kind: str,
        other: Any,  # noqa: ANN401 - a value, a tensor or a number
        dtype: torch.dtype | None = None,
        swap: bool = False,
    ) -> Traced:
        one, two = _promoted(self, other)
        shape = _broadcast(one.shape, two.shape)
        pair = [two, one] if swap else [one, two]
        return self.recorder.node(kind, pair, one.dtype if dtype is None else dtype, shape)

    def to(self, dtype: Any, *_: Any, **__: Any) -> Traced:  # noqa: ANN401 - as Tensor.to
        """Return the value in a dtype; a device is ignored."""
        if not isinstance(dtype, torch.dtype) or dtype == self.dtype:
            return self
        return self._node("Cast", [], dtype, to=ONNX_TYPES[dtype])

    def float(self) -> Traced:
        """Return the value as float32."""
        return self.to(torch.float32)

    # -- arithmetic ------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Add", other)

    def __sub__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Sub", other)

    def __rsub__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Sub", other, swap=True)

    def __mul__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Mul", other)

    def __truediv__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Div", other)

    def __rtruediv__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Div", other, swap=True)

    def __pow__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Pow", other)

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> Traced:
        return self._node("Abs", [])

    def __neg__(self) -> Traced:
        return self._node("Neg", [])

    def __matmul__(self, other: Any) -> Traced:  # noqa: ANN401
        other = lifted(self.recorder, other)
        outer = _broadcast(self.shape[:-2], other.shape[:-2])
        return self._node("MatMul", [other], None, (*outer, self.shape[-2], other.shape[-1]))

    def __le__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("LessOrEqual", other, torch.bool)

    def __ge__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("GreaterOrEqual", other, torch.bool)

    def __lt__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Less", other, torch.bool)

    def __gt__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Greater", other, torch.bool)

    def __eq__(self, other: Any) -> Traced:  # type: ignore[override]  # noqa: ANN401
        return self._binary("Equal", other, torch.bool)

    def __ne__(self, other: Any) -> Traced:  # type: ignore[override]  # noqa: ANN401
        return ~self._binary("Equal", other, torch.bool)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Traced:  # noqa: ANN401
        if isinstance(other, Tensor) and other.numel() == 1 and bool(other):
            return self
        return self._binary("And", other)

    def __or__(self, other: Any) -> Traced:  # noqa: ANN401
        return self._binary("Or", other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Traced:
        return self._node("Not", [])

    def minimum(self, other: Any) -> Traced:  # noqa: ANN401
        """Return the smaller of two values, entry by entry."""
        return self._binary("Min", other)

    def maximum(self, other: Any) -> Traced:  # noqa: ANN401
        """Return the larger of two values, entry by entry."""
        return self._binary("Max", other)

    def clip(self, min: Any = None, max: Any = None) -> Traced:  # noqa: ANN401 - as Tensor.clip
        """Return the value, limited to a range."""
        out = self if min is None else self.maximum(min)
        return out if max is None else out.minimum(max)

    clamp = clip

    def masked_fill(self, mask: Traced, value: Any) -> Traced:  # noqa: ANN401
        """Return the value, with a number where the mask is True."""
        return _where(mask, value, self)

    def isnan(self) -> Traced:
        """Return which entries are NaN."""
        return self._node("IsNaN", [], torch.bool)

    def isfinite(self) -> Traced:
        """Return which entries are finite."""
        if not self.dtype.is_floating_point:
            return self == self
        return self._node("Abs", []) < math.inf

    def nan_to_num(self) -> Traced:
        """Return 0 for NaN, and the largest finite numbers for infinite ones."""
        largest = torch.finfo(self.dtype).max
        return _where(self.isnan(), 0.0, self).clip(-largest, largest)

    def lerp(self, end: Any, weight: Any) -> Traced:  # noqa: ANN401
        """Return self + weight (end - self)."""
        way: Traced = (lifted(self.recorder, end) - self) * weight
        return self + way

    def baddbmm(self, one: Traced, two: Any) -> Traced:  # noqa: ANN401
        """Return one @ two + self."""
        product: Traced = lifted(self.recorder, one) @ two
        return product + self

    def through(self, stack: Sequence[tuple[Tensor, Tensor]]) -> Traced:
        """Return the outputs (members, n, outputs) of a ReLU network for inputs (n, inputs).

        `stack` are the network's layers, as `nn.mlp.run` takes them.
        """
        members = self.members_through(stack)
        made = [one.unsqueeze(0) for one in members]
        return made[0] if len(made) == 1 else _cat(made, 0)

    def members_through(self, stack: Sequence[tuple[Tensor, Tensor]]) -> list[Traced]:
        """Return the outputs (n, outputs) of each member of a ReLU network."""
        out = []
        for member in range(len(stack[0][0])):
            hidden = self
            for i, (weight, bias) in enumerate(stack):
                table = [weight[member], bias[member]]
                hidden = hidden._node("Gemm", table, None, (BATCH, weight.shape[-1]))
                hidden = hidden._node("Relu", []) if i < len(stack) - 1 else hidden
            out.append(hidden)
        return out

    def square(self) -> Traced:
        """Return the square of each entry."""
        return self * self

    def log_softmax(self, dim: int) -> Traced:
        """Return the logarithm of the softmax along an axis."""
        return self._node("LogSoftmax", [], axis=dim)

    def softmax(self, dim: int, **_: object) -> Traced:
        """Return the softmax along an axis."""
        return self._node("Softmax", [], axis=dim)

    # -- reductions ------------------------------------------------------------------------------

    def _reduce(self, kind: str, dim: Any, keepdim: bool) -> Traced:  # noqa: ANN401 - dim or dims
        at = {d % len(self.shape) for d in (dim if isinstance(dim, tuple | list) else (dim,))}
        shape = [1 if i in at else n for i, n in enumerate(self.shape) if keepdim or i not in at]
        axes = torch.tensor(sorted(at))
        return self._node(kind, [axes], None, shape, keepdims=int(keepdim))

    def sum(self, dim: Any, keepdim: bool = False) -> Traced:  # noqa: ANN401
        """Return the sum along axes."""
        return self._reduce("ReduceSum", dim, keepdim)

    def mean(self, dim: Any, keepdim: bool = False) -> Traced:  # noqa: ANN401
        """Return the mean along axes."""
        return self._reduce("ReduceMean", dim, keepdim)

    def amax(self, dim: Any, keepdim: bool = False) -> Traced:  # noqa: ANN401
        """Return the largest entry along axes."""
        return self._extreme("Max", dim, keepdim)

    def amin(self, dim: Any, keepdim: bool = False) -> Traced:  # noqa: ANN401
        """Return the smallest entry along axes."""
        return self._extreme("Min", dim, keepdim)

    def _extreme(self, kind: str, dim: int, keepdim: bool) -> Traced:
        size = self.shape[dim]
        if keepdim or not self.dtype.is_floating_point or not 0 < size <= _FEW:
            return self._reduce(f"Reduce{kind}", dim, keepdim)
        # Unlike ReduceMax and ReduceMin of ONNX Runtime, these nodes never lose a NaN.
        first, *others = self.unbind(dim)
        for other in others:
            first = first._binary(kind, other)
        return first

    def any_row(self) -> Traced:
        """Return whether one of the flags (n,) is True, (); False where there are no rows."""
        return self.to(torch.int32).sum(0).to(torch.bool)

    def all(self, dim: int) -> Traced:
        """Return whether all entries along an axis are True."""
        if self.shape[dim] == 1:
            return self._squeeze(dim)
        return self.to(torch.int32).amin(dim).to(torch.bool)

    def any(self, dim: int) -> Traced:
        """Return whether an entry along an axis is True."""
        return self.to(torch.int32).amax(dim).to(torch.bool)

    def argmin(self, dim: int) -> Traced:
        """Return the index of the first smallest entry along an axis."""
        return self._arg("ArgMin", dim)

    def argmax(self, dim: int, keepdim: bool = False) -> Traced:
        """Return the index of the first largest entry along an axis."""
        out = self._arg("ArgMax", dim)
        return out[..., None] if keepdim else out

    def _arg(self, kind: str, dim: int) -> Traced:
        at = dim % len(self.shape)
        shape = [n for i, n in enumerate(self.shape) if i != at]
        return self._node(kind, [], torch.int64, shape, axis=at, keepdims=0)

    # -- rows and columns ------------------------------------------------------------------------

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:  # noqa: ANN401 - as Tensor.size
        """Return the shape, or the size of an axis."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def mT(self) -> Traced:
        """The matrices transposed."""
        return self.swapaxes(-1, -2)

    def swapaxes(self, one: int, two: int) -> Traced:
        """Return the value with two axes exchanged."""
        order = list(range(len(self.shape)))
        order[one], order[two] = order[two], order[one]
        return self._node("Transpose", [], None, [self.shape[i] for i in order], perm=order)

    def reshape(self, *shape: Any) -> Traced:  # noqa: ANN401 - sizes, or a tuple of them
        """Return the value in another shape, in which at most one size is `BATCH`."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if tuple(sizes) == self.shape:
            return self
        if BATCH not in self.shape and BATCH in sizes:
            rest = math.prod(n for n in sizes if n != BATCH)
            sizes = tuple(math.prod(self.shape) // rest if n == BATCH else n for n in sizes)
        return self._node("Reshape", [torch.tensor(sizes)], None, sizes)

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Traced:
        """Return the value with several axes joined."""
        rank = len(self.shape)
        first, last = start_dim % rank, end_dim % rank
        some = self.shape[first : last + 1]
        joined = BATCH if BATCH in some else math.prod(some)
        return self.reshape(*self.shape[:first], joined, *self.shape[last + 1 :])

    def unsqueeze(self, dim: int) -> Traced:
        """Return the value with a new axis."""
        at = dim % (len(self.shape) + 1)
        shape = (*self.shape[:at], 1, *self.shape[at:])
        return self._node("Unsqueeze", [torch.tensor([at])], None, shape)

    def _squeeze(self, dim: int) -> Traced:
        at = dim % len(self.shape)
        shape = (*self.shape[:at], *self.shape[at + 1 :])
        return self._node("Squeeze", [torch.tensor([at])], None, shape)

    def expand(self, *sizes: int) -> Traced:
        """Return the value with axes of size 1 repeated; an axis of size `BATCH` stays as it is."""
        own = (1,) * (len(sizes) - len(self.shape)) + self.shape
        shape = tuple(o if s == BATCH else s for o, s in zip(own, sizes, strict=True))
        if shape == self.shape:
            return self
        table = torch.tensor([1 if s == BATCH else s for s in shape])
        return self._node("Expand", [table], None, shape)

    def repeat(self, *times: int) -> Traced:
        """Return the value repeated along each axis."""
        shape = [n if n == BATCH else n * k for n, k in zip(self.shape, times, strict=True)]
        return self._node("Tile", [torch.tensor(times)], None, shape)

    def in_each(self, table: Any) -> Traced:  # noqa: ANN401 - a value or a tensor
        """Return a table once for each of the n rows of this value: (n, *shape)."""
        own = lifted(self.recorder, table)
        count = self._node("Shape", [], torch.int64, (1,), start=0, end=1)
        sizes = torch.tensor(own.shape, dtype=torch.int64)
        rank = 1 + len(own.shape)
        shape = self.recorder.node("Concat", [count, sizes], torch.int64, (rank,), axis=0)
        return own.unsqueeze(0)._node("Expand", [shape], None, (BATCH, *own.shape))

    def new_tensor(self, table: Any) -> Tensor:  # noqa: ANN401 - as Tensor.new_tensor
        """Return an array as a tensor of this dtype."""
        return torch.tensor(table, dtype=self.dtype)

    def new_zeros(self, rows: int, columns: int) -> Traced:
        """Return zeros (rows, columns); n rows, as this value has, for `BATCH`."""
        if rows == BATCH:
            return self.in_each(torch.zeros(columns, dtype=self.dtype))
        return lifted(self.recorder, torch.zeros(rows, columns, dtype=self.dtype))

    def index_select(self, dim: int, index: Any) -> Traced:  # noqa: ANN401 - a value or a tensor
        """Return the entries with given indices along an axis."""
        at, index = dim % len(self.shape), lifted(self.recorder, index)
        shape = (*self.shape[:at], *index.shape, *self.shape[at + 1 :])
        return self._node("Gather", [index], None, shape, axis=at)

    def gather(self, dim: int, index: Traced) -> Traced:
        """Return one entry for each index, as `torch.gather` does."""
        shape = index.shape
        return self._node("GatherElements", [index], None, shape, axis=dim % len(self.shape))

    def rows_where(self) -> Traced:
        """Return the indices (k,) of the rows that are True, of flags (n,)."""
        found = self._node("NonZero", [], torch.int64, (1, BATCH))
        return found._squeeze(0)

    def with_rows(self, index: Traced, rows: Traced) -> Traced:
        """Return the value with the rows `index` (k,) replaced by `rows` (k, ...)."""
        return self._node("ScatterND", [index.unsqueeze(1), rows])

    def __getitem__(self, key: Any) -> Traced:  # noqa: ANN401 - as a tensor takes it
        if isinstance(key, Traced | Tensor):
            return self.index_select(0, key)
        keys = list(key) if isinstance(key, tuple) else [key]
        used = sum(one is not None and one is not Ellipsis for one in keys)
        if Ellipsis in [one if isinstance(one, type(Ellipsis)) else None for one in keys]:
            at = next(i for i, one in enumerate(keys) if one is Ellipsis)
            keys[at : at + 1] = [slice(None)] * (len(self.shape) - used)
        out, axis = self, 0
        for one in keys:
            if one is None:
                out, axis = out.unsqueeze(axis), axis + 1
            elif isinstance(one, int):
                out = out._one(axis, one)
            elif isinstance(one, slice):
                out, axis = out._slice(axis, one), axis + 1
            else:
                raise CannotExportError(f"the index {one!r} cannot be written as ONNX here")
        return out

    def _one(self, axis: int, at: int) -> Traced:
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        return self._node("Gather", [torch.tensor(at)], None, shape, axis=axis)

    def _slice(self, axis: int, part: slice) -> Traced:
        size = self.shape[axis]
        if part == slice(None):
            return self
        if size == BATCH:
            raise CannotExportError("rows of the batch cannot be sliced in an ONNX graph here")
        start, stop, step = part.indices(size)
        shape = list(self.shape)
        shape[axis] = len(range(start, stop, step))
        ends = [torch.tensor([one]) for one in (start, stop, axis, step)]
        return self._node("Slice", ends, None, shape)

    def unbind(self, dim: int) -> list[Traced]:
        """Return the parts along an axis of known size."""
        return [self._one(dim % len(self.shape), i) for i in range(self.shape[dim])]


def _unary(kind: str) -> Callable[..., Traced]:
    def write(self: Traced, *_: object, **__: object) -> Traced:
        return self._node(kind, [])

    return write


for _name, _kind in {
    "relu": "Relu", "relu_": "Relu", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "floor": "Floor", "round": "Round", "abs": "Abs", "sigmoid": "Sigmoid", "elu": "Elu",
    "softplus": "Softplus", "erf": "Erf", "sin": "Sin", "cos": "Cos",
}.items():  # fmt: skip
    setattr(Traced, _name, _unary(_kind))

_OTHER_NAMES = {
    name: f"__{name}__"
    for name in (
        "add", "sub", "rsub", "mul", "truediv", "rtruediv", "pow", "neg", "matmul", "le", "ge",
        "lt", "gt", "eq", "and", "or", "invert", "getitem", "radd", "rmul", "rand", "ror",
    )
} | {
    "div": "__truediv__", "true_divide": "__truediv__", "bitwise_and": "__and__",
    "logical_and": "__and__", "bitwise_or": "__or__", "logical_or": "__or__",
    "bitwise_not": "__invert__", "logical_not": "__invert__",
}  # fmt: skip


def _where(mask: Any, one: Any, other: Any) -> Traced:  # noqa: ANN401 - values, tensors, numbers
    recorder = next(v.recorder for v in (mask, one, other) if isinstance(v, Traced))
    dtype = _common([one, other])
    parts = [lifted(recorder, mask), lifted(recorder, one, dtype), lifted(recorder, other, dtype)]
    shape = _broadcast(parts[0].shape, _broadcast(parts[1].shape, parts[2].shape))
    return recorder.node("Where", parts, dtype, shape)


def _cat(parts: Sequence[Any], dim: int = 0) -> Traced:
    recorder = next(v.recorder for v in parts if isinstance(v, Traced))
    dtype = _common(parts)
    made = [lifted(recorder, one, dtype) for one in parts]
    shape = list(made[0].shape)
    sizes = [one.shape[dim] for one in made]
    shape[dim] = BATCH if BATCH in sizes else sum(sizes)
    return recorder.node("Concat", made, dtype, shape, axis=dim % len(shape))


def _linear(x: Traced, weight: Tensor, bias: Tensor | None = None) -> Traced:
    if x.dim() != 2 or bias is None:
        out = x @ weight.detach().mT.contiguous()
        return out if bias is None else out + bias
    shape = (x.shape[0], weight.shape[0])
    return x._node("Gemm", [weight.detach(), bias.detach()], None, shape, transB=1)


def _full(fill: float | None) -> Callable[..., Traced]:
    def write(like: Traced, value: float = 0.0, **_: object) -> Traced:
        number = torch.tensor(value if fill is None else fill, dtype=like.dtype)
        shape = like._node("Shape", [], torch.int64, (len(like.shape),))
        return like.recorder.node("Expand", [number, shape], like.dtype, like.shape)

    return write


def _stack(parts: Sequence[Traced], dim: int = 0) -> Traced:
    return _cat([one.unsqueeze(dim) for one in parts], dim)


def _gelu(x: Traced, approximate: str = "none") -> Traced:
    if approximate != "none":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + inner._node("Tanh", []))
    return 0.5 * x * (1.0 + (x / math.sqrt(2.0))._node("Erf", []))


def _layer_norm(
    x: Traced,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Traced:
    axes = tuple(range(-len(shape), 0))
    away = x - x.mean(axes, keepdim=True)
    out = away / (away.square().mean(axes, keepdim=True) + eps) ** 0.5
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "silu": lambda x, **_: x * x.sigmoid(),
    "hardtanh": lambda x, low=-1.0, high=1.0, *_, **__: x.clip(low, high),
    "leaky_relu": lambda x, slope=0.01, *_, **__: x._node("LeakyRelu", [], alpha=slope),
    "where": _where,
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
    "linear": _linear,
    "zeros_like": _full(0),
    "ones_like": _full(1),
    "full_like": _full(None),
    "dropout": lambda x, *_, **__: x,
}


def lifted(recorder: Recorder, given: Any, dtype: torch.dtype | None = None) -> Traced:  # noqa: ANN401
    """Return a value, a tensor or a number as a value of the graph."""
    if isinstance(given, Traced):
        return given if dtype is None else given.to(dtype)
    table = torch.as_tensor(given)
    table = table if dtype is None else table.to(dtype)
    return Traced(recorder, recorder.constant(table), table.dtype, tuple(table.shape))


def _common(parts: Sequence[Any]) -> torch.dtype:
    """Return the dtype to which values, tensors and numbers are promoted together."""
    dtypes = [one.dtype for one in parts if isinstance(one, Traced | Tensor)]
    out = dtypes[0] if dtypes else torch.float32
    for other in dtypes[1:]:
        out = torch.promote_types(out, other)
    numbers = [one for one in parts if not isinstance(one, Traced | Tensor)]
    if any(isinstance(one, float) for one in numbers) and not out.is_floating_point:
        return torch.float32
    return torch.int64 if numbers and out == torch.bool and type(numbers[0]) is int else out


def _promoted(one: Traced, other: Any) -> tuple[Traced, Traced]:  # noqa: ANN401
    dtype = _common([one, other])
    return one.to(dtype), lifted(one.recorder, other, dtype)


def _broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    rank = max(len(one), len(other))
    pairs = zip(
        (1,) * (rank - len(one)) + tuple(one),
        (1,) * (rank - len(other)) + tuple(other),
        strict=True,
    )
    return tuple(b if a == 1 else a for a, b in pairs)


def _flat(given: Any) -> Iterator[Any]:  # noqa: ANN401
    if isinstance(given, tuple | list):
        for one in given:
            yield from _flat(one)
    elif isinstance(given, dict):
        yield from _flat(list(given.values()))
    else:
        yield given


def _described(name: str, dtype: torch.dtype, shape: tuple[int, ...], batch: str) -> ValueInfoProto:
    from onnx import helper

    sizes = [batch if size == BATCH else size for size in shape]
    return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], sizes)


def _stored(name: str, table: Tensor) -> Any:  # noqa: ANN401 - a TensorProto
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(table.detach().cpu().numpy()), name)
