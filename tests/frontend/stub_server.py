"""A server with those addresses of ComfyUI that the front end uses, and a websocket that tests send events through."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import WSCloseCode, web

from . import answers

TEXT = 3
"""The number of a binary message that holds a node's progress text."""


class StubServer:
    """One front end at one address; a context manager.

    Args:
        static: The front end's files.
        settings: What the user has chosen; kept up to date as the front end changes it.
    """

    def __init__(self, static: Path, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.user_files: dict[str, bytes] = {"user.css": b"", "comfy.templates.json": b"[]"}
        self.failed: list[str] = []
        """Addresses that were asked for and are none, or broke."""
        self._static = static
        self._sockets: set[web.WebSocketResponse] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stub-server", daemon=True)
        self._runner: web.AppRunner | None = None
        self.address = ""

    def __enter__(self) -> StubServer:
        self._thread.start()
        self.address = self._wait(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def send(self, event: str, detail: object) -> None:
        """Sends a JSON event to every page, as PromptServer.send_sync does."""
        self._wait(self._send_all(json.dumps({"type": event, "data": detail})))

    def send_text(self, node: str, text: str) -> None:
        """Sends a node's progress text to every page, as PromptServer.send_progress_text does."""
        name = node.encode()
        self._wait(self._send_all(struct.pack(">II", TEXT, len(name)) + name + text.encode()))

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _start(self) -> str:
        app = web.Application(client_max_size=16 << 20)
        app.on_response_prepare.append(self._on_prepare)
        app.add_routes([*self._routes("/api"), *self._routes("")])
        app.add_routes(
            [
                web.get("/", self._index),
                web.get("/user.css", self._style),
                web.static(f"/extensions/{answers.FOLDER}", answers.WEB),
                web.static(f"/api/workflow_templates/{answers.FOLDER}", answers.EXAMPLES),
                web.static("/", self._static),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        for socket in list(self._sockets):
            await socket.close(code=WSCloseCode.GOING_AWAY)
        assert self._runner is not None
        await self._runner.cleanup()

    async def _send_all(self, message: str | bytes) -> None:
        for socket in list(self._sockets):
            with suppress(ConnectionError):
                await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))

    async def _on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.setdefault("Cache-Control", "no-store")
        if response.status >= HTTPStatus.BAD_REQUEST:
            self.failed.append(request.path)

    def _routes(self, path: str) -> list[web.RouteDef]:
        constant: dict[str, Any] = {
            "features": answers.FEATURES,
            "system_stats": answers.SYSTEM_STATS,
            "users": {"storage": "server", "migrated": True},
            "userdata": [],
            "global_subgraphs": {},
            "node_replacements": {},
            "embeddings": [],
            "models": sorted(answers.model_folders()),
            "experiment/models": [{"name": name, "folders": []} for name in answers.model_folders()],
            "queue": {"queue_running": [], "queue_pending": []},
            "prompt": {"exec_info": {"queue_remaining": 0}},
            "history": {},
            "jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
        }
        live = {
            "internal/folder_paths": lambda: {name: [f"models/{name}"] for name in answers.model_folders()},
            "i18n": answers.translations,
            "object_info": answers.object_info,
            "extensions": self._extensions,
            "workflow_templates": lambda: {answers.FOLDER: [file.stem for file in answers.EXAMPLES.glob("*.json")]},
        }
        routes = [web.get(f"{path}/{name}", _constant(value)) for name, value in constant.items()]
        routes += [web.get(f"{path}/{name}", _asked(function)) for name, function in live.items()]
        return [
            *routes,
            web.get(
                "/internal/folder_paths", _asked(lambda: {name: [f"models/{name}"] for name in answers.model_folders()})
            ),
            web.get(f"{path}/ws", self._websocket),
            web.get(f"{path}/view", self._view),
            web.get(f"{path}/models/{{folder}}", self._models),
            web.get(f"{path}/experiment/models/{{folder}}", self._models),
            web.get(f"{path}/settings", self._all_settings),
            web.post(f"{path}/settings", self._set_settings),
            web.get(f"{path}/settings/{{id}}", self._setting),
            web.post(f"{path}/settings/{{id}}", self._set_setting),
            web.get(f"{path}/userdata/{{file}}", self._user_file),
            web.post(f"{path}/userdata/{{file}}", self._save_user_file),
        ]

    def _extensions(self) -> list[str]:
        of_front_end = [
            f"/{file.relative_to(self._static).as_posix()}" for file in self._static.glob("extensions/**/*.js")
        ]
        ours = [file.relative_to(answers.WEB).as_posix() for file in answers.WEB.glob("**/*.js")]
        return of_front_end + [f"/extensions/{quote(answers.FOLDER)}/{file}" for file in ours]

    async def _index(self, _: web.Request) -> web.FileResponse:
        return web.FileResponse(self._static / "index.html")

    async def _style(self, _: web.Request) -> web.Response:
        return web.Response(content_type="text/css")

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        status = {"exec_info": {"queue_remaining": 0}}
        await socket.send_json(
            {"type": "status", "data": {"status": status, "sid": request.query.get("clientId", "1")}}
        )
        self._sockets.add(socket)
        try:
            async for message in socket:
                if json.loads(message.data).get("type") == "feature_flags":
                    await socket.send_json({"type": "feature_flags", "data": answers.FEATURES})
        finally:
            self._sockets.discard(socket)
        return socket

    async def _view(self, _: web.Request) -> web.Response:
        return web.Response(body=answers.grey_image(), content_type="image/png")

    async def _models(self, request: web.Request) -> web.Response:
        names = answers.model_folders().get(request.match_info["folder"], [])
        if "experiment" in request.path:
            return web.json_response([{"name": name, "pathIndex": 0} for name in names])
        return web.json_response(names)

    async def _all_settings(self, _: web.Request) -> web.Response:
        return web.json_response(self.settings)

    async def _setting(self, request: web.Request) -> web.Response:
        return web.json_response(self.settings.get(request.match_info["id"]))

    async def _set_settings(self, request: web.Request) -> web.Response:
        self.settings.update(await request.json())
        return web.Response()

    async def _set_setting(self, request: web.Request) -> web.Response:
        self.settings[request.match_info["id"]] = await request.json()
        return web.Response()

    async def _user_file(self, request: web.Request) -> web.Response:
        file = self.user_files.get(request.match_info["file"])
        if file is None:
            raise web.HTTPNotFound
        return web.Response(body=file)

    async def _save_user_file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        self.user_files[name] = await request.read()
        return web.json_response({"path": name, "size": len(self.user_files[name]), "modified": 0, "created": 0})


def _constant(value: object) -> Any:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(value)

    return answer


def _asked(function: Any) -> Any:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(function())

    return answer
