"""What the profile reads from a block's tensors: bytes, placements, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from odd_tensors import Doubled as DoubledTensor
from odd_tensors import Opaque, PackedParameter, Scaled, scaled
from torch import nn
from torch.nn.utils import parametrize
from toys import toy
from wanvideo_enhanced_blockswap.blockswap.errors import UnsupportedModelError
from wanvideo_enhanced_blockswap.blockswap.model.layout import (
    SMALL_TENSOR_BYTES,
    BlockProfile,
    Placement,
    TensorProfile,
    device_bytes,
)
from wanvideo_enhanced_blockswap.blockswap.model.profile import ProfiledModel, profile_model


def holding(parameters: dict[str, torch.Tensor] | None = None, **buffers: torch.Tensor) -> nn.Module:
    """A module with these parameters and buffers."""
    module = nn.Module()
    for name, tensor in (parameters or {}).items():
        module.register_parameter(
            name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor)
    return module


def read(*modules: nn.Module, root: nn.Module | None = None) -> ProfiledModel:
    return profile_model([(f"blocks.{i}", module) for i, module in enumerate(modules)], root=root)


def tensors(block: BlockProfile) -> dict[str, TensorProfile]:
    return {tensor.name: tensor for tensor in block.tensors}


def only(tensor: torch.Tensor) -> TensorProfile:
    """The profile of a tensor that is a block's only parameter."""
    return read(holding({"w": tensor})).profile.blocks[0].tensors[0]


def reinterpreted(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(32, 32, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize(
    ("tensor", "nbytes"),
    [
        (torch.zeros(32, 32), 4096),
        (torch.zeros(32, 32).T, 4096),
        (torch.zeros(32, 64)[:, ::2], (31 * 64 + 31 * 2 + 1) * 4),
        (torch.zeros(32, 64)[:, 32:], (31 * 64 + 32) * 4),
        (torch.zeros(32, 1).expand(32, 32), 32 * 4),
        (torch.zeros(1).expand(32, 32), 4),
        (torch.zeros(32, 32, dtype=torch.bfloat16), 2048),
        (reinterpreted(torch.float8_e4m3fn), 1024),
        (reinterpreted(torch.float8_e5m2), 1024),
        (reinterpreted(torch.int8), 1024),
        (reinterpreted(torch.bool), 1024),
        (torch.zeros(32, 32, dtype=torch.complex64), 8192),
        (torch.zeros(0, 32), 0),
        (torch.tensor(1.5), 4),
    ],
    ids=lambda value: f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, torch.Tensor) else None,
)
def test_bytes_are_the_span_of_the_strides_as_stored(tensor: torch.Tensor, nbytes: int) -> None:
    assert only(tensor).nbytes == nbytes


def test_reading_changes_nothing() -> None:
    module = holding({"w": torch.randn(64, 64)}, _step=torch.zeros(1))
    before = [(t, t.data_ptr(), t._version) for t in (module.w, module._step)]
    read(module, root=module)
    assert [(t, t.data_ptr(), t._version) for t in (module.w, module._step)] == before


def test_a_tensor_under_the_cut_off_stays_on_the_device_and_one_at_it_streams() -> None:
    sizes = {"big": 6201, "at": 100, "under": 99}
    block = read(holding({name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}))
    placed = {name: tensor.placement for name, tensor in tensors(block.profile.blocks[0]).items()}
    assert placed == {"big": Placement.STREAMED, "at": Placement.STREAMED, "under": Placement.SMALL}


def test_a_large_matrix_streams_however_much_larger_its_block_is() -> None:
    large = torch.empty(64 * SMALL_TENSOR_BYTES, dtype=torch.uint8)
    block = read(holding({"large": large, "w": torch.empty(SMALL_TENSOR_BYTES, dtype=torch.uint8)}))
    assert tensors(block.profile.blocks[0])["w"].placement is Placement.STREAMED


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("lora_diff_0_0", Placement.STREAMED),
        ("LoRA_up", Placement.STREAMED),
        ("freqs", Placement.SMALL),
        ("_step", Placement.SMALL),
        ("block_id", Placement.HOST),
    ],
)
def test_a_large_buffer_streams_only_if_it_is_a_lora_delta(name: str, placement: Placement) -> None:
    block = read(holding({"w": torch.zeros(64, 64)}, **{name: torch.zeros(64, 64)}))
    assert tensors(block.profile.blocks[0])[name].placement is placement


def test_block_id_takes_no_device_memory() -> None:
    block = holding({"w": torch.zeros(64, 64)}, block_id=torch.tensor(3))
    assert read(block).profile.small_device_bytes == 0


