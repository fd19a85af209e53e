"""The stand-in behaves like the wrapper, defects included, and has the names that a gate looks for."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import standin
import torch
from standin import swap_args
from standin.patcher import ModelPatcher, WanVideoModel
from test_standin import ALL, loaded, measured, unswapped

pytestmark = pytest.mark.usefixtures("pretend_stats")


@pytest.mark.parametrize(("variant", "count", "prefetch"), [("fp32", 2, 0), ("fp8_scaled", 3, 1)])
def test_unpatched_models_swap_one_block_less_and_never_prefetch(variant: str, count: int, prefetch: int) -> None:
    workflow = loaded(variant, swap_args(3, prefetch_blocks=1))
    workflow.sample()
    assert (workflow.transformer.blocks_to_swap, workflow.transformer.prefetch_blocks) == (count, prefetch)


def test_with_the_arguments_gone_and_the_loader_cached_the_old_count_stays() -> None:
    workflow = loaded("fp32")
    workflow.sample(ALL)
    with measured() as cost:
        latents = workflow.sample()
    assert workflow.transformer.blocks_to_swap == 3
    assert cost.peak >= unswapped("fp32").peak * 0.9
    assert cost.d2h_bytes > unswapped("fp32").d2h_bytes
    assert torch.equal(latents, unswapped("fp32").latents)
    workflow.load()
    workflow.sample()
    assert workflow.transformer.blocks_to_swap == -1


def test_changed_arguments_take_effect_with_the_loader_cached() -> None:
    workflow = loaded("fp8_scaled", swap_args(1))
    for args, count in ((None, 1), (swap_args(3), 3), (None, 1)):
        assert torch.equal(workflow.sample(args), unswapped("fp8_scaled").latents)
        assert workflow.transformer.blocks_to_swap == count


def test_no_vace_block_becomes_one_and_a_missing_count_raises() -> None:
    workflow = loaded("vace", swap_args(3))
    workflow.sample()
    assert workflow.transformer.vace_blocks_to_swap == 1
    with pytest.raises(TypeError):
        workflow.sample({key: value for key, value in ALL.items() if key != "vace_blocks_to_swap"})


def test_vace_blocks_run_past_their_hooks_and_hints_go_to_the_host() -> None:
    workflow, seen = loaded("vace", ALL), []
    for block in workflow.transformer.vace_blocks:
        block.register_forward_pre_hook(lambda *_: seen.append("block"))
        block.after_proj.register_forward_hook(lambda *_: seen.append("after"))
    block = workflow.transformer.blocks[0]
    block.register_forward_pre_hook(
        lambda _, args, kw: seen.append(kw["vace_hints"][0][1].device.type), with_kwargs=True
    )
    workflow.sample(cfg=1.0, steps=1)
    assert seen == ["after", "after", "cpu"]


@pytest.mark.parametrize("variant", ["compiled", "vace_compiled", "compiled_lora_scheduled"])
def test_blocks_are_wrapped_anew_at_every_run(variant: str) -> None:
    workflow, seen = loaded(variant), []
    for _ in range(2):
        workflow.sample()
        seen.append(list(workflow.transformer.blocks))
    assert all(hasattr(block, "_orig_mod") for run in seen for block in run)
    assert not {id(block) for block in seen[0]} & {id(block) for block in seen[1]}
    assert [id(block._orig_mod) for block in seen[0]] == [id(block._orig_mod) for block in seen[1]]


@pytest.mark.parametrize("variant", ["fp32", "forcing", "lynx"])
def test_which_forwards_get_options(variant: str) -> None:
    workflow, seen = loaded(variant), []
    options = workflow.patchers[0].model_options["transformer_options"]
    workflow.transformer.register_forward_pre_hook(
        lambda _, args, keywords: seen.append(keywords.get("transformer_options")), with_kwargs=True
    )
    workflow.sample()
    without = {"fp32": 0, "forcing": 6, "lynx": 2}[variant]
    assert [one is None for one in seen] == [True] * without + [False] * (len(seen) - without)
    assert not any(one is options for one in seen)


def test_a_clone_shares_the_transformer_and_makes_plain_dicts_of_its_options() -> None:
    class Ours(dict):
        pass

    patcher = ModelPatcher(WanVideoModel(torch.nn.Linear(1, 1)))
    patcher.model_options["transformer_options"]["block_swap_args"] = Ours(blocks_to_swap=1)
    clone = patcher.clone()
    assert clone.model is patcher.model
    assert type(clone.model_options["transformer_options"]["block_swap_args"]) is dict


@pytest.mark.parametrize("variant", ["multitalk", "animate_loop"])
@pytest.mark.parametrize("offloads", [True, False])
def test_between_clips_the_transformer_leaves_the_device_if_asked(variant: str, offloads: bool) -> None:
    assert standin.VARIANTS[variant].request.offload_between
    workflow = loaded(variant)
    with measured() as cost:
        latents = workflow.sample(offload_between=offloads)
    assert torch.equal(latents, unswapped(variant).latents)
    blocks = sum(parameter.nbytes for parameter in workflow.transformer.blocks.parameters())
    assert (cost.d2h_bytes > 2 * blocks) is offloads


@pytest.mark.parametrize("variant", ["fp32", "lora_merged"])
def test_vram_management_is_refused_beside_swap_arguments_and_needs_weights_that_are_there(variant: str) -> None:
    managed = replace(standin.VARIANTS[variant], has_vram_management=True)
    with pytest.raises(AssertionError, match="Can't use both block_swap_args and vram_management_args"):
        loaded(managed, ALL)
    if variant != "lora_merged":  # on meta until the first run
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            loaded(managed)
        return
    truth, workflow = unswapped(variant), loaded(managed)
    with measured() as cost:
        assert torch.equal(workflow.sample(), truth.latents)
    assert workflow.transformer.vram_management_enabled
    assert cost.peak < truth.peak / 2


# --------------------------------------------------------------------------------------------------- what is looked for


def test_names_and_sources_that_a_gate_looks_for() -> None:
    loader, sampler = (
        sys.modules[standin.NODE_CLASS_MAPPINGS[name].__module__] for name in ("WanVideoModelLoader", "WanVideoSampler")
    )
    named = {
        name: list(inspect.signature(function).parameters)
        for name, function in {**vars(sampler), "forward": loader.WanModel.forward}.items()
        if name in ("load_weights", "init_blockswap", "offload_transformer", "forward")
    }
    assert named["load_weights"][0] == "transformer"
    assert "block_swap_args" in named["load_weights"]
    assert named["init_blockswap"] == ["transformer", "block_swap_args", "model"]
    assert named["offload_transformer"] == ["transformer", "remove_lora"]
    assert "transformer_options" in named["forward"]
    phrases = {
        loader.WanModel.forward: ("enumerate(self.blocks)", "self.blocks_to_swap > 0", "for _ in self.blocks"),
        loader.WanModel.forward_vace: ("before_proj", "block.forward(", "after_proj", "self.vace_blocks_to_swap > 0"),
    }
    assert all(phrase in inspect.getsource(method) for method, wanted in phrases.items() for phrase in wanted)
    model = loaded("fp32").transformer
    assert (model.blocks_to_swap, model.vace_blocks_to_swap, model.prefetch_blocks) == (-1, -1, 0)
    assert not hasattr(model, "vace_blocks")


def test_each_function_is_held_by_value_in_four_modules() -> None:
    inside = [module for name, module in sys.modules.items() if name.startswith("standin.")]
    for name in ("load_weights", "init_blockswap", "offload_transformer"):
        holders = {module.__name__ for module in inside if hasattr(module, name)}
        home = "nodes_model_loading" if name == "load_weights" else "utils"
        modules = (home, "nodes_sampler", "multitalk_loop", "skyreels")
        assert holders == {f"standin.{module}" for module in modules}
        assert len({getattr(sys.modules[holder], name) for holder in holders}) == 1


def test_it_needs_nothing_of_comfyui_nor_of_ours() -> None:
    known = {*sys.stdlib_module_names, "torch", "numpy"}
    for path in Path(standin.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= known
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in known
