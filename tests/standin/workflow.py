"""A user's workflow: loads once, samples as often as wanted, with swap arguments that may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import management as mm
from .checkpoints import Checkpoint, make_checkpoint, make_lora
from .controlnet import wan_controlnet
from .nodes_model_loading import WanVideoModelLoader, WanVideoSetBlockSwap, WanVideoSetLoRAs
from .nodes_sampler import WanVideoSampler
from .patcher import ModelPatcher
from .skyreels import WanVideoDiffusionForcingSampler
from .variants import VARIANTS, Variant

NODE_CLASS_MAPPINGS: dict[str, type] = {
    node.__name__: node
    for node in (
        WanVideoModelLoader,
        WanVideoSampler,
        WanVideoSetBlockSwap,
        WanVideoSetLoRAs,
        WanVideoDiffusionForcingSampler,
    )
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong: `error` is raised in block `block` from the `forward`th time (from 0) on that it runs, `times`
    times; None is for ever.

    It comes out of the block's last pre-hook; an InterruptProcessingException comes where the wrapper looks for one,
    before the block.
    """

    block: int
    forward: int = 0
    error: type[BaseException] = RuntimeError
    times: int | None = None


def swap_args(blocks_to_swap: int, **changes: Any) -> dict[str, Any]:
    """What the wrapper's own node gives as BLOCKSWAPARGS."""
    return {
        "blocks_to_swap": blocks_to_swap,
        "offload_img_emb": False,
        "offload_txt_emb": False,
        "use_non_blocking": False,
        "vace_blocks_to_swap": 0,
        "prefetch_blocks": 0,
        "block_swap_debug": False,
        **changes,
    }


class Workflow:
    """Nodes of one workflow on one device.

    Args:
        variant: One of VARIANTS, or its name.
        device: Where it computes.

    Attributes:
        patchers: What the loaders gave, one for each expert; empty before `load`.
        runs: Samplings so far, those that failed included.
    """

    def __init__(self, variant: str | Variant, *, device: torch.device | str) -> None:
        self.variant = VARIANTS[variant] if isinstance(variant, str) else variant
        self.device = torch.device(device)
        self.patchers: list[ModelPatcher] = []
        self.runs = 0

    @property
    def transformers(self) -> list[Any]:
        """Of each expert."""
        return [patcher.model.diffusion_model for patcher in self.patchers]

    @property
    def transformer(self) -> Any:
        """The first expert's."""
        return self.transformers[0]

    def load(self, block_swap_args: dict[str, Any] | None = None) -> None:
        """The loaders run: they are new, or one of their inputs has changed. The old transformers go before."""
        self.patchers.clear()
        with self._on_device():
            for expert in range(self.variant.experts):
                files = _files(self.variant, seed=expert)
                self.patchers.append(self._loaded(files, block_swap_args))

    def sample(
        self, block_swap_args: dict[str, Any] | None = None, *, fault: Fault | None = None, **request: Any
    ) -> torch.Tensor:
        """The latents of one run.

        Args:
            block_swap_args: Given through WanVideoSetBlockSwap; None: there is no such node, and the loader's hold.
            fault: What goes wrong in the first expert.
            request: Changes of the variant's request.
        """
        wanted = replace(self.variant.request, **request)
        latents = None
        try:
            with self._on_device():
                for expert, patcher in enumerate(self.patchers):
                    share = wanted.steps // len(self.patchers)
                    if len(self.patchers) > 1:
                        wanted = replace(wanted, start_step=expert * share, end_step=(expert + 1) * share)
                    node = NODE_CLASS_MAPPINGS[self.variant.sampler]()
                    model = self._with_nodes(patcher, block_swap_args)
                    with _failing(patcher.model.diffusion_model, fault if expert == 0 else None):
                        (latents,) = node.process(model, wanted, self.variant.force_offload, latents)
        finally:
            self.runs += 1
        assert latents is not None
        return latents

    def _loaded(self, files: Sequence[Checkpoint], block_swap_args: dict[str, Any] | None) -> ModelPatcher:
        variant = self.variant
        loras = self._loras() if variant.lora in ("merged", "unmerged") else None
        compiling = {"backend": "eager", "mode": None, "compile_transformer_blocks_only": variant.compiles == "blocks"}
        (patcher,) = WanVideoModelLoader().loadmodel(
            files[0],
            variant.precision,
            variant.load_device,
            variant.quantization,
            compile_args=None if variant.compiles is None else compiling,
            block_swap_args=block_swap_args,
            lora=loras,
            merge_loras=variant.lora == "merged",
            extra_model=files[1] if len(files) > 1 else None,
            vram_management_args={"offload_percent": 1.0} if variant.has_vram_management else None,
        )
        if variant.has_control_model:
            options = patcher.model_options["transformer_options"]
            options["controlnet"] = wan_controlnet.make(patcher.model.diffusion_model.in_dim)
        if variant.has_stand_in:
            _add_stand_in(patcher.model.diffusion_model)
        return patcher

    def _with_nodes(self, patcher: ModelPatcher, block_swap_args: dict[str, Any] | None) -> ModelPatcher:
        lora = self.variant.lora
        if lora == "set" or (lora == "set_at_times" and self.runs % 2 == 1):
            (patcher,) = WanVideoSetLoRAs().setlora(patcher, self._loras())
        (patcher,) = WanVideoSetBlockSwap().loadmodel(patcher, block_swap_args)
        return patcher

    def _loras(self) -> list[dict[str, Any]]:
        strength, variant = self.variant.lora_strength, self.variant
        strengths = list(strength) if isinstance(strength, tuple) else strength
        made = {"rank": variant.lora_rank, "vace": variant.contents.vace}
        return [make_lora(strengths, seed=seed, **made) for seed in variant.lora_seeds]

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """ComfyUI runs every node in inference mode."""
        before, mm.machine.device = mm.machine.device, self.device
        limits = contextlib.nullcontext()
        if self.variant.compiles is not None:
            limits = torch._dynamo.config.patch(recompile_limit=128)
        try:
            with torch.inference_mode(), limits:
                yield
        finally:
            mm.machine.device = before


