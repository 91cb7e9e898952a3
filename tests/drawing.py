"""Random graphs as ONNX text: operators of every sort, float16 and float64 islands, branches, loops and scans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from surgery.text import parse

# float32, float16, double, int64, bool; all are [2, 2], so that any two can be put together.
TYPES = {"f": "float[2, 2]", "h": "float16[2, 2]", "d": "double[2, 2]", "i": "int64[2, 2]", "b": "bool[2, 2]"}


@dataclass(frozen=True)
class Form:
    """An operator, or a few that belong together.

    Args:
        gives: The types of what it gives.
        text: What is drawn. `{o}`, `{o2}` stand for what it gives; `{f}`, `{g}`, `{h}`, ... for what it is given, by
            the letter of the type; `{t1}`, `{t2}`, ... for what is its own.
        since: The oldest operator set that has it.
        until: The newest.
    """

    gives: str
    text: str
    since: int = 11
    until: int = 99


# Continuous, and of numbers of moderate size if that is what they are given: float16 changes little.
CALM = (
    Form("f", "{o} = Tanh({f})"),
    Form("f", "{o} = Sigmoid({f})"),
    Form("f", "{o} = Relu({f})"),
    Form("f", "{t1} = Add({f}, {g})  {o} = Mul({t1}, half)"),
    Form("f", "{o} = Sub({f}, bias)"),
    Form("f", "{o} = Mul({f}, bias)"),
    Form("f", "{t1} = MatMul({f}, weight)  {o} = Tanh({t1})"),
    Form("f", "{t1} = MatMul({f}, shared)  {t2} = MatMul({g}, shared)  {o} = Max({t1}, {t2})"),
    Form("f", "{t1} = Gemm({f}, weight, row)  {o} = Sigmoid({t1})"),
    Form("f", "{o} = Transpose({f})"),
    Form("f", "{o} = Identity({f})"),
    Form("f", "{o} = Reshape({f}, shape)"),
    Form("f", "{o} = Gather({f}, places)"),
    Form("f", "{o} = Where({b}, {f}, {g})"),
    Form("f", "{t1} = Concat <axis = 0> ({f}, {g})  {o} = Gather({t1}, places)"),
    Form("ff", "{t1} = Concat <axis = 0> ({f}, {g})  {o}, {o2} = Split <axis = 0> ({t1}, shape)", 13),
    Form("ff", "{t1} = Concat <axis = 0> ({f}, {g})  {o}, {o2} = Split <axis = 0> ({t1})", 11, 12),
    Form("ff", "{t1} = Concat <axis = 0> ({f}, {g})  {o}, {o2} = Split <axis = 0, num_outputs = 2> ({t1})", 18),
    Form("f", "{t1} = Concat <axis = 0> ({f}, {g})  {t2}, {o} = Split <axis = 0> ({t1}, shape)", 13),
    Form("f", "{o} = Softmax <axis = 1> ({f})"),
    Form("f", "{t1} = ReduceMean <axes = [1], keepdims = 1> ({f})  {o} = Add({t1}, {g})", 11, 17),
    Form("f", "{t1} = ReduceMean <keepdims = 1> ({f}, last)  {t2} = Sub({f}, {t1})  {o} = Tanh({t2})", 18),
    Form("f", "{o} = LayerNormalization <axis = 1, epsilon = 1.0> ({f}, row, row)", 17),
    Form("f", "{t1}, {t2} = LayerNormalization <axis = 1, epsilon = 1.0> ({f}, row)  {o} = Sub({t1}, {t2})", 17),
    Form("f", "{t1}, , {t2} = LayerNormalization <axis = 1, epsilon = 1.0> ({f}, row)  {o} = Sub({t1}, {t2})", 17),
    Form("f", "{o} = RMSNormalization <axis = 1, epsilon = 1.0> ({f}, row)", 23),
    Form("f", "{t1} = Constant <value = float[2] {{0.5, -0.25}}> ()  {o} = Add({f}, {t1})"),
    Form("f", "{t1} = Constant <value_float = 0.5> ()  {o} = Mul({f}, {t1})", 12),
    Form("f", "{t1} = Constant <value_floats = [0.5, 0.25]> ()  {o} = Mul({f}, {t1})", 12),
    Form("f", "{t1} = ConstantOfShape <value = float[1] {{0.5}}> (shape)  {o} = Mul({f}, {t1})"),
    Form("f", "{t1} = ConstantOfShape (shape)  {o} = Max({f}, {t1})"),
    Form("f", "{o} = Clip({f}, , one)"),
    Form("f", "{o} = Clip({f}, minus_much, )"),
    Form("f", "{o} = Clip({f})"),
    Form("f", "{o} = CumSum({f}, zero_axis)"),
    Form("f", "{o}, {t1} = TopK <axis = 1, largest = 0> ({f}, two)"),
    Form("f", "{o}, {t1} = Dropout({f})", 12),
    Form("f", "{o}, {t1} = Dropout({f}, half)", 12),
    Form("f", "{o} = Pad({f}, no_pads)"),
    Form("f", "{o} = Pad({f}, no_pads, half)"),
    Form("f", "{t1} = Expand({f}, wide)  {o} = Gather({t1}, zero)"),
    Form("f", "{t1} = Tile({f}, twice)  {o} = Slice({t1}, starts, shape)"),
    Form("f", "{o} = Einsum <equation = \"ij,jk->ik\"> ({f}, weight)", 12),
    Form("f", "{o} = Trilu({f})", 14),
    Form("f", "{o} = ScatterND({f}, first_row, one_row)"),
    Form("f", "{o} = ScatterND <reduction = \"add\"> ({f}, first_row, one_row)", 16),
    Form("f", "{o} = GatherElements({f}, corner)"),
    Form("f", "{o} = Erf({f})"),
    Form("f", "{o} = Gelu({f})", 20),
    Form("f", "{o} = com.microsoft.FastGelu({f})"),
    Form("f", "{o} = com.microsoft.BiasGelu({f}, row)"),
    Form("f", "{o} = Cast <to = 1> ({i})"),
    Form("f", "{o} = Cast <to = 1> ({b})"),
    Form("f", "{o} = Cast <to = 1> ({h})"),
    Form("f", "{o} = Cast <to = 1> ({d})"),
    Form("f", "{o} = Cast <to = 1> ({f})"),
    Form("f", "{o} = CastLike({d}, {f})", 15),
    Form("f", "{o} = CastLike({h}, half)", 15),
    Form("f", "{o} = CastLike({f}, {g})", 15),
    Form("f", "{t1} = Cast <to = 1> ({h})  {t2} = Mul({t1}, {t1})  {t3} = Sqrt({t2})  {o} = Add({t3}, {f})"),
    Form("f", "{o} = calm.twice({f})"),
    Form("f", "{o} = calm.mean <scale = 0.5> ({f}, {g})", 12),
    Form("f", "{t1} = SequenceConstruct({f}, {g})  {o} = SequenceAt({t1}, zero)"),
    Form("f", "{t1} = SequenceConstruct({f}, {g})  {t2} = ConcatFromSequence <axis = 0> ({t1})  "
              "{o} = Gather({t2}, places)"),
    Form("f", "{t1} = SplitToSequence <axis = 0, keepdims = 0> ({f})  {t2} = SequenceAt({t1}, zero)  "
              "{o} = Add({g}, {t2})"),
    Form("f", "{t1} = Unsqueeze <axes = [0]> ({f})  {o} = Squeeze <axes = [0]> ({t1})", 11, 12),
    Form("f", "{t1} = Unsqueeze({f}, first)  {o} = Squeeze({t1}, first)", 13),
    Form("f", "{t1} = Slice({f}, ends, ends)  {t2} = Concat <axis = 0> ({t1}, {f})  {o} = Tanh({t2})"),
    Form("f", "{t1} = Slice({f}, ends, ends)  {t2} = Tanh({t1})  {o} = Concat <axis = 0> ({t2}, {g})"),
    Form("f", "{t1} = OneHot <axis = 1> (zero_one, two, pair)  {o} = Mul({f}, {t1})"),
    Form("f", "{t1} = EyeLike({f})  {o} = Add({f}, {t1})"),
    Form("f", "{t1} = EyeLike <dtype = 1> ({i})  {o} = Add({f}, {t1})"),
    Form("f", "{t1} = Range(zero_f, two_f, one)  {o} = Add({f}, {t1})"),
    Form("f", "{t1} = Unsqueeze({f}, axes01)  {t2} = Resize({t1}, , scales)  {o} = Squeeze({t2}, axes01)", 13),
    Form("f", "{t1} = Cast <to = 3> ({i})  {o} = DequantizeLinear({t1}, half)", 13),
    Form("f", "{t1} = DequantizeLinear(quantized, half)  {o} = Mul({f}, {t1})", 13),
    Form("f", "{t1} = DequantizeLinear <axis = 0> (quantized, row)  {o} = Mul({f}, {t1})", 13),
    Form("f", "{o} = DequantizeLinear <output_dtype = 1> (quantized, half)", 23),
    Form("f", "{t1} = Add({f}, one)  {o} = Pow({t1}, one)"),
    Form("f", "{t1} = Mul({f}, {f})  {t2} = Add({t1}, one)  {o} = Div({g}, {t2})"),
    Form("f", "{t1} = Mul({f}, {f})  {t2} = Add({t1}, one)  {t3} = Log({t2})  {o} = Neg({t3})"),
    Form("h", "{o} = Cast <to = 10> ({f})"),
    Form("h", "{o} = Tanh({h})"),
    Form("h", "{t1} = Add({h}, {h2})  {o} = Tanh({t1})"),
    Form("h", "{o} = Transpose({h})"),
    Form("h", "{o} = CastLike({f}, {h})", 15),
    Form("d", "{o} = Cast <to = 11> ({f})"),
    Form("d", "{t1} = Cast <to = 11> ({h})  {o} = Neg({t1})"),
    Form("d", "{t1} = Mul({d}, {d})  {o} = Sqrt({t1})"),
    Form("b", "{o} = Greater({i}, {j})"),
    Form("b", "{o} = Not({b})"),
    Form("i", "{o} = Sub({i}, {j})"),
)  # fmt: skip

# Of numbers of any size, with jumps: what comes out of half precision may be another number, though a valid model.
WILD = (
    Form("f", "{o} = Mul({f}, much)"),
    Form("f", "{o} = Mul({f}, tiny)"),
    Form("f", "{o} = Add({f}, too_much)"),
    Form("f", "{o} = Where({b}, {f}, lowest)"),
    Form("f", "{t1} = Where({b}, {f}, lowest)  {o} = Softmax <axis = 1> ({t1})"),
    Form("f", "{t1} = Where({b}, zero_f, lowest)  {t2} = Add({f}, {t1})  {o} = Softmax <axis = 1> ({t2})"),
    Form("f", "{t1} = Where({b}, zero_f, minus_infinity)  {t2} = Add({f}, {t1})  {o} = Softmax <axis = 1> ({t2})"),
    Form("f", "{t1} = Cast <to = 1> ({b})  {t2} = Sub(one, {t1})  {t3} = Mul({t2}, lowest)  {t4} = Add({f}, {t3})  "
              "{o} = Softmax <axis = 1> ({t4})"),
    Form("f", "{o} = Mul({f}, {g})"),
    Form("f", "{o} = Div({f}, {g})"),
    Form("f", "{o} = Log({f})"),
    Form("f", "{o} = Exp({f})"),
    Form("f", "{o} = Sqrt({f})"),
    Form("f", "{o} = Pow({f}, {g})"),
    Form("f", "{o} = Reciprocal({f})"),
    Form("f", "{o} = Max({f}, too_much)"),
    Form("f", "{o} = Min({f}, too_much)"),
    Form("f", "{o} = Clip({f}, lowest, too_much)"),
    Form("f", "{o} = Add({f}, tiny)"),
    Form("f", "{o} = Mul({f}, mixed)"),
    Form("f", "{o} = MatMul({f}, mixed)"),
    Form("f", "{t1} = RandomNormalLike({f})  {o} = Add({t1}, {g})", 11, 21),
    Form("f", "{t1} = RandomUniformLike <dtype = 1> ({i})  {o} = Add({t1}, {g})", 11, 21),
    Form("f", "{t1} = RandomUniform <shape = [2, 2]> ()  {o} = Mul({t1}, {g})", 11, 21),
    Form("f", "{t1} = Sigmoid({f})  {o} = Bernoulli({t1})", 15),
    Form("f", "{o} = Mod <fmod = 1> ({f}, half)"),
    Form("f", "{o} = Sign({f})"),
    Form("f", "{o} = Round({f})"),
    Form("f", "{o} = Floor({f})"),
    Form("f", "{t1}, {t2}, {t3} = LayerNormalization <axis = 1> ({f}, row, row)  {o} = Mul({t1}, {t3})", 17),
    Form("f", "{t1} = Cast <to = 10> ({f})  {o} = Cast <to = 1> ({t1})"),
    Form("f", "{t1} = Cast <to = 16> ({f})  {o} = Cast <to = 1> ({t1})", 13),
    Form("f", "{t1} = Cast <to = 8> ({f})  {o} = Cast <to = 1> ({t1})"),
    Form("f", "{t1} = Cast <to = 10> ({f})  {t2} = Add({t1}, {h})  {o} = Cast <to = 1> ({t2})"),
    Form("f", "{t1} = QuantizeLinear({f}, half)  {o} = DequantizeLinear({t1}, half)", 13),
    Form("f", "{t1}, {t2}, {t3} = DynamicQuantizeLinear({f})  {o} = DequantizeLinear({t1}, {t2}, {t3})"),
    Form("f", "{t1} = NonZero({f})  {t2} = Shape({t1})  {t3} = Cast <to = 1> ({t2})  {o} = Add({f}, {t3})"),
    Form("f", "{t1} = Unique({f})  {t2} = Size({t1})  {t3} = Cast <to = 1> ({t2})  {o} = Add({f}, {t3})"),
    Form("f", "{t1} = Size({f})  {t2} = Cast <to = 1> ({t1})  {t3} = Range(zero_f, {t2}, two_f)  {o} = Add({f}, {t3})"),
    Form("f", "{t1} = Unsqueeze({f}, axes0)  {t2} = Resize({t1}, , odd_scales)  "
              "{t3} = Shape({t2})  {t4} = Cast <to = 1> ({t3})  {t5} = ReduceSum({t4})  {o} = Add({f}, {t5})", 13),
    Form("f", "{t1} = ReduceMax <keepdims = 0> ({f})  {o} = Sub({g}, {t1})"),
    Form("f", "{t1} = If (flag) <then_branch = {n1} () => (float {x1}) {{ {x1} = Identity(one) }}, "
              "else_branch = {n2} () => (float {x2}) {{ {x2} = Constant <value = float {{2}}> () }}>  "
              "{o} = Add({f}, {t1})"),
    Form("i", "{o} = Cast <to = 7> ({f})"),
    Form("i", "{t1} = ArgMax({f})  {o} = Add({i}, {t1})"),
    Form("i", "{t1}, {o} = TopK <axis = 1> ({f}, two)"),
    Form("b", "{o} = Cast <to = 9> ({f})"),
    Form("b", "{o} = Greater({f}, {g})"),
    Form("b", "{o} = Less({f}, too_much)"),
    Form("b", "{o} = Equal({f}, {g})"),
    Form("b", "{o} = IsNaN({f})", 13),
    Form("h", "{t1} = Cast <to = 1> ({h})  {t2} = Mul({t1}, {t1})  {t3} = Sqrt({t2})  {o} = Cast <to = 10> ({t3})"),
    Form("d", "{t1} = Log({d})  {o} = Sub({t1}, {d})"),
)  # fmt: skip

_WEIGHTS = """
    float half = {0.5}, float one = {1}, float zero_f = {0}, float two_f = {2}, float[2, 2] bias = {0.5, -1, 0.25, 0.1},
    float[2, 2] weight = {0.3, -0.7, 0.2, 0.9}, float[2, 2] shared = {0.4, 0.3, -0.6, 0.1}, float[2] row = {0.7, 0.9},
    float[1, 2] one_row = {0.3, 0.6}, float[2] pair = {0.1, 0.9}, float minus_much = {-1e9}, float too_much = {1e6},
    float much = {3000}, float tiny = {1e-9}, float lowest = {-3.4028235e38}, float minus_infinity = {-inf},
    float[2, 2] mixed = {1e-9, 70000, -1e30, 1}, float[4] scales = {1, 1, 1, 1}, float[3] odd_scales = {1, 1.3, 2.9996},
    int64[2] shape = {2, 2}, int64[2] places = {1, 0}, int64[1] two = {2}, int64[1] first = {0}, int64[1] last = {1},
    int64 zero = {0}, int64 zero_axis = {0}, int64[4] no_pads = {0, 0, 0, 0}, int64[3] wide = {3, 2, 2},
    int64[2] twice = {2, 1}, int64[2] starts = {0, 0}, int64[1, 1] first_row = {0}, int64[2, 2] corner = {0, 0, 1, 1},
    int64[1] ends = {2}, int64[2] axes01 = {0, 1}, int64[1] axes0 = {0}, int64[2] zero_one = {0, 1},
    int8[2, 2] quantized = {1, -2, 3, 1}, int64 trips = {2}, bool go = {1}
