"""What is beside a transformer's blocks: its order, its slots, how bytes are spread, and whose moves of it count."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from standin.beside import attach
from torch import nn
from toys import Simulation, fixed_plan, toy
from wanvideo_enhanced_blockswap.blockswap.model.groups import GROUPS, in_order, is_beside, lane_of, split
from wanvideo_enhanced_blockswap.blockswap.plan.schedule import Ring, VirtualTime, spread, spread_bytes, steady_time
from wanvideo_enhanced_blockswap.blockswap.wrapper import parts
from wanvideo_enhanced_blockswap.blockswap.wrapper.parts import hidden, moves_disabled, parts_of

S2V = in_order(
    [
        *(f"blocks.{i}" for i in range(40)),
        *(f"audio_injector.{group}.{i}" for group in ("injector", "injector_adain_layers") for i in range(12)),
    ]
)
BLOCK, INJECTOR, ADAIN = 670.0, 200.0, 100.0
"""MB, as S2V 14B has in bf16."""


# ---- names and order


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("blocks.3.self_attn.q.weight", "blocks.3"),
        ("vace_blocks.0.after_proj.bias", "vace_blocks.0"),
        ("audio_injector.injector.11.q.weight", "audio_injector.injector.11"),
        ("audio_injector.injector_adain_layers.2.linear.bias", "audio_injector.injector_adain_layers.2"),
        ("refextractor.blocks.6.ffn.0.weight", "refextractor.blocks.6"),
        ("refextractor.ref_blocks.7.weight", "refextractor.ref_blocks.7"),
        ("refextractor.time_projection.1.weight", "refextractor"),
        ("controlnet.blocks.0.modulation", "controlnet.blocks.0"),
        ("controlnet_zero.6.weight", "controlnet_zero.6"),
        ("uni3c_controlnet.controlnet_blocks.19.ffn.0.weight", "uni3c_controlnet.controlnet_blocks.19"),
        ("uni3c_controlnet.proj_out.3.bias", "uni3c_controlnet.proj_out.3"),
        ("uni3c_controlnet.proj_in.weight", "uni3c_controlnet"),
        ("motion_encoder.enc.net_app.convs.0.0.weight", "motion_encoder"),
        ("multitalk_audio_proj.proj1.weight", "multitalk_audio_proj"),
        ("text_embedding.0.weight", None),
        ("head.head.weight", None),
        ("audio_injector.other.weight", None),
        ("blocks.x.weight", None),
        ("blocks.01.weight", None),
        ("motion_encoder_of_another.weight", None),
        ("controlnet.other.0.weight", None),
    ],
)
def test_a_tensor_belongs_to_the_innermost_module_that_is_swapped(name: str, module: str | None) -> None:
    found = split(name)
    assert (None if found is None else found[0]) == module
    if module is not None:
        assert found == (module, name.removeprefix(f"{module}."))


def test_modules_run_in_the_order_of_the_wrappers_forward() -> None:
    names = [f"{group.path}.{i}" if group.is_list else group.path for group in GROUPS for i in (range(2))]
    assert in_order(reversed(list(dict.fromkeys(names)))) == [
        "casual_audio_encoder",
        "image_to_cond",
        "refextractor",
        "refextractor.blocks.0",
        "refextractor.blocks.1",
        "refextractor.ref_blocks.0",
        "refextractor.ref_blocks.1",
        "motion_encoder",
        "face_encoder",
        "multitalk_audio_proj",
        "vace_blocks.0",
        "vace_blocks.1",
        "uni3c_controlnet",
        "uni3c_controlnet.controlnet_blocks.0",
        "uni3c_controlnet.proj_out.0",
        "uni3c_controlnet.controlnet_blocks.1",
        "uni3c_controlnet.proj_out.1",
        "blocks.0",
        "audio_injector.injector_adain_layers.0",
        "audio_injector.injector.0",
        "blocks.1",
        "controlnet.blocks.0",
        "controlnet_zero.0",
        "controlnet.blocks.1",
        "controlnet_zero.1",
        "audio_injector.injector_adain_layers.1",
        "audio_injector.injector.1",
    ]


# ---- slots


def lanes_of(names: list[str]) -> list[int]:
    lanes = ["blocks", *dict.fromkeys(lane_of(name) for name in names if lane_of(name) != "blocks")]
    return [lanes.index(lane_of(name)) for name in names]


def s2v_stall(lanes: list[int] | None, ratio: float) -> float:
    """Stall in a forward of S2V as a share of it, if a block's copy takes `ratio` of its computation."""
    sizes = [
        {"blocks": BLOCK}.get(lane_of(n), INJECTOR if n.startswith("audio_injector.injector.") else ADAIN) for n in S2V
    ]
    compute = [1.0 if size == BLOCK else 0.03 for size in sizes]
    ring = Ring([True] * len(S2V), slots=2, lanes=lanes)
    time = VirtualTime(ring, compute=compute, transfer=[ratio * size / BLOCK for size in sizes])
    forward = steady_time(time, [range(len(S2V))])
    return forward.stall / forward.elapsed


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_small_modules_between_blocks_do_not_keep_the_blocks_copies_from_running_ahead(ratio: float) -> None:
    assert s2v_stall(lanes_of(S2V), ratio) < 0.001
    assert s2v_stall(None, ratio) > 0.02  # in the blocks' own slots they would


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.lists(st.integers(0, 11), max_size=40),
)
def test_a_block_is_in_a_slot_of_its_lane_when_it_runs(
    blocks: list[tuple[bool, int]], slots: int, order: list[int]
) -> None:
    swapped, lanes = [one for one, _ in blocks], [lane for _, lane in blocks]
    ring = Ring(swapped, slots=slots, lanes=lanes)
    lane_of_slot: dict[int, int] = {}
    in_use = None
    for block in order:
        step = ring.enter(block) if block < len(blocks) else ring.leave()
        assert step.released == in_use
        for onload in step.onloads:
            assert swapped[onload.block]
            assert lane_of_slot.setdefault(onload.slot, lanes[onload.block]) == lanes[onload.block]
            assert onload.slot != step.slot or onload.block == block
        in_use = step.slot
        if block < len(blocks) and swapped[block]:
            assert step.slot is not None
            assert ring.content[step.slot] == block
    assert len(ring.content) == min(slots, sum(s and not lane for s, lane in blocks)) + len(
        {lane for is_swapped, lane in blocks if is_swapped and lane}
    )


