"""What became of a bundle that was cast to half precision: its casts, what is left of float32, whether it is right.

    python benchmarks/half_judging.py SOURCE CANDIDATE SAMPLES OUT.json [FIXTURE]

Both folders hold float32 and half precision of the same models, in files of the same names; SAMPLES is what
`known_ranges.KeepRanges` wrote. FIXTURE is the word of a trained fixture, or of a variant that exceeds float16.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from passes.cast_fp16 import CastFp16
from surgery.accuracy.half import lower_half
from surgery.accuracy.judge import Judge
from surgery.accuracy.runners import runtime_errors
from surgery.bundle import Bundle
from surgery.contract import Effect
from surgery.element_types import infer_types
from surgery.errors import SurgeryError
from surgery.graphs import graphs_of
from surgery.recipe import Check, Source
from surgery.runtime.sessions import open_session
from surgery.sources import find_source
from surgery.storage import file_of_role, open_model

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
BYTES_OF_A_CAST = 6  # it reads or writes four in float32 and two in float16
QUESTIONS = 400
ASKED_OF_VARIANTS = {"long_only": (100, 200, 60)}
ASKED = (2, 13, 200)
SEED = 21

Facts = dict[str, Any]
Answer = Callable[[Bundle], Sequence[Any]]


def main() -> None:
    """Judge and write what was found."""
    source_folder, folder, samples, out, *fixture = sys.argv[1:]
    source = opened(Path(source_folder))
    models: dict[str, ir.Model] = {}
    found: Facts = {}
    for role in source.models:
        found[role], model = facts_of(source[role], role, Path(folder), Path(samples))
        models |= {role: model} if model is not None else {}
    result: Facts = {"models": found}
    if len(models) == len(source.models):
        candidate = Bundle(models, source.config, source.generation_config, source.files)
        result |= gap_between(source, candidate)
        if fixture:
            result |= answered(source, candidate, fixture[0])
    Path(out).write_text(json.dumps(result, indent=1))


def opened(folder: Path) -> Bundle:
    """Return the bundle of a folder."""
    return find_source(Source(path=str(folder)), Path()).open(Path(), lambda _: None).bundle


def facts_of(source: ir.Model, role: str, folder: Path, samples: Path) -> tuple[Facts, ir.Model | None]:
    """Return what can be counted in one model, whether it is valid, and the model to go on with.

    That has no shapes noted inside where those that are make it fail: what it computes is of interest still.
    """
    file = folder / file_of_role(role)
    try:
        model = open_model(file)
        infer_types(model)
        infer_types(source)
    except SurgeryError as error:
        return {"unreadable": error.message}, None
    casts = [node for node in nodes_of(model) if is_between_precisions(node)]
    facts: Facts = {
        "casts": len(casts),
        "float32_nodes": sum(works_in_float32(node) for node in nodes_of(model)),
        "of_nodes": sum(works_in_float32(node) for node in nodes_of(source)),
        "bytes": sum(path.stat().st_size for path in folder.glob(f"{file.name}*")),
        "invalid": problem_of(file),
    }
    sample = longest(samples / file.stem)
    try:
        facts["bytes_cast"] = bytes_cast(model, casts, sample)
    except SurgeryError as error:
        facts["does_not_run"] = first_line(error)
        forget_shapes(model)
        with contextlib.suppress(SurgeryError):  # then it is not the shapes, which is all that matters here
            facts["bytes_cast_without_shapes"] = bytes_cast(model, casts, sample)
    return facts, model


def forget_shapes(model: ir.Model) -> None:
    """Remove the shapes that a model notes of what its nodes give."""
    for node in nodes_of(model):
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of all graphs."""
    for graph in graphs_of(model.graph):
        yield from graph


def is_between_precisions(node: ir.Node) -> bool:
    """Say whether a node is a cast from float32 to float16 or back."""
    if node.op_type != "Cast" or node.domain:
        return False
    return {value.dtype for value in (*node.inputs, *node.outputs) if value is not None} == {FLOAT, HALF}


def works_in_float32(node: ir.Node) -> bool:
    """Say whether a node reads or gives float32, but for casts and for what holds its numbers itself."""
    if node.op_type in ("Cast", "Constant") and not node.domain:
        return False
    return any(value is not None and value.dtype == FLOAT for value in (*node.inputs, *node.outputs))