"""

_FUNCTIONS = """
<domain: "calm", opset_import: ["" : OPSET]>
twice (a) => (c) { b = Tanh(a)  c = Add(b, b) }
<domain: "calm", opset_import: ["" : OPSET]>
mean <scale: float = 1.0> (a, b) => (d) {
    c = Add(a, b)
    s = Constant <value_float: float = @scale> ()
    d = Mul(c, s)
}
"""


class Drawing:
    """Draws a graph of one of the operator sets 11 to 24.

    Args:
        seed: What it is drawn from.
        wild: Whether numbers of any size, and jumps, are among it.
    """

    def __init__(self, seed: int, *, wild: bool = False) -> None:
        self._random = np.random.default_rng(seed)
        self.opset = int(self._random.integers(11, 25))
        forms = (*CALM, *WILD) if wild else CALM
        self._forms = tuple(form for form in forms if form.since <= self.opset <= form.until)
        self._count = 0

    def text(self) -> str:
        """Return a whole model."""
        known = [("x", "f"), ("y", "f"), ("bias", "f"), ("weight", "f"), ("p", "h"), ("q", "d"), ("n", "i"), ("m", "b")]
        lines, made = self._fill(known, int(self._random.integers(4, 14)), 0)
        results = self._chosen(made)
        if self._random.random() < 0.1:
            results += [("x", "f")]
        if self._random.random() < 0.1:
            results += [("bias", "f")]
        outputs = ", ".join(f"{TYPES[kind]} {name}" for name, kind in dict.fromkeys(results))
        body = "\n".join(f"    {line}" for line in lines)
        weights = _WEIGHTS
        inputs = ", ".join(f"{TYPES[kind]} {name}" for name, kind in known if name not in ("bias", "weight"))
        if self._random.random() < 0.1:
            inputs += ", float[2, 2] bias"
        functions = (_FUNCTIONS if self.opset > 11 else _FUNCTIONS[: _FUNCTIONS.rindex("<domain")]).replace(
            "OPSET", str(self.opset)
        )
        return (
            f'<ir_version: 10, opset_import: ["" : {self.opset}, "com.microsoft" : 1, "calm" : 1]>\n'
            f"g ({inputs}, bool flag) => ({outputs})\n<{weights}>\n{{\n{body}\n}}\n{functions}"
        )

    def _chosen(self, made: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return what of all that a graph computes is its result."""
        return [made[-1], *(one for one in made if self._random.random() < 0.25)]

    def _fill(self, known: Sequence[tuple[str, str]], length: int, depth: int) -> tuple[list[str], list]:
        lines: list[str] = []
        known = list(known)
        made: list[tuple[str, str]] = []
        for _ in range(length):
            kind = self._random.random()
            if depth < 3 and kind < 0.08:
                line, new = self._branches(known, depth)
            elif depth < 3 and kind < 0.14:
                line, new = self._loop(known, depth)
            elif depth < 3 and kind < 0.18:
                line, new = self._scan(known, depth)
            else:
                line, new = self._operator(known)
            lines.append(line)
            known += new
            made += new
        return lines, made

    def _operator(self, known: Sequence[tuple[str, str]]) -> tuple[str, list]:
        form = self._forms[self._random.integers(len(self._forms))]
        names = {f"t{number}": self._name("t") for number in range(1, 6)}
        names |= {f"x{number}": self._name("t") for number in (1, 2)} | {f"n{n}": self._name("g") for n in (1, 2)}
        for slot, kind in (
            ("f", "f"),
            ("g", "f"),
            ("h", "h"),
            ("h2", "h"),
            ("d", "d"),
            ("i", "i"),
            ("j", "i"),
            ("b", "b"),
        ):
            names[slot] = self._pick(known, kind)
        new = [(self._name("v"), kind) for kind in form.gives]
        names |= {"o" if not number else f"o{number + 1}": name for number, (name, _) in enumerate(new)}
        label = f"[{self._name('node')}] " if self._random.random() < 0.5 and "  " not in form.text else ""
        return label + form.text.format(**names), new

    def _branches(self, known: Sequence[tuple[str, str]], depth: int) -> tuple[str, list]:
        kinds = self._kinds()
        new = [(self._name("v"), kind) for kind in kinds]
        branches = [
            f"{branch} = {self._name('g')} () => ({outputs}) {{ {body} }}"
            for branch in ("then_branch", "else_branch")
            for body, outputs in [self._body(known, kinds, depth)]
        ]
        return f"{', '.join(name for name, _ in new)} = If (flag) <{', '.join(branches)}>", new

    def _loop(self, known: Sequence[tuple[str, str]], depth: int) -> tuple[str, list]:
        kinds, scanned = self._kinds(), self._kinds()[:1] if self._random.random() < 0.6 else ""
        states = [(self._name("s"), kind) for kind in kinds]
        trip, before, after = self._name("t"), self._name("t"), self._name("t")
        body, outputs = self._body([*known, *states], kinds + scanned, depth)
        given = ", ".join(self._pick(known, kind) for kind in kinds)
        new = [(self._name("v"), kind) for kind in kinds]
        stacks = [self._name("t") for _ in scanned]
        picked = [(self._name("v"), kind) for kind in scanned]
        inputs = ", ".join(f"{TYPES[kind]} {name}" for name, kind in states)
        line = (
            f"{', '.join([name for name, _ in new] + stacks)} = Loop (trips, go, {given}) <body = {self._name('g')} "
            f"(int64 {trip}, bool {before}, {inputs}) => (bool {after}, {outputs}) {{ "
            f"{after} = Identity({before})  {body} }}>"
        )
        more = [f"{name} = Gather({stack}, zero)" for (name, _), stack in zip(picked, stacks, strict=True)]
        return "\n    ".join([line, *more]), [*new, *picked]

    def _scan(self, known: Sequence[tuple[str, str]], depth: int) -> tuple[str, list]:
        state, row, axes = self._name("s"), self._name("s"), self._name("t")
        body, outputs = self._body([*known, (state, "f"), (row, "f")], "ff", depth)
        total, rows, stack, out = self._name("v"), self._name("t"), self._name("t"), self._name("v")
        line = (
            f"{axes} = Concat <axis = 0> (first, shape)  {stack}s = Constant <value = int64[3] {{1, 2, 2}}> ()  "
            f"{rows} = Reshape({self._pick(known, 'f')}, {stack}s)  "
            f"{total}, {stack} = Scan <num_scan_inputs = 1, body = {self._name('g')} "
            f"(float[2, 2] {state}, float[2, 2] {row}) => ({outputs}) {{ {body} }}> "
            f"({self._pick(known, 'f')}, {rows})  "
            f"{out} = Gather({stack}, zero)"
        )
        return line, [(total, "f"), (out, "f")]

    def _body(self, known: Sequence[tuple[str, str]], kinds: str, depth: int) -> tuple[str, str]:
        """Return the nodes of a body and its outputs, which are of these types."""
        lines, made = self._fill(known, int(self._random.integers(1, 5)), depth + 1)
        results = [(self._name("r"), kind) for kind in kinds]
        lines += [f"{name} = Identity({self._pick([*known, *made], kind)})" for name, kind in results]
        return "  ".join(lines), ", ".join(f"{TYPES[kind]} {name}" for name, kind in results)

    def _kinds(self) -> str:
        return "".join(self._random.choice(list("fffhdi"), int(self._random.integers(1, 3))))

    def _pick(self, known: Sequence[tuple[str, str]], kind: str) -> str:
        """Return a value of a type, most of the time one of the last."""
        alike = [name for name, one in known if one == kind]
        recent = alike[-4:] if self._random.random() < 0.7 else alike
        return recent[self._random.integers(len(recent))]

    def _name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"


def drawn(seed: int, *, wild: bool = False) -> ir.Model:
    """Return a random model."""
    return parse(Drawing(seed, wild=wild).text())


def feeds_of(seed: int, *, wild: bool = False) -> list[dict[str, np.ndarray]]:
    """Return inputs of a random model: both branches of its `If` nodes."""
    random = np.random.default_rng([seed, 1])
    size = random.choice([1, 1e-6, 1e4, 1e20]) if wild else 1.0
    inputs = {
        "x": (random.standard_normal((2, 2)) * size).astype(np.float32),
        "y": random.standard_normal((2, 2)).astype(np.float32),
        "p": random.standard_normal((2, 2)).astype(np.float16),
        "q": random.standard_normal((2, 2)),
        "n": random.integers(-3, 4, (2, 2)),
        "m": random.random((2, 2)) < 0.5,
    }
    return [{**inputs, "flag": np.array(flag)} for flag in (True, False)]
