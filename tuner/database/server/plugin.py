"""The pages and addresses that are added to Datasette.

    /-/einfall                              winners, roofline by device, who measured what where
    /-/einfall/DATABASE/WORKLOAD            tuning curve, candidates, evidence and sources of one workload
    /-/einfall.json                         the tuning databases that are served
    /-/einfall/DATABASE/after/NUMBER        the next measurements as a segment, for `einfall db pull`
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar, cast

from datasette import hookimpl
from datasette.utils.asgi import NotFound, Response

from ....ir.errors import EinfallError
from .. import Database, segments
from ..figures import curves, machines, rooflines, winners
from ..why import why

NAME = r"(?P<database>[^/]+)"
F = TypeVar("F")
MAX_SHARED = 10_000  # measurements in one answer


def hook(function: F) -> F:
    """Marks a function as one that Datasette calls."""
    return cast(F, hookimpl(function))


@hook
def register_routes() -> list[tuple[str, Any]]:
    """The addresses."""
    return [
        (r"^/-/einfall\.json$", _names),
        (r"^/-/einfall$", _overview),
        (rf"^/-/einfall/{NAME}/after/(?P<number>\d{{1,18}})$", _segment),
        (rf"^/-/einfall/{NAME}/(?P<workload>[0-9a-f]{{32}})$", _workload),
    ]


@hook
def menu_links(datasette: Any) -> list[dict[str, str]]:
    """The way to the pages, in the menu of every page."""
    return [{"href": datasette.urls.path("/-/einfall"), "label": "Tuned schedules"}]


async def _names(datasette: Any) -> Any:
    return Response.json({"databases": list(_served(datasette))})


def _served(datasette: Any) -> dict[str, str]:
    """The files that are served, by name; Datasette keeps others of its own."""
    return {name: str(found.path) for name, found in datasette.databases.items() if found.path and name != "_internal"}


def _open(datasette: Any, name: str) -> Database:
    served = _served(datasette)
    if name not in served:
        raise NotFound(f"no tuning database {name}")
    return Database.open(served[name], read_only=True)


async def _segment(datasette: Any, request: Any) -> Any:
    """The next measurements, gzipped; an empty body when there are no more."""
    name, number = request.url_vars["database"], int(request.url_vars["number"])

    def work() -> tuple[bytes, dict[str, str]]:
        with _open(datasette, name) as opened:
            identity = str(opened.read("SELECT value FROM about WHERE name = 'identity'")[0][0])
            found = segments.pack(opened, number, MAX_SHARED)
            if found is None:
                return b"", {"x-einfall-identity": identity}
            return found.data, dict(segments.header(found, identity))

    data, headers = await asyncio.to_thread(_told, work)
    return Response(data, content_type="application/gzip", headers=headers)


async def _overview(datasette: Any, request: Any) -> Any:
    def work() -> list[dict[str, Any]]:
        shown = []
        for name in _served(datasette):
            with _open(datasette, name) as opened:
                found = winners(opened)
                shown.append({"name": name, "winners": found, "rooflines": rooflines(found), "machines": machines(opened)})
        return shown

    context = {"files": await asyncio.to_thread(_told, work)}
    return Response.html(await datasette.render_template("einfall_overview.html", context, request=request))


async def _workload(datasette: Any, request: Any) -> Any:
    name, workload = request.url_vars["database"], request.url_vars["workload"]

    def work() -> dict[str, Any]:
        with _open(datasette, name) as opened:
            choices = [each.to_dict() for each in why(opened, workload)]
            return {"database": name, "workload": opened.show(workload), "choices": choices, "curves": curves(opened, workload)}

    context = await asyncio.to_thread(_told, work)
    return Response.html(await datasette.render_template("einfall_workload.html", context, request=request))


def _told(work: Any) -> Any:
    """What `work` gives; an error of the file is a page that says so."""
    try:
        return work()
    except EinfallError as error:
        raise NotFound(str(error)) from error
