"""A read-only server for people and for `einfall db pull`: Datasette with canned queries and the pages of `plugin.py`."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....ir.errors import DatabaseError
from .. import Database
from .canned import QUERIES

SETTINGS = {"max_returned_rows": 5000, "sql_time_limit_ms": 2000, "default_page_size": 50, "allow_signed_tokens": False}


def serve(places: Sequence[str | Path], *, host: str, port: int, on_start: Callable[[str], None]) -> int:
    """Serves the files until interrupted; `on_start` is told the address once it is listened to.

    Raises `DatabaseError` if a file cannot be read, the address cannot be had, or Datasette is not installed.
    """
    application = make_application(places)
    import uvicorn

    try:
        listener = socket.create_server((host, port), reuse_port=False)
    except (OSError, OverflowError) as error:
        raise DatabaseError(f"{host}:{port} cannot be listened at ({error})", hint="--port 0 takes a free one") from error
    with listener:
        on_start(f"http://{host}:{listener.getsockname()[1]}/")
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="on"))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return 0


def make_application(places: Sequence[str | Path]) -> Any:
    """The ASGI application that serves the files."""
    for place in places:
        Database.open(place, read_only=True).close()
    return make_datasette(places).app()


def make_datasette(places: Sequence[str | Path]) -> Any:
    """A Datasette of the files with our pages and queries. Raises `DatabaseError` if it is not installed."""
    if importlib.util.find_spec("datasette") is None:
        raise DatabaseError("serving needs Datasette, which is not installed", hint="pip install einfall[serve]")
    from datasette.app import Datasette
    from datasette.plugins import pm

    from . import plugin

    if not pm.is_registered(plugin):
        pm.register(plugin, "einfall")
    files = [str(Path(place).expanduser()) for place in places]
    return Datasette(files, settings=SETTINGS, template_dir=str(Path(__file__).parent), metadata=_metadata(files))


def _metadata(files: Sequence[str]) -> dict[str, Any]:
    about = {"title": "Tuned schedules", "description": "What was measured where, and which schedule won. Read-only."}
    named = {Path(file).stem: {**about, "queries": dict(QUERIES)} for file in files}
    return {**about, "databases": named}