# ---- spreading by bytes


@given(st.integers(1, 60), st.data())
def test_equal_blocks_are_spread_as_by_number(count: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, count))
    assert spread_bytes([7] * count, share) == spread(count, share)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.data())
def test_a_share_of_the_bytes_is_swapped_to_within_one_block(sizes: list[int], data: st.DataObject) -> None:
    share = data.draw(st.integers(0, len(sizes)))
    mask = spread_bytes(sizes, share)
    passed = inside = 0
    for size, is_swapped in zip(sizes, mask, strict=True):  # everywhere along the model, not only at its end
        passed, inside = passed + size, inside + size * is_swapped
        assert 0 <= passed * share / len(sizes) - inside < max(sizes)
    assert all(mask) == (share == len(sizes))


def test_longvies_large_blocks_are_spread_as_thickly_as_the_others() -> None:
    """Its first twelve blocks are 1.5 times the others; by number, their part would be copied 1.5 times as fast."""
    sizes = [3] * 12 + [2] * 28
    mask = spread_bytes(sizes, 20)
    first = sum(size for size, is_swapped in zip(sizes[:12], mask, strict=False) if is_swapped) / sum(sizes[:12])
    rest = sum(size for size, is_swapped in zip(sizes[12:], mask[12:], strict=True) if is_swapped) / sum(sizes[12:])
    assert abs(first - rest) < 0.08


# ---- parts of a transformer


