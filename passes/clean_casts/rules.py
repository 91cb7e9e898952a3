"""The rules for a single cast: each says what may stand for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from passes.clean_casts.exactness import COMMON, can_skip, keeps_all
from passes.clean_casts.sharing import merge
from passes.clean_casts.site import Site, inner_cast, is_cast, key_of_cast, source_of, source_type, target_type

Rule = Callable[[ir.Node], ir.Value | None]


def to_same_type(cast: ir.Node) -> ir.Value | None:
    """Cast(x: T, to=T) -> x"""
    return source_of(cast) if source_type(cast) == target_type(cast) else None


def there_and_back(cast: ir.Node) -> ir.Value | None:
    """Cast(Cast(x: T, to=wider), to=T) -> x"""
    inner = inner_cast(cast)
    if inner is None or source_type(inner) != target_type(cast):
        return None
    return source_of(inner) if keeps_all(source_type(inner), target_type(inner)) else None


def through_float16(cast: ir.Node) -> ir.Value | None:
    """Cast(Cast(x: float, to=float16), to=float) -> x, which is not rounded any more"""
    inner = inner_cast(cast)
    if inner is None or target_type(inner) != ir.DataType.FLOAT16:
        return None
    return source_of(inner) if source_type(inner) == target_type(cast) == ir.DataType.FLOAT else None


RULES: tuple[Rule, ...] = (to_same_type, there_and_back)
LOSSY: tuple[Rule, ...] = (through_float16,)


def apply_rules(site: Site, rules: Sequence[Rule]) -> bool:
    """Remove each cast that nothing uses or that something can stand for, and say whether there was one."""
    changed = False
    for graph in site.graphs:
        for cast in site.casts(graph):
            changed |= apply_to(site, cast, rules)
    return changed


def apply_to(site: Site, cast: ir.Node, rules: Sequence[Rule]) -> bool:
    """Remove one cast if nothing uses it, if something stands for it, or if all that use it can do without."""
    (value,) = cast.outputs
    if not value.uses() and not value.is_graph_output():
        site.remove(cast)
        return True
    for rule in rules:
        other = rule(cast)
        if other is not None and site.stand_for(other, value):
            return True
    return bypass(site, cast)


def bypass(site: Site, inner: ir.Node) -> bool:
    """Cast(Cast(x, to=wider), to=T) -> Cast(x, to=T), where that leaves fewer casts

    The inner cast goes if all that use it are such casts. Else an outer one goes if x has one like it already.
    """
    (value,) = inner.outputs
    x = source_of(inner)
    able = [user for user, index in value.uses() if index == 0 and can_bypass(site, inner, user)]
    if len(able) == len(value.uses()) and not value.is_graph_output():
        for outer in able:
            outer.replace_input_with(0, x)
        site.remove(inner)
        return True
    return any(merge(site, outer, twin) for outer in able for twin in twins_at(x, outer)[:1])


def can_bypass(site: Site, inner: ir.Node, user: ir.Node) -> bool:
    """Return whether what uses a cast is a cast that can use what that one casts."""
    if not is_cast(user) or not site.shows(source_of(inner), user.graph):
        return False
    if not {source_type(inner), target_type(user)} <= COMMON:
        return False
    return can_skip(source_type(inner), target_type(inner), target_type(user))


def twins_at(x: ir.Value, outer: ir.Node) -> list[ir.Node]:
    """Return the casts of a value in the graph of another cast that cast to the same."""
    casts = [user for user, index in x.uses() if index == 0 and user.graph is outer.graph and is_cast(user)]
    return [cast for cast in casts if key_of_cast(cast)[1:] == key_of_cast(outer)[1:]]
