"""Claims: what they make of inputs and outputs, one after the other, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from surgery.claims import CastTo, Claim, Fill, HostLoop, Measure, Program, Slice, Take
from surgery.errors import SurgeryError

A, B, C, D = (Program(role) for role in "abcd")
IDS = np.arange(6, dtype=np.int64).reshape(2, 3)
MASK = np.ones((2, 3), dtype=np.int64)


def test_the_default_claim_changes_nothing() -> None:
    claim = Claim.same("a")
    assert claim.is_same
    assert claim.feed({"ids": IDS, "mask": MASK}, ("mask", "ids")) == {"mask": MASK, "ids": IDS}
    assert claim.expect({"y": IDS}) == {"y": IDS}
    assert claim.then(claim).is_same


def test_a_renamed_input_is_fed_by_its_new_name() -> None:
    claim = Claim(A, B, inputs={"tokens": Take("ids")})
    assert claim.feed({"ids": IDS, "mask": MASK}, ("tokens",))["tokens"] is IDS


def test_an_input_is_cast_and_sliced_in_order() -> None:
    claim = Claim(A, B, inputs={"last": Take("ids", (Slice(1, -1), CastTo("int32")))})
    last = claim.feed({"ids": IDS}, ("last",))["last"]
    assert last.dtype == np.int32
    assert last.tolist() == [[2], [5]]


def test_a_value_is_fixed_and_takes_its_shape_from_an_input() -> None:
    claim = Claim(
        A, B, inputs={"use_cache": Fill(True, "bool", (1,)), "past": Fill(0, "float32", (("ids", 0), 2, 0, 4))}
    )
    made = claim.feed({"ids": IDS}, ("ids", "use_cache", "past"))
    assert made["use_cache"].tolist() == [True]
    assert made["past"].shape == (2, 2, 0, 4)


def test_an_input_that_nothing_is_said_of_is_an_error() -> None:
    with pytest.raises(SurgeryError, match="the claim on b says nothing of its input 'past'"):
        Claim(A, B).feed({"ids": IDS}, ("ids", "past"))


def test_an_entry_for_an_input_that_is_not_there_is_an_error() -> None:
    claim = Claim(A, B, inputs={"tokens": Take("ids")})
    with pytest.raises(SurgeryError, match="maps 'tokens', which is not an input of it; did you mean 'token'"):
        claim.refuse_unknown_inputs(("token", "mask"))
    claim.refuse_unknown_inputs(("tokens", "mask"))


def test_an_entry_made_of_what_is_not_there_is_an_error() -> None:
    with pytest.raises(SurgeryError, match="cannot make the input 'tokens': a has no input 'idz'"):
        Claim(A, B, inputs={"tokens": Take("idz")}).feed({"ids": IDS}, ("tokens",))
    with pytest.raises(SurgeryError, match="cannot make the output 'y': a has no output 'z'"):
        Claim(A, B, outputs={"y": Take("z")}).expect({"x": IDS})
    with pytest.raises(SurgeryError, match="cannot make the output 'y': what it is made of has fewer axes"):
        Claim(A, B, outputs={"y": Take("x", (Slice(2, 0, 1),))}).expect({"x": IDS})


def test_a_renamed_output_is_expected_by_its_new_name_only() -> None:
    assert list(Claim(A, B, outputs={"z": Take("y")}).expect({"y": IDS, "x": MASK})) == ["x", "z"]


def test_a_dropped_output_is_not_expected() -> None:
    assert list(Claim(A, B, drops=frozenset({"y"})).expect({"y": IDS, "x": MASK})) == ["x"]


def test_the_origin_of_an_output_is_its_name_in_the_source() -> None:
    claim = Claim(A, B, outputs={"z": Take("y")}).then(Claim(B, C, outputs={"w": Take("z", (Slice(0, -1),))}))
    assert (claim.origin("w"), claim.origin("x")) == ("y", "x")


def test_renames_compose() -> None:
    claim = Claim(A, B, inputs={"i": Take("ids")}, outputs={"z": Take("y")}).then(
        Claim(B, C, inputs={"j": Take("i")}, outputs={"w": Take("z")})
    )
    assert claim.feed({"ids": IDS, "mask": MASK}, ("j", "mask")) == {"j": IDS, "mask": MASK}
    assert claim.expect({"y": IDS, "x": MASK}) == {"x": MASK, "w": IDS}


def test_edits_compose_in_the_order_of_the_steps() -> None:
    first = Claim(A, B, outputs={"last": Take("logits", (Slice(1, -1),))})
    second = Claim(B, C, outputs={"half": Take("last", (CastTo("float16"),))})
    third = Claim(C, D, outputs={"one": Take("half", (Slice(0, 0, 1),))})
    logits = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    made = first.then(second).then(third).expect({"logits": logits})
    assert list(made) == ["one"]
    assert made["one"].dtype == np.float16
    assert made["one"].tolist() == [[[4, 5]]]


def test_composition_does_not_depend_on_where_one_begins() -> None:
    claims = (
        Claim(A, B, inputs={"i": Take("ids", (CastTo("int32"),))}, outputs={"z": Take("y")}, drops=frozenset({"x"})),
        Claim(B, C, inputs={"k": Take("i"), "i": Fill(0, "int32", (("i", 1),))}, outputs={"y": Take("z")}),
        Claim(C, D, inputs={"i": Take("k", (Slice(1, -1),))}, extra=frozenset({"n"})),
    )
    left = claims[0].then(claims[1]).then(claims[2])
    right = claims[0].then(claims[1].then(claims[2]))
    arrays, outputs = {"ids": IDS}, {"y": IDS, "x": MASK}
    for one, other in zip(left.feed(arrays, ("i",)).values(), right.feed(arrays, ("i",)).values(), strict=True):
        assert one.dtype == other.dtype == np.int32
        assert one.tolist() == other.tolist() == [[2], [5]]
    assert left.expect(outputs) == right.expect(outputs) == {"y": IDS}
    assert left.extra == right.extra == {"n"}


def test_a_swap_twice_is_where_it_began() -> None:
    swap = Claim(A, A, outputs={"x": Take("y"), "y": Take("x")})
    assert swap.expect({"x": IDS, "y": MASK}) == {"x": MASK, "y": IDS}
    assert swap.then(swap).expect({"x": IDS, "y": MASK}) == {"x": IDS, "y": MASK}


def test_what_was_renamed_and_then_dropped_is_not_expected_by_its_old_name() -> None:
    claim = Claim(A, B, outputs={"z": Take("y")}).then(Claim(B, C, drops=frozenset({"z"})))
    assert list(claim.expect({"y": IDS, "x": MASK})) == ["x"]


def test_what_was_dropped_may_come_back_as_something_new() -> None:
    claim = Claim(A, B, drops=frozenset({"y"})).then(Claim(B, C, extra=frozenset({"y"})))
    assert list(claim.expect({"y": IDS, "x": MASK})) == ["x"]
    assert claim.extra == {"y"}


def test_what_is_new_stays_new_by_another_name_and_is_forgotten_once_dropped() -> None:
    first = Claim(A, B, extra=frozenset({"n", "m"}))
    renamed = first.then(Claim(B, C, outputs={"o": Take("n")}))
    assert renamed.extra == {"o", "m"}
    assert renamed.expect({"x": MASK}) == {"x": MASK}
    dropped = renamed.then(Claim(C, D, drops=frozenset({"o"})))
    assert dropped.extra == {"m"}


def test_an_input_that_a_later_step_does_away_with_is_not_fed() -> None:
    claim = Claim(A, B, inputs={"places": Take("position_ids")}).then(Claim(B, C))
    assert claim.feed({"ids": IDS, "position_ids": MASK}, ("ids",)) == {"ids": IDS}


def test_an_input_that_two_are_made_of_is_still_its_own() -> None:
    first = Claim(A, B, inputs={"mask": Take("attention_mask", (CastTo("int32"),))})
    second = Claim(B, C, inputs={"flags": Take("mask", (CastTo("bool"),))})
    made = first.then(second).feed({"attention_mask": MASK}, ("mask", "flags"))
    assert (made["mask"].dtype, made["flags"].dtype) == (np.int32, np.bool_)


def test_a_shape_follows_an_input_through_its_edits() -> None:
    first = Claim(A, B, inputs={"last": Take("ids", (Slice(1, -1),)), "none": Fill(0, "int64", (("ids", 0), 5))})
    second = Claim(
        B, C, inputs={"p": Fill(0, "bool", (("last", 1),)), "q": Fill(0, "bool", (("none", 0), ("none", 1)))}
    )
    third = Claim(C, D, inputs={"r": Fill(0, "bool", (("p", 0), ("q", 1)))})
    arrays = {"ids": IDS}
    made = first.then(second).feed(arrays, ("p", "q"))
    assert (made["p"].shape, made["q"].shape) == ((1,), (2, 5))
    assert first.then(second).then(third).feed(arrays, ("r",))["r"].shape == (1, 5)


def test_tokens_anywhere_are_tokens_for_good() -> None:
    loop = HostLoop("greedy", ("prefill", "decode"))
    claim = Claim(loop, A, measure=Measure.TOKENS).then(Claim(A, B))
    assert claim.measure is Measure.TOKENS
    assert str(claim.reference) == "greedy over prefill + decode"