def test_the_same_parameter_in_two_places_of_a_block_is_counted_once_and_stays() -> None:
    weight = nn.Parameter(torch.zeros(32, 32), requires_grad=False)
    one, other = tensors(read(holding({"a": weight, "b": weight})).profile.blocks[0]).values()
    assert {one.placement, other.placement} == {Placement.SMALL}
    assert one.nbytes + other.nbytes == weight.nbytes


def test_the_same_parameter_in_two_blocks_is_counted_once_and_stays() -> None:
    weight = nn.Parameter(torch.zeros(32, 32), requires_grad=False)
    profile = read(holding({"w": weight}), holding({"w": weight})).profile
    assert {block.tensors[0].placement for block in profile.blocks} == {Placement.SMALL}
    assert profile.block_bytes == weight.nbytes


@pytest.mark.parametrize(
    ("cut", "together"),
    [
        (lambda base: (base[:600], base[400:]), True),
        (lambda base: (base[:500], base[500:]), False),
        (lambda base: (base.view(10, 100)[:, :50], base.view(10, 100)[:, 50:]), True),
        (lambda base: (base, base[100:200]), True),
        (lambda base: (base, base), True),
    ],
    ids=["overlapping", "side by side", "interleaved", "inside", "all"],
)
def test_only_tensors_whose_bytes_overlap_stay_together(cut: object, together: bool) -> None:
    base = torch.zeros(1000)
    one, other = cut(base)
    block = read(holding({"one": one}), holding({"other": other})).profile
    stays = {tensor.placement is Placement.SMALL for b in block.blocks for tensor in b.tensors}
    assert stays == {together}
    assert block.block_bytes == (base.nbytes if together else one.nbytes + other.nbytes)


def test_three_tensors_in_a_chain_of_overlaps_take_their_union() -> None:
    base = torch.zeros(1000)
    profile = read(holding({"a": base[:400], "b": base[300:700], "c": base[600:]})).profile
    assert profile.block_bytes == base.nbytes


def test_overlapping_tensors_that_no_whole_element_parts_are_refused_by_name() -> None:
    base = torch.zeros(4096, dtype=torch.uint8)
    wide, narrow = base[4:].view(torch.float32), base[2:4082].view(torch.int16)
    with pytest.raises(
        UnsupportedModelError,
        match=r"wide \(torch.float32\) .* narrow but starts 2 bytes after it.*; clone one",
    ):
        read(holding({"narrow": narrow, "wide": wide}))


def test_the_tensors_in_a_wrapper_subclass_are_placed_like_any_other() -> None:
    profile = read(holding({"w": scaled(32, 32), "d": nn.Parameter(DoubledTensor(scaled(32, 32).data), False)})).profile
    found = {name: (tensor.nbytes, tensor.placement) for name, tensor in tensors(profile.blocks[0]).items()}
    large, small = (1024, Placement.STREAMED), (4, Placement.SMALL)
    assert found == {"w.inner": large, "w.scale": small, "d.half.inner": large, "d.half.scale": small}


def test_the_tensors_in_a_wrapper_subclass_are_not_counted_outside_of_the_blocks() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([holding({"w": scaled(32, 32)})])
    model.register_parameter("head", scaled(8, 8))
    assert read(*model.blocks, root=model).profile.other_bytes == 64 + 4


def test_two_wrapper_subclasses_around_the_same_tensor_keep_it_on_the_device() -> None:
    weight = scaled(32, 32)
    block = read(holding({"a": weight, "b": nn.Parameter(weight.data, requires_grad=False)})).profile.blocks[0]
    assert {tensor.placement for tensor in block.tensors} == {Placement.SMALL}
    assert block.nbytes == 1024 + 4


def test_a_wrapper_subclass_that_cannot_be_taken_apart_stays_and_says_why() -> None:
    found = only(scaled(32, 32, kind=Opaque))
    assert (found.placement, found.reason) == (Placement.FIXED, "Opaque cannot be taken apart")


def test_a_wrapper_subclass_around_a_tensor_that_cannot_be_copied_as_bytes_stays() -> None:
    weight = scaled(32, 32)
    weight.scale = torch.eye(4).to_sparse()
    assert only(weight).placement is Placement.FIXED


def test_a_subclass_that_has_bytes_of_its_own_beside_its_tensors_stays() -> None:
    class Both(Scaled):
        @staticmethod
        def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Both:
            return torch.Tensor._make_subclass(cls, data.float())

        @classmethod
        def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
            return Both(args[0].inner, args[0].scale)

    weight = Both(torch.zeros(32, 32, dtype=torch.int8), torch.ones(1))
    assert only(nn.Parameter(weight, requires_grad=False)).placement is Placement.FIXED


def test_a_buffer_of_a_wrapper_subclass_stays() -> None:
    block = read(holding({"w": torch.zeros(64, 64)}, lora=scaled(32, 32).data)).profile.blocks[0]
    assert tensors(block)["lora"].placement is Placement.FIXED