class Transformer(nn.Module):
    """The lists of the wrapper's, one of them beside the others."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, width)
        attach(self, width)


def test_each_tensor_of_a_group_is_in_one_part_and_the_others_in_none() -> None:
    transformer = Transformer()
    inside = [id(tensor) for part in parts_of(transformer) for tensor in part.weights.parameters()]
    assert len(inside) == len(set(inside))
    outside = {name for name, tensor in transformer.named_parameters() if id(tensor) not in inside}
    assert outside == {"head.weight", "head.bias"}
    for part in parts_of(transformer):
        for path, tensor in part.weights.named_parameters():
            assert transformer.get_parameter(f"{part.name}.{path}") is tensor


def test_a_list_may_have_holes() -> None:
    transformer = Transformer()
    transformer.controlnet.blocks[0] = None
    names = [part.name for part in parts_of(transformer)]
    assert "controlnet.blocks.1" in names
    assert "controlnet.blocks.0" not in names


def test_moves_of_what_is_beside_the_blocks_do_nothing_in_a_forward_and_count_again_after_it() -> None:
    transformer = Transformer()
    with moves_disabled(part.module for part in parts_of(transformer) if part.is_beside):
        transformer.refextractor.double()
        transformer.controlnet.blocks[0].double()
        assert transformer.refextractor.blocks[1].weight.dtype == torch.float32
        transformer.double()
        kinds = {name: one.dtype for name, one in transformer.named_parameters()}
        assert {name for name, kind in kinds.items() if kind == torch.float64} == {
            name for name in kinds if name.startswith(("blocks.", "head."))
        }
    transformer.double()
    assert all(one.dtype == torch.float64 for one in transformer.parameters())
    assert not any("_apply" in vars(module) for module in transformer.modules())


def test_a_copy_made_meanwhile_can_be_moved() -> None:
    transformer = Transformer()
    with moves_disabled(part.module for part in parts_of(transformer) if part.is_beside):
        copied, again = copy.deepcopy(transformer), copy.deepcopy(copy.deepcopy(transformer))
    assert all(one.dtype == torch.float64 for model in (copied, again) for one in model.double().parameters())
    assert all(one.dtype == torch.float32 for one in transformer.parameters())


def test_an_interrupt_at_any_line_of_the_start_leaves_moves_as_they_were() -> None:
    module = nn.Linear(2, 2)
    for line in itertools.count():
        lines = itertools.count()

        def trace(frame: FrameType, event: str, _: object, lines: Iterator[int] = lines, line: int = line) -> Any:
            if frame.f_code.co_filename != parts.__file__:
                return None
            if event == "line" and next(lines) == line:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with moves_disabled([module]):
                sys.settrace(before)
                break
        except KeyboardInterrupt:
            assert "_apply" not in vars(module)
        finally:
            sys.settrace(before)
    assert line > 5


def test_what_is_in_a_module_that_is_compiled_as_a_whole_stays_with_the_wrapper() -> None:
    transformer = Transformer()
    names = {part.name for part in parts_of(transformer)}
    transformer.refextractor = torch.compile(transformer.refextractor, backend="eager")
    left = {part.name for part in parts_of(transformer)}
    assert names - left == {name for name in names if name.startswith("refextractor")} != set()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_beside_the_blocks_is_hidden_while_the_wrapper_starts_a_run(is_compiled: bool) -> None:
    transformer = Transformer()
    outer: Any = torch.compile(transformer, backend="eager") if is_compiled else transformer
    every = dict(outer.named_parameters())
    with hidden(outer, parts_of(transformer)):
        seen = dict(outer.named_parameters())
    assert set(seen) == {name for name in every if name.removeprefix("_orig_mod.").startswith(("blocks.", "head."))}
    assert dict(outer.named_parameters()) == every
    assert "named_parameters" not in vars(outer)


# ---- bad input


def test_a_list_that_runs_in_no_fixed_place_gives_the_right_result() -> None:
    model = toy(6)
    model.groups = ["blocks", "audio_injector.injector", "blocks", "controlnet_zero", "blocks", "blocks"]
    x = torch.randn(3, 16)
    orders = [[1, 0, 2, 3, 4, 5], [0, 2, 4, 5, 3, 1, 3], [5, 1, 1, 0], [2], [0, 1, 2, 3, 4, 5]]
    with torch.no_grad(), Simulation().session(model, fixed_plan([True] * 6)) as session:
        for order in [*orders, *orders]:
            with session.forward():
                y = model(x, order)
            session_free = model(x, order)
            assert torch.equal(y, session_free)


@pytest.mark.parametrize("released", [True, False])
def test_a_control_model_that_two_transformers_share_gives_the_right_result_in_both(released: bool) -> None:
    shared, models = toy(1, seed=9).blocks[0], [toy(3, seed=seed) for seed in (1, 2)]
    for model in models:
        model.blocks.append(shared)
        model.groups = ["blocks"] * 3 + ["controlnet_zero"]
    x = torch.randn(3, 16)
    truth = [model(x) for model in models]
    bytes_before = shared.up.clone()
    simulation = Simulation()
    sessions = [simulation.session(model, fixed_plan([True] * 4)) for model in models]
    with torch.no_grad():
        for _ in range(3):
            for model, session, want in zip(models, sessions, truth, strict=True):
                for _ in range(2):
                    with session.forward():
                        assert torch.equal(model(x), want)
                if released:
                    session.release()
        for session in sessions:
            session.close()
    assert torch.equal(shared.up, bytes_before)
    assert simulation.registrar.locked == {}
    assert simulation.streams.allocated_bytes == 0


def test_which_modules_are_beside_the_blocks() -> None:
    names = ["blocks.0", "vace_blocks.1", "controlnet.blocks.0", "motion_encoder", "layer.3", "any"]
    assert [name for name in names if is_beside(name)] == ["controlnet.blocks.0", "motion_encoder"]
