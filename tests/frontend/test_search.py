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
def test_words_of_a_class_name_rank_by_its_length_so_that_the_swap_node_is_among_the_first(
    ui: FrontEnd, query: str
) -> None:
    assert NODE in ui.evaluate(SEARCH, query)[:4]