@pytest.mark.parametrize(
    ("tensor", "kind", "cure"),
    [
        (lambda: torch.eye(32).to_sparse(), "stored as torch.sparse_coo", "to_dense()"),
        (lambda: torch.eye(32).to_sparse_csr(), "stored as torch.sparse_csr", "to_dense()"),
        (lambda: torch.randn(32, 32, dtype=torch.complex64).conj(), "a conjugate view", "resolve_conj()"),
        (lambda: torch.randn(32, 32, dtype=torch.complex64).conj().imag, "a negative view", "resolve_neg()"),
        (lambda: torch.quantize_per_tensor(torch.eye(32), 0.1, 0, torch.qint8), "quantized", "dequantize()"),
    ],
    ids=["sparse", "CSR", "conjugate", "negative", "quantized"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning", "ignore:.*quantize.*:DeprecationWarning")
def test_a_tensor_whose_bytes_are_not_its_elements_in_order_is_refused(tensor: object, kind: str, cure: str) -> None:
    block = holding({"w": torch.zeros(64, 64), "odd": tensor()})
    with pytest.raises(UnsupportedModelError) as refused:
        read(block)
    assert str(refused.value).startswith(f"blocks.0.odd is {kind}")
    assert cure in str(refused.value)


def test_a_sparse_tensor_outside_of_the_blocks_is_no_trouble() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([holding({"w": torch.zeros(64, 64)})])
    model.register_buffer("mask", torch.eye(8).to_sparse())
    assert read(*model.blocks, root=model).profile.other_bytes == 8 * 8 * 4


def test_the_bytes_of_a_wrapper_subclass_are_what_its_parts_take_when_they_are_allocated() -> None:
    weight = scaled(32, 32, kind=Opaque)
    assert (weight.inner.nbytes, weight.scale.nbytes) == (1024, 4)
    assert only(weight).nbytes == 1024 + 512


def test_packed_bytes_under_a_torch_function_subclass_stream_as_they_are_stored() -> None:
    found = only(PackedParameter(torch.zeros(32, 32, dtype=torch.uint8)))
    assert (found.placement, found.nbytes) == (Placement.STREAMED, 1024)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_what_a_parametrized_weight_is_computed_from_stays() -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    parametrize.register_parametrization(block[0], "weight", Doubled())
    placed = tensors(read(block).profile.blocks[0])
    assert placed["0.parametrizations.weight.original"].placement is Placement.SMALL
    assert placed["1.weight"].placement is Placement.STREAMED


def test_what_weight_norm_computes_from_stays() -> None:
    block = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    assert {t.placement for t in read(block).profile.blocks[0].tensors} == {Placement.SMALL}


def test_uninitialised_and_meta_tensors_are_refused_with_block_and_tensor() -> None:
    lazy, meta = nn.Sequential(nn.LazyLinear(4)), nn.Sequential(nn.Linear(4, 4, device="meta"))
    for broken in (lazy, meta):
        with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.0\.weight.*load the weights before"):
            read(nn.Linear(4, 4), broken)


def test_a_meta_buffer_is_refused_too() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.lora"):
        read(holding({"w": torch.zeros(4)}, lora=torch.zeros(4, device="meta")))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        read()


def test_compiled_blocks_read_as_the_blocks_inside() -> None:
    model = toy(2)
    compiled = [torch.compile(block, backend="eager") for block in model.blocks]
    assert read(*compiled).profile == read(*model.blocks).profile


def test_a_compiled_layer_inside_a_block_leaves_no_mark_in_the_names() -> None:
    block = nn.Sequential(nn.Linear(64, 64))
    plain = [tensor.name for tensor in read(block).profile.blocks[0].tensors]
    block[0] = torch.compile(block[0], backend="eager")
    assert [tensor.name for tensor in read(block).profile.blocks[0].tensors] == plain


def test_bytes_outside_the_blocks_are_counted_without_those_inside() -> None:
    model = toy(3)
    model.head = nn.Linear(8, 8, bias=False)
    model.register_buffer("freqs", torch.zeros(5))
    assert read(*model.blocks, root=model).profile.other_bytes == 8 * 8 * 4 + 20


def test_empty_and_missing_tensors_are_no_trouble() -> None:
    block = holding({"w": torch.zeros(64, 64), "empty": torch.zeros(0, 7)})
    block.register_parameter("bias", None)
    assert set(tensors(read(block).profile.blocks[0])) == {"w", "empty"}


def test_small_tensors_are_priced_as_one_allocation_and_the_immovable_one_by_one() -> None:
    one = holding({"w": torch.zeros(64, 64), "a": torch.zeros(3), "s": scaled(4, 4, kind=Opaque)})
    profile = read(one).profile
    assert profile.small_device_bytes == device_bytes(12) + 2 * device_bytes(4)
