"""Templates: graphs drawn as ONNX text, spliced into a model as often as it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import onnx_ir as ir

from surgery.text import parse


class Template:
    """A drawn graph without initializers and subgraphs, read once.

    Args:
        text: `g (float x, ...) => (float y, ...) {...}` in ONNX text. Its inputs stand for values of the model.
        opset: Whose operators it is drawn with.
    """

    def __init__(self, text: str, *, opset: int) -> None:
        graph = parse(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}').graph
        self.inputs = tuple(value.name or "" for value in graph.inputs)
        numbers = {value: number for number, value in enumerate(graph.inputs)}
        self._nodes: list[tuple[str, str, tuple[int | None, ...], tuple[ir.Attr, ...], int]] = []
        for node in graph:
            inputs = tuple(None if value is None else numbers[value] for value in node.inputs)
            attributes = tuple(node.attributes.values())
            self._nodes.append((node.domain, node.op_type, inputs, attributes, len(node.outputs)))
            for value in node.outputs:
                numbers[value] = len(numbers)
        self._outputs = tuple(numbers[value] for value in graph.outputs)

    def nodes(self, inputs: Sequence[ir.Value], names: Iterator[str]) -> tuple[list[ir.Node], list[ir.Value]]:
        """Make the nodes, in order, and return them with the template's outputs.

        Args:
            inputs: What stands for the template's inputs.
            names: Gives a name that the model does not have for each value that is made.
        """
        assert len(inputs) == len(self.inputs)
        values = list(inputs)
        made: list[ir.Node] = []
        for domain, op_type, numbers, attributes, outputs in self._nodes:
            taken = [None if number is None else values[number] for number in numbers]
            node = ir.Node(domain, op_type, taken, attributes, num_outputs=outputs)
            for value in node.outputs:
                value.name = next(names)
            values += node.outputs
            made.append(node)
        return made, [values[number] for number in self._outputs]


def numbered(prefix: str) -> Iterator[str]:
    """Yield names with a prefix that no other name of the model has."""
    return (f"{prefix}{number}" for number in count())
