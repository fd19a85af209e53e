"""The node search of the front ends: who looks for help with too little VRAM finds the swap node first."""

from __future__ import annotations

import pytest

from .front_end import NODE, VERSIONS, FrontEnd, Variant

SEARCH = """query => {
    const { $pinia } = document.querySelector("#vue-app").__vue_app__.config.globalProperties;
    return $pinia._s.get("nodeDef").nodeSearchService.searchNode(query).map(node => node.name);
}"""
"""What the search box lists, best first."""

pytestmark = pytest.mark.parametrize("front_end", [Variant(v) for v in VERSIONS], indirect=True, ids=str)

OF_THE_WRAPPER = ("WanVideoBlockSwap", "WanVideoSetBlockSwap")

WORDS = (
    "vram",
    "low vram",
    "oom",
    "out of memory",
    "low memory",
    "wan low memory",
    "offload",
    "12 GB",
    "8 GB",
    "16 GB",
    "显存",
    "显存不足",
    "爆显存",
    "低显存",
    "内存",
    "块交换",
)


@pytest.mark.parametrize("query", [*WORDS, "12gb"])
def test_the_swap_node_is_found_first(ui: FrontEnd, query: str) -> None:
    assert ui.evaluate(SEARCH, query)[:1] == [NODE]


@pytest.mark.parametrize("query", ["block swap", "swap", "blockswap"])
def test_words_of_its_name_find_it_behind_the_wrappers_nodes_of_shorter_names_and_before_our_others(
    ui: FrontEnd, query: str
) -> None:
    found = ui.evaluate(SEARCH, query)
    assert [name for name in found if name not in OF_THE_WRAPPER][:1] == [NODE]
    assert found.index(NODE) <= len(OF_THE_WRAPPER)
    assert not {"WanVideoBlockSwapPlan", "WanVideoBlockSwapReport"} & set(found)  # the former names
