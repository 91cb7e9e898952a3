"""What generation makes of bundles: other namings, types and roles, and what it says of those that it cannot use."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from models import decoder_pair, generic, single_decoder

from passes.last_logits import LastLogits
from passes.merge_if import MergeIf
from surgery.bundle import Bundle
from surgery.contract import Context
from surgery.errors import ModelFileError, RecipeError, Refused, SurgeryError
from surgery.interfaces import rename_values
from surgery.recipe import Source
from surgery.sources import find_source
from surgery.storage import save_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from surgery.runtime.generation import Generator, open_generator  # noqa: E402

FOREIGN = Path(__file__).parent.parent / "sources" / "foreign"
FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [11, 12, 13, 14, 15]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
ONE = torch.tensor([[11, 12, 13, 14, 15]])


def folder(name: str, *roles: str, names: str = "canonical") -> Bundle:
    """Some of the models of a folder that another tool has made."""
    bundle = find_source(Source(path=str(FOREIGN / name), names=names), Path()).open(Path(), lambda _: None).bundle
    models = {role: model for role, model in bundle.models.items() if role in roles}
    return Bundle(models, bundle.config, bundle.generation_config, bundle.files)


def opened(bundle: Bundle) -> Generator:
    return open_generator(bundle, threads=1)


def tokens(bundle: Bundle, ids: Any = PROMPTS, mask: Any = MASK, **options: Any) -> list[list[int]]:
    answer = opened(bundle).generate(ids, attention_mask=mask, **{"max_new_tokens": 8, **options})
    return answer.tolist()  # type: ignore[no-any-return]


def one(bundle: Bundle, **options: Any) -> list[list[int]]:
    return tokens(bundle, ONE, None, **options)


# Roles and namings


def test_the_config_may_be_of_a_kind_that_transformers_does_not_know():
    assert "model_type" not in decoder_pair().config
    assert len(tokens(decoder_pair())[0]) == 13


def test_a_single_model_is_used_for_what_it_is():
    pair = decoder_pair()
    alone = single_decoder()
    assert list(alone.models) == ["model"]
    alone = Bundle(alone.models, alone.config, pair.generation_config)
    assert opened(alone).roles == ("decode",)
    assert tokens(alone) == tokens(pair)
    assert tokens(alone, num_beams=3) == tokens(pair, num_beams=3)


def test_a_decode_that_takes_one_token_reads_a_prompt_one_by_one():
    pair = decoder_pair()
    del (alone := decoder_pair()).models["prefill"]
    generator = opened(alone)
    found = generator.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8)
    assert found.tolist() == tokens(pair)
    assert one(alone, prompt_lookup_num_tokens=2) == one(pair, prompt_lookup_num_tokens=2) == one(pair)


def test_a_prefill_alone_generates_without_a_cache():
    del (alone := decoder_pair()).models["decode"]
    generator = opened(alone)
    assert generator.generation_config.use_cache is False
    assert generator.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8).tolist() == tokens(decoder_pair())
    with pytest.raises(Refused, match="'prefill' alone takes no cache"):
        generator.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, use_cache=True)


def test_a_prefill_that_was_cut_goes_on_as_one_that_was_not():
    pair = decoder_pair()
    cut = decoder_pair()
    LastLogits(models=("prefill",)).apply(cut, lambda role: Context(role=role))
    assert tokens(cut) == tokens(pair)
    assert tokens(cut, use_cache=False) == tokens(pair)
    assert one(cut, prompt_lookup_num_tokens=2) == one(pair)
    assert opened(cut)(ONE).logits.shape[1] == ONE.shape[1]
    del cut.models["decode"]
    with pytest.raises(Refused, match="'prefill' gives the logits of the last position only, and more are wanted"):
        opened(cut)(ONE)


@pytest.mark.parametrize("names", ["keep", "canonical"])
def test_the_names_of_transformers_exporters_are_understood(names: str):
    bundle = folder("gpt2_exporters", "prefill", "decode", names=names)
    kept = folder("gpt2_exporters", "prefill", "decode")
    assert ("input.past_key_values.layers.0.keys" in {v.name for v in bundle["decode"].graph.inputs}) == (
        names == "keep"
    )
    assert tokens(bundle, num_beams=2) == tokens(kept, num_beams=2)
    assert one(bundle, prompt_lookup_num_tokens=2) == one(bundle)
    assert tokens(bundle) == tokens(bundle, use_cache=False)


def test_optimums_merged_decoders_say_what_its_two_say():
    pair, merged = (folder("gpt2_all", *roles) for roles in (("prefill", "decode"), ("decoder",)))
    assert one(pair) == one(merged) == one(pair, use_cache=False)
    assert one(pair, num_beams=3) == one(merged, num_beams=3)
    pair, merged = (folder("t5_all", "encoder", *roles) for roles in (("prefill", "decode"), ("decoder",)))
    assert tokens(pair, num_beams=3) == tokens(merged, num_beams=3) == tokens(pair, num_beams=3, use_cache=False)


def test_several_tokens_at_once_are_given_only_to_a_decoder_that_was_seen_to_take_them():
    # Optimum exports GPT-2's decode for one new token, with a free axis: two at once give other logits, and no error.
    generator = opened(folder("gpt2_all", "prefill", "decode"))
    assert generator.generate(ONE, max_new_tokens=8, prompt_lookup_num_tokens=2).tolist() == one(
        folder("gpt2_all", "prefill", "decode")
    )
    assert generator._reader.following._takes_several is False
    generator = opened(folder("llama_genai", "decode"))
    generator.generate(ONE, max_new_tokens=2)
    assert generator._reader.following._takes_several is True


@pytest.mark.parametrize(("name", "roles"), [("gpt2_all", ("prefill", "decode")), ("llama_genai", ("decode",))])
def test_padding_is_refused_where_it_changes_the_answer(name: str, roles: tuple[str, ...]):
    # One counts positions from the padding on; the other's GroupQueryAttention takes padding for the end of the text.
    bundle = folder(name, *roles)
    with pytest.raises(Refused, match=f"'{roles[0]}' answers otherwise when a prompt is padded on the left"):
        tokens(bundle)
    assert len(one(bundle)[0]) == 13


def test_padding_is_refused_where_no_mask_is_taken():
    pair = decoder_pair()
    for model in pair.models.values():
        mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
        model.graph.inputs.remove(mask)
        mask.name = "was"
        ids = next(value for value in model.graph.inputs if value.name == "input_ids")
        past = [value for value in model.graph.inputs if (value.name or "").startswith("past")]
        ones = ones_like(model, ids, past[0] if past else None)
        mask.replace_all_uses_with(ones)
    assert one(pair) == one(decoder_pair())
    with pytest.raises(Refused, match="'prefill' takes no 'attention_mask'"):
        tokens(pair)


def ones_like(model: ir.Model, ids: ir.Value, past: ir.Value | None) -> ir.Value:
    """Put a mask of ones [batch, past + new] at the beginning of a model."""
    nodes: list[ir.Node] = []

    def node(kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        made = ir.node(kind, inputs, attributes)
        made.outputs[0].name = f"made_{len(nodes)}"
        nodes.append(made)
        return made.outputs[0]

    batch = node("Shape", [ids], start=0, end=1)
    length = node("Shape", [ids], start=1, end=2)
    if past is not None:
        length = node("Add", [length, node("Shape", [past], start=2, end=3)])
    shape = node("Concat", [batch, length], axis=0)
    filled = node("ConstantOfShape", [shape], value=ir.tensor(np.array([1], dtype=np.int64)))
    model.graph.insert_before(model.graph[0], nodes)
    return filled


# Types


def retyped(bundle: Bundle, types: Mapping[str, ir.DataType]) -> Bundle:
    """A bundle whose inputs and outputs, by the beginning of their names, are of other types, cast inside."""
    for model in bundle.models.values():
        graph = model.graph
        for value in list(graph.inputs):
            wanted = next((type_ for start, type_ in types.items() if (value.name or "").startswith(start)), None)
            if wanted is None:
                continue
            cast = ir.node("Cast", [value], {"to": int(value.dtype or 0)})
            cast.outputs[0].name = f"{value.name}_cast"
            value.replace_all_uses_with(cast.outputs[0])
            cast.replace_input_with(0, value)
            value.type = ir.TensorType(wanted)
            graph.insert_before(graph[0], cast)
        for index, value in enumerate(list(graph.outputs)):
            wanted = next((type_ for start, type_ in types.items() if (value.name or "").startswith(start)), None)
            if wanted is None:
                continue
            name, value.name = value.name, f"{value.name}_wide"
            cast = ir.node("Cast", [value], {"to": int(wanted)})
            cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, ir.TensorType(wanted)
            graph.outputs[index] = cast.outputs[0]
            graph.append(cast)
    return bundle


def test_ids_and_masks_may_be_int32():
    narrow = {"input_ids": ir.DataType.INT32, "attention_mask": ir.DataType.INT32, "position_ids": ir.DataType.INT32}
    assert tokens(retyped(decoder_pair(), narrow)) == tokens(decoder_pair())


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_float16_cache_goes_from_step_to_step_as_float16(is_merged: bool):
    half = {"present": ir.DataType.FLOAT16, "past_key_values": ir.DataType.FLOAT16, "logits": ir.DataType.FLOAT16}
    bundle = retyped(decoder_pair(), half)
    if is_merged:
        MergeIf().apply(bundle, lambda role: Context(role=role))
    generator = opened(bundle)
    output = generator.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, return_dict_in_generate=True)
    assert {value.data_type() for value in output.past_key_values.pieces.values()} == {"tensor(float16)"}
    assert generator.dtype == torch.float16
    exact = opened(decoder_pair()).generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=8, return_dict_in_generate=True, output_logits=True
    )
    first = generator(PROMPTS, attention_mask=MASK).logits[:, -1]
    torch.testing.assert_close(first.float(), exact.logits[0], atol=0.02, rtol=0.01)


def test_caches_of_two_types_are_refused():
    bundle = decoder_pair()
    half = retyped(decoder_pair(), {"present": ir.DataType.FLOAT16, "past_key_values": ir.DataType.FLOAT16})
    bundle.models["decode"] = half["decode"]
    with pytest.raises(Refused, match=r"takes 'past_key_values.0.key' as tensor\(float16\), and 'prefill' gives it as"):
        opened(bundle)


# What is refused


def test_models_that_cannot_generate_are_refused_by_role():
    with pytest.raises(Refused, match="cannot generate with model; 'prefill' and 'decode', or 'decoder', are needed"):
        opened(Bundle(generic().models, {"vocab_size": 5}))
    with pytest.raises(Refused, match="cannot generate with no models"):
        opened(Bundle({}, {"vocab_size": 5}))


def test_a_bundle_without_a_config_is_refused():
    with pytest.raises(Refused, match=r"the bundle has no config\.json") as raised:
        opened(Bundle(decoder_pair().models))
    assert "generation_config.json" in raised.value.hint


@pytest.mark.parametrize("roles", [("prefill", "decode"), ("decoder",)])
def test_an_encoder_decoder_without_its_encoder_is_refused(roles: tuple[str, ...]):
    with pytest.raises(Refused, match="'t5' is an encoder-decoder, and the bundle has no 'encoder'"):
        opened(folder("t5_all", *roles))
    nameless = folder("t5_all", *roles)
    nameless.config = {"vocab_size": 16}
    with pytest.raises(Refused, match="generation has nothing to feed to the input 'encoder_") as raised:
        opened(nameless)
    assert "'encoder'" in raised.value.hint


def test_a_decode_whose_keys_nothing_gives_is_refused():
    with pytest.raises(
        Refused, match=r"'decode' takes 'past_key_values.0.encoder.key', and 'decode' gives nothing like"
    ):
        opened(folder("t5_all", "encoder", "decode"))


def test_an_input_that_nothing_is_known_of_is_refused_by_name():
    bundle = decoder_pair()
    strange = ir.val("speed", dtype=ir.DataType.FLOAT, shape=[1])
    bundle["decode"].graph.inputs.append(strange)
    with pytest.raises(Refused, match="generation has nothing to feed to the input 'speed' of 'decode'"):
        opened(bundle)


def test_masks_and_caches_of_other_ranks_are_refused_by_name():
    bundle = decoder_pair()
    for value in bundle["prefill"].graph.inputs:
        if value.name == "attention_mask":
            value.shape = ir.Shape(["batch_size", 1, "sequence_length", "sequence_length"])
    with pytest.raises(SurgeryError, match="attention_mask"):
        opened(bundle)


def test_a_model_without_logits_is_refused():
    bundle = decoder_pair()
    rename_values(bundle["decode"], {"logits": "scores"})
    with pytest.raises(Refused, match="'decode' has no output 'logits'"):
        opened(bundle)


def test_an_encoder_decoder_without_a_first_token_is_refused():
    bundle = folder("t5_all", "encoder", "decoder")
    bundle.generation_config = {"eos_token_id": 2, "pad_token_id": 0}
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        tokens(bundle)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config", {"vocab_size": "many"}),
        ("generation_config", {"eos_token_id": "end"}),
        ("generation_config", {"max_new_tokens": 0}),
    ],
)
def test_a_config_that_transformers_does_not_take_is_said_by_its_file(file: str, words: dict[str, Any]):
    bundle = folder("gpt2_all", "decoder")
    setattr(bundle, file, {**getattr(bundle, file), **words})
    with pytest.raises(ModelFileError, match=f"^{file}.json: .*{next(iter(words))}"):
        opened(bundle)


# Folders and tokenizers


def test_a_saved_folder_is_opened_with_its_tokenizer_and_closed_again(tmp_path: Path):
    bundle = folder("gpt2_all", "prefill", "decode")
    MergeIf().apply(bundle, lambda role: Context(role=role))
    save_models(bundle.models, tmp_path / "merged", layout="optimum", extras=bundle.files)
    with open_generator(tmp_path / "merged", threads=1) as generator:
        assert generator.roles == ("decoder",)
        assert generator.generate(ONE, max_new_tokens=8).tolist() == one(folder("gpt2_all", "prefill", "decode"))
        assert generator.tokenizer.padding_side == "left"
        assert generator.tokenizer.pad_token is not None
        assert generator.tokenizer.decode(generator.tokenizer("a")["input_ids"]) is not None
    with open_generator(str(FOREIGN / "t5_all"), threads=1) as generator:
        assert generator.roles == ("encoder", "decoder")


def test_a_folder_that_is_not_there_or_holds_no_model_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="no such file or folder"):
        open_generator(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="no model is in this folder"):
        open_generator(tmp_path)
    shutil.copytree(FOREIGN / "gpt2_all", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(Refused, match=r"no config\.json"):
        open_generator(tmp_path / "bare")


@pytest.mark.parametrize("is_path", [False, True])
def test_a_tokenizer_may_be_held_as_bytes_or_as_files(is_path: bool):
    files = {path.name: path if is_path else path.read_bytes() for path in (FIXTURES / "adder").glob("*.json")}
    bundle = decoder_pair()
    bundle.files = files
    tokenizer = opened(bundle).tokenizer
    assert tokenizer.batch_decode(tokenizer(["1+2=", "3="], padding=True)["input_ids"]) == ["1+2=", "<pad><pad>3="]


def test_a_missing_tokenizer_and_a_broken_one_are_said():
    bundle = decoder_pair()
    with pytest.raises(SurgeryError, match="the bundle has no tokenizer") as raised:
        _ = opened(bundle).tokenizer
    assert "tokenizer.json" in raised.value.hint
    bundle.files = {"tokenizer.json": b"{", "tokenizer_config.json": b"{}", "config.json": b"{}"}
    with pytest.raises(SurgeryError, match="transformers cannot load the tokenizer"):
        _ = opened(bundle).tokenizer


def test_what_a_bundle_prefers_of_pytorchs_caches_is_left_aside():
    bundle = decoder_pair()
    bundle.generation_config = {**bundle.generation_config, "cache_implementation": "static"}
    assert tokens(bundle) == tokens(decoder_pair())


# On a GPU


def _lacks_cuda() -> str:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime has no CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(bool(_lacks_cuda()), reason=_lacks_cuda() or "there is one")
@pytest.mark.parametrize("is_merged", [False, True])
def test_on_a_gpu_everything_stays_there_and_the_tokens_are_the_same(is_merged: bool):
    bundle = decoder_pair()
    wanted, beams = tokens(bundle), tokens(bundle, num_beams=3)
    if is_merged:
        MergeIf().apply(bundle, lambda role: Context(role=role))
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    with open_generator(bundle, threads=1, providers=providers) as generator:
        assert generator.device.type == "cuda"
        output = generator.generate(
            PROMPTS.cuda(), attention_mask=MASK.cuda(), max_new_tokens=8, return_dict_in_generate=True
        )
        assert output.sequences.tolist() == wanted
        assert {value.device_name().lower() for value in output.past_key_values.pieces.values()} == {"cuda"}
        found = generator.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, num_beams=3)
        assert found.tolist() == beams


def test_the_likeliest_token_is_found_as_torch_finds_it():
    from surgery.runtime.generation.choosing import QuickArgmax

    scores = torch.randint(0, 4, (50, 300)).float()  # many are equal
    scores[3, 7] = float("nan")
    scores[4] = -float("inf")
    cases = [scores, scores[:, 10:], scores.T, scores.double(), scores.long(), scores[0], scores[None]]
    for each in cases:
        wanted = [torch.argmax(each, dim=-1), torch.argmax(each), torch.argmax(each, dim=-1, keepdim=True)]
        wanted.append(torch.argmax(each, dim=0))
        with QuickArgmax():
            found = [torch.argmax(each, dim=-1), torch.argmax(each), torch.argmax(each, dim=-1, keepdim=True)]
            found.append(torch.argmax(each, dim=0))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))
