"""Progress on the node: what is sent to the browser, how often, and what a server that fails costs."""

from __future__ import annotations

import pytest
from shown import ran
from wanvideo_enhanced_blockswap.blockswap.run.progress import Phase, Progress
from wanvideo_enhanced_blockswap.node_progress import EVENT, NodeProgress


class Server:
    """Keeps the events sent, and is the clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events: list[tuple[str, dict[str, object]]] = []
        self.texts: list[tuple[str, str]] = []
        self.progress = NodeProgress("7:12", self.send_event, self.send_text, clock=lambda: self.now)

    def send_event(self, name: str, data: dict[str, object]) -> None:
        self.events.append((name, data))

    def send_text(self, text: str, node: str) -> None:
        self.texts.append((text, node))


def forwards(count: int) -> Progress:
    return Progress(phase=Phase.SAMPLING, run=ran(count, 0))


def test_an_event_for_the_bar_and_a_text_for_everybody_else_name_the_node() -> None:
    server = Server()
    server.progress(Progress(phase=Phase.OFF, why="no card"))
    assert server.events == [
        (EVENT, {"node": "7:12", "workflow": None, "model": "", **Progress(phase=Phase.OFF, why="no card").as_json()})
    ]
    assert server.texts == [("no card", "7:12")]


def test_one_phase_is_told_at_most_ten_times_a_second() -> None:
    server = Server()
    for count in range(96):
        server.progress(forwards(count))
        server.now += 1 / 32
    assert len(server.events) == len(server.texts) == 24


def test_another_phase_is_told_at_once() -> None:
    server = Server()
    for phase in (Phase.ADOPTING, Phase.SAMPLING, Phase.ADOPTING, Phase.SAMPLING, Phase.DONE):
        server.progress(Progress(phase=phase))
    assert [data["phase"] for _, data in server.events] == ["adopting", "sampling", "adopting", "sampling", "done"]


def test_a_server_that_fails_is_said_once_and_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def fail(name: str, data: dict[str, object]) -> None:
        asked.append(name)
        raise RuntimeError("Event loop is closed")

    progress = NodeProgress("1", fail, lambda text, node: None, clock=lambda: 0.0)
    for phase in (Phase.ADOPTING, Phase.SAMPLING, Phase.DONE):
        progress(Progress(phase=phase))
    assert len(asked) == 1
    (record,) = caplog.records
    assert "progress is not shown on the node any more" in record.message
    assert "Event loop is closed" in caplog.text
