"""Nodes and constants of an ONNX graph, named and put in order as they are added."""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


class Nodes:
    """A graph, or a branch of one, in the making.

    Args:
        onnx: the package of that name.
        parent: the graph that this is a branch of; a branch may use the parent's values and keeps its constants there.

    Attributes:
        nodes: in the order in which they were added.
        initializers: constants, the weights among them.
    """

    def __init__(self, onnx: ModuleType, parent: "Nodes | None" = None) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = parent.initializers if parent else []
        self._counts: dict[str, int] = parent._counts if parent else {}

    def constant(self, value: Any, name: str | None = None) -> str:
        """The name of a constant tensor."""
        array = np.asarray(value)
        name = name or self._new("constant")
        self.initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, name: str | None = None, output: str | None = None, **attributes: Any) -> str:
        """Add a node; its output bears the name of the node where no other is given."""
        name = name or output or self._new(op)
        output = output or name
        self.nodes.append(self._onnx.helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def cast(self, x: str, dtype: DTypeLike, output: str | None = None) -> str:
        """`x` in another type."""
        return self.add("Cast", x, to=self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), output=output)

    def choose(self, condition: str, then: tuple["Nodes", str], other: tuple["Nodes", str]) -> str:
        """The value that one of two branches ends with; only that branch is computed."""
        helper = self._onnx.helper
        graphs = [
            helper.make_graph(branch.nodes, self._new("branch"), [], [helper.make_empty_tensor_value_info(value)])
            for branch, value in (then, other)
        ]
        return self.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])

    def branch(self) -> "Nodes":
        """An empty branch, for `choose`."""
        return Nodes(self._onnx, self)

    def _new(self, kind: str) -> str:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return f"{kind}_{self._counts[kind]}"
