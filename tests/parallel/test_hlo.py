"""Programs are read as they would run: loops counted, slices recognised, groups in every notation."""

import numpy as np
import pytest

from fusejax.parallel.costs import Assumptions, communication_seconds, step_time
from fusejax.parallel.device_kinds import DEVICE_KINDS
from fusejax.parallel.hlo import collectives, dot_flops, largest_array, parse_program

TEXT = """HloModule test

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (state: (s32[], f32[8,4], bf16[2,4])) -> pred[] {
  %state = (s32[], f32[8,4]{1,0}, /*index=2*/bf16[2,4]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%turn, %limit), direction=LT
}

%body (state.1: (s32[], f32[8,4], bf16[2,4])) -> (s32[], f32[8,4], bf16[2,4]) {
  %state.1 = (s32[], f32[8,4]{1,0}, bf16[2,4]{1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%turn.1, %one)
  %x = f32[8,4]{1,0} get-tuple-element(%state.1), index=1
  %fixed = bf16[2,4]{1,0} get-tuple-element(%state.1), index=2
  %once = bf16[8,4]{1,0} all-gather(%fixed), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %wide = f32[8,4]{1,0} convert(%once)
  %square = f32[8,8]{1,0} dot(%x, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %reduced = f32[8,8]{1,0} all-reduce(%square), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %turned = f32[8,8]{1,0} transpose(%reduced), dimensions={1,0}
  %where = s32[] constant(0)
  %mine = f32[4,8]{1,0} dynamic-slice(%turned, %where, %where), dynamic_slice_sizes={4,8}
  %whole = f32[8,4]{1,0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=2] {'a'}, to_apply=%add
  %alone = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  ROOT %out = (s32[], f32[8,4]{1,0}, bf16[2,4]{1,0}) tuple(%next, %whole, %fixed)
}

ENTRY %main (start: (s32[], f32[8,4], bf16[2,4])) -> (s32[], f32[8,4], bf16[2,4]) {
  %start = (s32[], f32[8,4]{1,0}, bf16[2,4]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,4]{1,0}, bf16[2,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_collectives_are_those_of_an_accelerator():
    gather, scatter, reduce = collectives(parse_program(TEXT))  # `alone` has groups of one device: nothing is sent
    assert (gather.kind, gather.dtypes, gather.bytes, gather.count) == ("all-gather", "bf16", 64, 1), "does not change"
    assert gather.wire_bytes == 64 * 3 / 4
    assert (scatter.kind, scatter.bytes, scatter.count, scatter.group) == ("reduce-scatter", 256, 5, 2)
    assert scatter.wire_bytes == 128
    assert (reduce.kind, reduce.bytes, reduce.count, reduce.wire_bytes) == ("all-reduce", 128, 5, 128)
    np.testing.assert_array_equal(scatter.groups, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(reduce.groups, [[0, 2], [1, 3]])


@pytest.mark.parametrize(("given", "count"), [("%fixed", 1), ("%mixed", 5)])
def test_a_called_computation_knows_what_its_callers_loop_does_not_change(given, count):
    """The body of a `shard_map` is called; compilers write it into the loop before they move anything out of it."""
    called = """%called (part: bf16[2,4]) -> bf16[8,4] {
  %part = bf16[2,4]{1,0} parameter(0)
  ROOT %all = bf16[8,4]{1,0} all-gather(%part), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%body"""
    there = "all-gather(%fixed), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}"
    text = TEXT.replace("%body", called, 1).replace(there, f"call({given}), to_apply=%called")
    narrow = "  %mixed = bf16[2,4]{1,0} dynamic-slice(%x, %turn.1, %turn.1), dynamic_slice_sizes={2,4}\n  %once ="
    found = collectives(parse_program(text.replace("  %once =", narrow)))
    assert [(c.bytes, c.count) for c in found if c.kind == "all-gather"] == [(64, count)] and len(found) == 3


def test_matrix_products_count_as_often_as_their_loop_runs():
    program = parse_program(TEXT)
    assert dot_flops(program) == 5 * 2 * 8 * 8 * 4
    assert largest_array(program) == (256, "f32[8,8]")


def test_the_short_notation_reads_the_same():
    text = TEXT.replace("%", "")
    for name in ("add", "condition", "body"):
        start = text.index(f"\n{name} (") + 1
        text = text[:start] + f"{name} {{" + text[text.index("\n", start) :]
    assert dot_flops(parse_program(text)) == dot_flops(parse_program(TEXT))
    assert [c.count for c in collectives(parse_program(text))] == [1, 5, 5]


def test_a_loop_without_a_known_end_is_refused():
    with pytest.raises(ValueError, match="no constant number of turns"):
        dot_flops(parse_program(TEXT.replace("constant(5)", "parameter(1)")))
    with pytest.raises(ValueError, match="no HLO"):
        parse_program("{}")


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'a','b'}", [[3, 2, 1, 0]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ],
)
def test_groups_are_read_in_every_notation(notation, groups):
    text = TEXT.replace("mesh['a'=2,'b'=2] {'a'}", notation)
    np.testing.assert_array_equal(collectives(parse_program(text))[-1].groups, groups)


def test_groups_in_an_unknown_notation_are_no_groups_of_one():
    with pytest.raises(ValueError, match="notation that is not read"):
        collectives(parse_program(TEXT.replace("mesh['a'=2,'b'=2] {'a'}", "all_of_them")))


def test_a_group_over_two_nodes_goes_by_the_network():
    kind, (near, *_) = DEVICE_KINDS["H100-80G"], collectives(parse_program(TEXT))
    far = near._replace(groups=near.groups * kind.linked)
    seconds = [communication_seconds([c], kind, link_share=1.0) for c in (near, far)]
    assert seconds == [near.wire_bytes / kind.link_bandwidth, near.wire_bytes / kind.network_bandwidth]


def test_communication_hides_behind_the_rest_or_not_at_all():
    kind, found = DEVICE_KINDS["H100-80G"], collectives(parse_program(TEXT))
    time = step_time(
        kind, flops=kind.bf16_flops, memory_bytes=0, collectives=found, assumptions=Assumptions(matmul_share=0.5)
    )
    assert time.compute == 2.0 == time.expected and time.at_peak == 1.0
    assert time.without_overlap == time.compute + time.communication


def test_elements_written_in_the_place_of_operands_are_those_of_the_tuple() -> None:
    """jax 0.12 writes `%p#1` for a get-tuple-element."""
    text = """HloModule m
ENTRY %main (p: (s32[], (f32[4,8]{1,0}, f32[8,2]{1,0}))) -> f32[4,2] {
  %p = (s32[], (f32[4,8]{1,0}, /*index=1*/f32[8,2]{1,0})) parameter(0)
  ROOT %d = f32[4,2]{1,0} dot(%p#1#0, %p#1#1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    program = parse_program(text)
    assert dot_flops(program) == 2 * 4 * 8 * 2
    assert program.computations["main"]["p#1"].operands == ("p",)
    with pytest.raises(ValueError, match="no element"):
        parse_program(text.replace("%p#1#1", "%p#1#2"))


SUMMED = """HloModule sums

add {{
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT c = f32[] add(a, b)
}}

ENTRY main {{
  x = bf16[8,4]{{1,0}} parameter(0)
  y = bf16[8,4]{{1,0}} parameter(1)
  z = bf16[8,4]{{1,0}} parameter(2)
  i = s32[] parameter(3)
  zero = s32[] constant(0)
  p = bf16[8,4]{{1,0}} all-reduce(x), channel_id=1, replica_groups={{{{0,1,2,3}}}}, to_apply=add
  q = bf16[8,4]{{1,0}} all-reduce(y), channel_id=2, replica_groups={{{{0,1,2,3}}}}, to_apply=add
  r = bf16[8,4]{{1,0}} all-reduce(z), channel_id=3, replica_groups={{{{{third}}}}}, to_apply=add
  s = bf16[8,4]{{1,0}} add(p, q)
  t = bf16[8,4]{{1,0}} add(s, r)
  ROOT u = bf16[{rows},4]{{1,0}} {last}
}}
"""
SLICED = {"rows": 2, "last": "dynamic-slice(t, i, zero), dynamic_slice_sizes={2,4}"}
WHOLE = {"rows": 8, "last": "negate(t)"}


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        (WHOLE | {"third": "0,1,2,3"}, ["all-reduce"]),
        (SLICED | {"third": "0,1,2,3"}, ["reduce-scatter"]),
        (WHOLE | {"third": "0,1"}, ["all-reduce", "all-reduce"]),  # other devices: p + q is one, r another
        ({"rows": 8, "last": "multiply(t, p)", "third": "0,1,2,3"}, ["all-reduce"] * 3),  # p is read alone, too
    ],
)
def test_all_reduces_that_are_added_up_are_one(given, kinds):
    found = collectives(parse_program(SUMMED.format(**given)))
    assert [c.kind for c in found] == kinds and all(c.bytes == 64 for c in found)
