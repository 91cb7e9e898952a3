"""What an inspection finds, as data: each class is an object of `--json`, each field a key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

FORMAT = 1
"""Raised when a key changes its meaning or goes; new keys may come."""

Dimension = int | str | None
Proof = Literal["same bytes on disk", "every byte compared", "sampled"]


@dataclass(frozen=True)
class Port:
    """An input or output.

    Args:
        name: Its name.
        type: Its element type as ONNX spells it in lower case (`float16`), or such as `sequence(float)`; None if the
            model does not say.
        shape: Sizes, names of free sizes, None for what has neither; None if the rank is not known.
        has_default: An input that an initializer gives where the caller does not.
    """

    name: str
    type: str | None
    shape: list[Dimension] | None
    has_default: bool = False


@dataclass(frozen=True)
class CacheKind:
    """The tensors of a cache that serve one kind of attention and look alike.

    Args:
        attention: `self` or `cross`.
        layers: How many layers have such tensors.
        inputs: How many inputs take them.
        outputs: How many outputs give them.
        type: Their element type.
        shape: The shape of one of them.
        token_bytes: What one token of one row takes, keys and values of all these layers; None if sizes are not known.
    """

    attention: str
    layers: int
    inputs: int
    outputs: int
    type: str | None
    shape: list[Dimension] | None
    token_bytes: int | None


@dataclass(frozen=True)
class Interface:
    """What a model is by the names of its inputs and outputs.

    Args:
        role: `encoder`, `prefill`, `decode` or `decoder`.
        naming: Whose names they are, such as `optimum`.
        family: `encoder`, `decoder` or `cross decoder`.
        layers: How many layers have a cache.
        cache: The cache.
    """

    role: str
    naming: str
    family: str
    layers: int
    cache: list[CacheKind]


@dataclass(frozen=True)
class Body:
    """A graph: the main one, a branch, a loop body, a local function.

    Args:
        path: Where it is, node by node; empty for the main graph.
        depth: 0 for the main graph and functions, 1 for a branch in them, ...
        nodes: Its own nodes, those of graphs inside left out.
        is_function: It is, or is inside, a local function.
    """

    path: str
    depth: int
    nodes: int
    is_function: bool


@dataclass(frozen=True)
class Operator:
    """How often an operator is used.

    Args:
        domain: Its domain, empty for ONNX's own.
        name: Its name.
        count: All its nodes.
        in_subgraphs: Those of them in branches and loop bodies.
        in_functions: Those of them in local functions, counted once however often the function is called.
        is_function: It is a local function of the model.
    """

    domain: str
    name: str
    count: int
    in_subgraphs: int
    in_functions: int
    is_function: bool


@dataclass(frozen=True)
class Casts:
    """How often one element type is cast to another.

    Args:
        source: The type before; None where the model does not say and it cannot be inferred.
        target: The type after.
        count: How many casts.
        in_subgraphs: Those of them in branches and loop bodies.
        in_functions: Those of them in local functions.
    """

    source: str | None
    target: str
    count: int
    in_subgraphs: int
    in_functions: int


@dataclass(frozen=True)
class Tally:
    """Weights counted together.

    Args:
        name: What they have in common: an element type, a layer, where in the model they stand.
        tensors: How many.
        parameters: Their elements.
        bytes: Their bytes; what two of them share on disk is counted for each.
    """

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class FileUse:
    """A file that holds weights.

    Args:
        file: Its path; of one that is missing, as the model names it.
        is_model: It is the model file itself.
        is_missing: It is not there, or not usable.
        file_bytes: Its size; None if it is missing.
        tensors: The weights in it.
        bytes: Their bytes; what two of them share is counted once.
    """

    file: str
    is_model: bool
    is_missing: bool
    file_bytes: int | None
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Unused:
    """An initializer that nothing reads."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that somebody will refuse.

    Args:
        by: Who says so: `files`, `onnx`, or `ONNX Runtime`.
        where: The file, the graph, the operator.
        what: What is wrong.
        way_out: What can be done; empty if nothing is known.
        nodes: How many nodes it is about, 0 where it is about no node.
    """

    by: str
    where: str
    what: str
    way_out: str = ""
    nodes: int = 0


@dataclass(frozen=True)
class Runtime:
    """The installed ONNX Runtime.

    Args:
        version: Its version.
        providers: What it could run on here, as it names them.
        max_ir_version: The newest IR version that it takes.
        max_opset: The newest operator set of ONNX's own domain that it takes.
    """

    version: str
    providers: list[str]
    max_ir_version: int
    max_opset: int


@dataclass(frozen=True)
class FoundModel:
    """One model.

    Args:
        path: Its file.
        name: How it is called among several: its file, relative to the folder that was given.
        listed_role: Its role as `bundle.json` has it; None without one.
        file_bytes: The size of the model file, data files left out.
        producer: What made it, with version.
        ir_version: Its IR version.
        opsets: The version of each operator set, by domain; ONNX's own is `ai.onnx`.
        needs_ir_version: The lowest IR version that says the same, which a run writes.
        needs_opsets: The lowest operator sets that say the same.
        interface: What it is by the names of its inputs and outputs; None if they are no known decoder's or encoder's.
        inputs: Its inputs.
        outputs: Its outputs.
        bodies: Its graphs, the main one first.
        operators: Its operators, the most frequent first.
        casts: Its casts by types, the most frequent first.
        weights: All its weights: initializers, and the values of `Constant` nodes.
        by_dtype: Weights by element type, the largest first.
        by_layer: Weights by layer, in the order of their first use.
        by_place: Weights by where they stand: `initializers`, `initializers of subgraphs`, `constants` (in any graph),
            `functions`.
        files: Where weights lie.
        unused: Initializers that nothing reads.
        findings: What is wrong with it.
        runtime_takes_it: Whether ONNX Runtime opens it as it is, weights aside; None if it was not asked.
    """

    path: str
    name: str
    listed_role: str | None
    file_bytes: int
    producer: str
    ir_version: int
    opsets: dict[str, int]
    needs_ir_version: int
    needs_opsets: dict[str, int]
    interface: Interface | None
    inputs: list[Port]
    outputs: list[Port]
    bodies: list[Body]
    operators: list[Operator]
    casts: list[Casts]
    weights: Tally
    by_dtype: list[Tally]
    by_layer: list[Tally]
    by_place: list[Tally]
    files: list[FileUse]
    unused: list[Unused]
    findings: list[Finding]
    runtime_takes_it: bool | None


@dataclass(frozen=True)
class Member:
    """A weight by the model that it is in, and its name there."""

    model: str
    name: str


@dataclass(frozen=True)
class Copies:
    """Equal weights.

    Args:
        members: The weights, in the order of models.
        type: Their element type.
        shape: Their shape.
        bytes: The size of one.
        stored: How many times the bytes are on disk.
        proof: How it is known. `sampled` is a guess, however likely: a few bytes of each were read.
    """

    members: list[Member]
    type: str
    shape: list[int]
    bytes: int
    stored: int
    proof: Proof


@dataclass(frozen=True)
class Transposed:
    """Weights that are others transposed.

    Args:
        members: Equal matrices.
        transposed: Equal matrices that are those transposed.
        type: Their element type.
        shape: The shape of `members`.
        bytes: The size of one.
        proof: How it is known, as for `Copies`.
    """

    members: list[Member]
    transposed: list[Member]
    type: str
    shape: list[int]
    bytes: int
    proof: Proof


@dataclass(frozen=True)
class Inspection:
    """What was found in one or more models.

    Args:
        models: The models.
        unreadable: The files that are no models or cannot be read, where there are others.
        copies: Equal weights of 128 bytes and more, over all models, the most wasteful first.
        transposed: Weights that are others transposed, likewise.
        files: The files that all their weights lie in.
        stored_bytes: What all weights take on disk, and in model files, each byte counted once.
        spare_bytes: How much of that goes if equal weights are stored once; guesses included.
        runtime: The installed ONNX Runtime; None if there is none.
        surgery: The version of surgery.
        format: The version of these keys.
    """

    models: list[FoundModel]
    unreadable: list[Finding]
    copies: list[Copies]
    transposed: list[Transposed]
    files: list[FileUse]
    stored_bytes: int
    spare_bytes: int
    runtime: Runtime | None
    surgery: str
    format: int = FORMAT

    def as_json(self) -> str:
        """Return it as JSON, the keys in the order of the fields."""
        return json.dumps(asdict(self), indent=1) + "\n"
