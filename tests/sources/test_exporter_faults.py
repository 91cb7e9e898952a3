"""The faults of transformers.exporters 5.23 that surgery/sources/exporter.py avoids: each is made to happen.

When one of these tests fails, the fault is gone, and so may its workaround be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers.exporters")
pytest.importorskip("onnxruntime")

from pretrained_cases import save_tiny  # noqa: E402

from surgery.errors import SurgeryError  # noqa: E402
from surgery.sources import exporter  # noqa: E402
from surgery.sources.architectures import DECODER_ONLY  # noqa: E402
from surgery.sources.huggingface import quiet  # noqa: E402

pytestmark = pytest.mark.long

GPT2 = DECODER_ONLY["ForCausalLM"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    folder = save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def prompt(gpt2: Any) -> dict[str, Any]:
    return exporter.samples(gpt2, GPT2)["prefill"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def decomposed(model: Any, mask: Any, opset: int) -> Any:
    """What transformers.exporters makes of a model for generation by itself."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs = {"input_ids": torch.full(mask.shape, 3), "attention_mask": mask}
    config = OnnxConfig(dynamic=True, opset_version=opset)
    return OnnxExporter().export_for_generation(model, inputs, config, multi_token_decode=True).components


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    folder = save_tiny("t5", tmp_path_factory.mktemp("t5"))
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def test_a_mask_without_padding_is_lost_by_its_own_decomposition(gpt2: Any) -> None:
    for component in decomposed(gpt2, torch.ones(2, 5).long(), 23).values():
        assert "attention_mask" not in [value.name for value in component.program.graph.inputs]


def test_the_decode_of_an_encoder_decoder_has_one_token_and_there_is_no_encoder(t5: Any) -> None:
    components = decomposed(t5, exporter._padded(5), 18)
    ids = next(value for value in components["decode"].program.graph.inputs if value.name == "decoder_input_ids")
    assert ids.shape is not None
    assert ids.shape[1] == 1
    assert "encoder" not in components


def test_the_decode_of_an_encoder_decoder_cannot_be_exported_from_opset_23_on(t5: Any) -> None:
    with pytest.raises(RuntimeError, match="failed on component 'decode'"):
        decomposed(t5, exporter._padded(5), 23)


def test_an_axis_of_length_one_is_fixed(gpt2: Any, prompt: dict[str, Any]) -> None:
    short = {name: tensor[:1] for name, tensor in prompt.items()}
    with pytest.raises(SurgeryError, match="'prefill' has fixed axis 0 of 'input_ids' to 1"):
        exporter.export_role(gpt2, GPT2, "prefill", short, 23)


def test_an_opset_that_cannot_be_written_becomes_18(gpt2: Any, prompt: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError, match="the export of 'prefill' has opset 18, not 30"):
        exporter.export_role(gpt2, GPT2, "prefill", prompt, 30)


def test_growing_rotary_embeddings_cannot_be_traced(tmp_path: Path) -> None:
    import transformers

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = save_tiny("llama", tmp_path, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    architecture = DECODER_ONLY["ForCausalLM"]
    with pytest.raises(Exception, match="data-dependent"):
        exporter.export_role(model, architecture, "prefill", exporter.samples(model, architecture)["prefill"], 23)
