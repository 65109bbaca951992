"""Sharing with a server: `einfall db serve` hands out what came after a number, as segments; a pull goes on from where it ended."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from ...ir.errors import DatabaseError
from . import Database
from .merge import Taken
from .records import Invalid
from .segments import MAX_BYTES, Advance, Shared, import_segments, take

SECONDS = 30.0
_HASH, _NUMBER, _IDENTITY = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9]{1,18}"), re.compile(r"[0-9a-f]{32}")


def pull(database: Database, url: str, on_segment: Advance = lambda name: None) -> Shared:
    """Adds what the server or the store of segments at `url` has and this file has not.

    Raises `DatabaseError` if it cannot be reached or sends what is no segment; what came before is kept.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return import_segments(database, url, on_segment)
    server = f"{parts.scheme}://{parts.netloc}"
    names = _databases(server)
    if names is None:
        return import_segments(database, url, on_segment)
    wanted = parts.path.strip("/")
    if wanted and wanted not in names:
        raise DatabaseError(f"{server} serves no tuning database {wanted!r}", hint=f"it serves {', '.join(names) or 'none'}")
    shared = Shared(Taken())
    for name in [wanted] if wanted else names:
        found = _pull_one(database, server, name, on_segment)
        shared = Shared(shared.taken + found.taken, shared.segments + found.segments)
    return shared


def _databases(server: str) -> tuple[str, ...] | None:
    """The tuning databases of a server, or None if it is no server of ours. Raises `DatabaseError` if it does not answer."""
    try:
        data, _ = _get(f"{server}/-/einfall.json")
    except urllib.error.HTTPError as error:
        error.close()
        return None
    try:
        found = json.loads(data)["databases"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return tuple(str(name) for name in found) if isinstance(found, list) else None


def _pull_one(database: Database, server: str, name: str, on_segment: Advance) -> Shared:
    place = f"{server}/{quote(name)}"
    taken = Taken()
    segments: list[str] = []
    after, first = 0, True
    while True:
        try:
            data, headers = _get(f"{server}/-/einfall/{quote(name)}/after/{after}")
        except urllib.error.HTTPError as error:
            error.close()
            raise DatabaseError(f"{place} answered {error.code} {error.reason}", hint="is it served by this version of einfall?") from None
        identity, segment, last = (headers.get(f"x-einfall-{key}", "") for key in ("identity", "segment", "last"))
        if not _IDENTITY.fullmatch(identity) or (data and not (_HASH.fullmatch(segment) and _NUMBER.fullmatch(last))):
            raise DatabaseError(f"{place} does not say what it sends", hint="is it served by this version of einfall?")
        if first:
            first = False
            known = _pulled(database, place, identity)
            if known > after:
                after = known
                continue
        if not data:
            return Shared(taken, tuple(segments))
        if int(last) <= after:
            raise DatabaseError(f"{place} sends the same measurements again", hint="is it served by this version of einfall?")
        try:
            taken += take(database, segment, data, kind="pull", content=f"{identity}:{last}", place=place)
        except Invalid as error:
            raise DatabaseError(f"segment {segment} of {place} was refused: {error}", hint="what came before it is kept") from None
        segments.append(segment)
        on_segment(segment)
        after = int(last)


def _pulled(database: Database, place: str, identity: str) -> int:
    """The number up to which that file was pulled before."""
    rows = database.read("SELECT content FROM transfer WHERE kind = 'pull' AND place = ?", (place,))
    ends = [str(content).rsplit(":", 1)[-1] for (content,) in rows if str(content).startswith(f"{identity}:")]
    return max((int(end) for end in ends if _NUMBER.fullmatch(end)), default=0)


def _get(url: str) -> tuple[bytes, Any]:
    request = urllib.request.Request(url, headers={"User-Agent": "einfall"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read(MAX_BYTES), answer.headers
    except urllib.error.HTTPError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise DatabaseError(f"{url} cannot be reached ({error})", hint="check the address, and that the server runs") from error