def run(
    variant: str | Variant,
    *,
    device: torch.device | str,
    swap_args: dict[str, Any] | None = None,
    runs: int = 1,
) -> tuple[torch.Tensor, ...]:
    """The latents of each run of a workflow that loads once, with `swap_args` connected to the loader."""
    workflow = Workflow(variant, device=device)
    workflow.load(swap_args)
    return tuple(workflow.sample() for _ in range(runs))


def _add_stand_in(transformer: Any) -> None:
    generator = torch.Generator().manual_seed(17)
    for block in transformer.blocks:
        rows, columns = block.self_attn.q.weight.shape
        layer = block.self_attn.q_loras = nn.Linear(columns, rows, bias=False, device=mm.get_torch_device())
        layer.requires_grad_(False)
        layer.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.1)


def _files(variant: Variant, *, seed: int) -> Sequence[Checkpoint]:
    contents = replace(variant.contents, seed=seed)
    if variant.vace_in_module:
        return [make_checkpoint(contents, part=part) for part in ("base", "module")]
    return [make_checkpoint(contents)]


@contextlib.contextmanager
def _failing(transformer: Any, fault: Fault | None) -> Iterator[None]:
    if fault is None:
        yield
        return
    if issubclass(fault.error, mm.InterruptProcessingException):
        mm.interrupt_after(fault.forward * len(transformer.blocks) + fault.block)
        try:
            yield
        finally:
            mm.interrupt_after(None)
        return
    left = fault.forward
    handles: list[RemovableHandle] = []

    def fail(block: object, arguments: object) -> None:
        nonlocal left
        left -= 1
        if left < 0 and (fault.times is None or -left <= fault.times):
            raise fault.error(f"block {fault.block} fails")

    def watch(model: Any, arguments: object) -> None:
        """The block as it is now: compiling has wrapped it since the run started."""
        while len(handles) > 1:
            handles.pop().remove()
        handles.append(model.blocks[fault.block].register_forward_pre_hook(fail))

    handles.append(transformer.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