def problem_of(file: Path) -> str:
    """Return what onnx's checker, with strict types, or ONNX Runtime says against a file, or nothing."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnx and ONNX Runtime raise types of their own, which have no other ancestor
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def longest(folder: Path) -> Mapping[str, np.ndarray]:
    """Return the longest sample of one row."""
    samples = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
    rows = [sample for sample in samples if len(next(iter(sample.values()))) == 1] or samples
    return max(rows, key=lambda sample: sum(array.size for array in sample.values()))


def bytes_cast(model: ir.Model, casts: Sequence[ir.Node], feeds: Mapping[str, np.ndarray]) -> int:
    """Return how many bytes the casts of the main graph read and write on one sample.

    Raises:
        SurgeryError: The model does not run.
    """
    counted = model.clone()
    names = {node.outputs[0].name for node in casts if node.graph is model.graph}
    sizes = []
    for node in tuple(counted.graph):
        if node.outputs[0].name in names:
            size = ir.node("Size", [node.outputs[0]])
            counted.graph.append(size)
            size.outputs[0].name = f"size of {node.outputs[0].name}"
            size.outputs[0].dtype, size.outputs[0].shape = ir.DataType.INT64, ir.Shape([])
            sizes.append(size.outputs[0])
    if not sizes:
        return 0
    counted.graph.outputs[:] = sizes
    with runtime_errors("it"):
        session = open_session(counted)
        elements = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    return int(sum(elements)) * BYTES_OF_A_CAST


def gap_between(source: Bundle, candidate: Bundle) -> Facts:
    """Return how far half precision moves the answers, emulated, as a verdict says it."""
    made = CastFp16()
    judge = Judge(source, Check())
    try:
        claims = made.claims(source, candidate)
        verdict = judge.judge(source, candidate, claims, Effect.CLOSE, CastFp16.tolerance)
    except (SurgeryError, ValueError) as error:
        return {"no_verdict": first_line(error)}
    finally:
        judge.close()
    assert verdict.step is not None
    return {
        "gap": verdict.step.as_json(),
        "accurate": verdict.is_accurate,
        "failure": str(verdict.failures[0]) if verdict.failures else "",
        "outputs": {name: gap.as_json() for name, gap in verdict.outputs.items()},
        "coverage": {name: str(coverage) for name, coverage in verdict.coverage.items()},
    }


# What trained networks answer


def lowered(bundle: Bundle) -> Bundle:
    """Return a bundle that computes in float32 what a GPU would compute in half precision."""
    models = {role: lower_half(model) for role, model in bundle.models.items()}
    return Bundle(models, bundle.config, bundle.generation_config, bundle.files)


def answered(source: Bundle, candidate: Bundle, fixture: str) -> Facts:
    """Return how many answers are right, of the source and of the candidate, and how many of the source's it keeps.

    The candidate is asked twice: as a GPU would compute it, and as it is, on the CPU, which computes it in float32.
    """
    wanted, answer = questions(fixture)
    before = answer(source)
    try:
        after, on_cpu = answer(lowered(candidate)), answer(candidate)
    except SurgeryError as error:
        return {"unanswered": f"it answers no question: {first_line(error)}"}
    counts = {
        "questions": len(wanted),
        "right_before": sum(given == right for given, right in zip(before, wanted, strict=True)),
        "right_after": sum(given == right for given, right in zip(after, wanted, strict=True)),
        "as_before": sum(given == right for given, right in zip(after, before, strict=True)),
        "as_before_on_cpu": sum(given == right for given, right in zip(on_cpu, before, strict=True)),
    }
    return {"answers": counts}


def questions(fixture: str) -> tuple[Sequence[Any], Answer]:
    """Return the right answers to a fixture's questions, and how a bundle is asked them."""
    if not (FIXTURES / fixture).exists():
        return of_a_variant(fixture)
    training, script = loaded("training"), loaded(f"make_{fixture}")
    rng = random.Random(SEED)
    exercises = [training.draw(script.MAKER, rng, held_out=True) for _ in range(QUESTIONS)]
    asked = [question for question, _ in exercises]
    answer = labels(script, asked) if fixture == "comparer" else texts(fixture, asked)
    return [wanted for _, wanted in exercises], answer


def of_a_variant(name: str) -> tuple[Sequence[Any], Answer]:
    """Return the sorter's own answers as tokens: it sorts no row of 100 digits rightly, but always the same way."""
    script = loaded("make_overflows")
    ids, mask = script.texts(SEED, *ASKED_OF_VARIANTS.get(name, ASKED))
    wanted = script.answers(script.load(script.SORTER), (ids, mask))

    def answer(bundle: Bundle) -> Sequence[Any]:
        return script.answers(generator(bundle), (ids, mask)).tolist()  # type: ignore[no-any-return]

    return wanted.tolist(), answer


def generator(bundle: Bundle) -> Any:
    """Return a bundle as transformers' `generate` wants it."""
    from surgery.runtime.generation import Generator

    return Generator(bundle)


def texts(fixture: str, asked: Sequence[str]) -> Answer:
    """Return how a decoder is asked: greedily, in padded batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / fixture)
    return lambda bundle: loaded("training").answer(generator(bundle), tokenizer, asked)  # type: ignore[no-any-return]


def labels(script: Any, asked: Sequence[str]) -> Answer:
    """Return how the classifier is asked."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "comparer")
    feeds = {name: tensor.numpy() for name, tensor in script.encode(tokenizer, asked).items()}

    def answer(bundle: Bundle) -> Sequence[Any]:
        session = open_session(bundle["model"])
        logits = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
        return [bundle.config["id2label"][str(index)] for index in logits["logits"].argmax(-1).tolist()]

    return answer


def loaded(name: str) -> ModuleType:
    """Return a maker of fixtures as a module."""
    sys.path[:0] = [] if str(FIXTURES) in sys.path else [str(FIXTURES)]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


if __name__ == "__main__":
    main()
