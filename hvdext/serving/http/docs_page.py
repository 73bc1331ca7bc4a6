"""The OpenAPI description as a page to read: one file, no scripts."""

from __future__ import annotations

import html
import importlib.resources
import json
import string
from collections.abc import Iterator
from typing import Any


def render(document: dict[str, Any]) -> str:
    """The page.

    Args:
        document: as `openapi.document` makes it.
    """
    template = importlib.resources.files("hvdext.serving.http").joinpath("docs.html")
    tags: dict[str, list[str]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                needs_key = bool(operation.get("security", document["security"]))
                free = bool(document["security"]) and not needs_key
                section = _operation(path, method, operation, item.get("parameters", []), free)
                tags.setdefault(operation["tags"][0], []).append(section)
    sections = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(found)}" for tag, found in tags.items())
    schemas = document["components"]["schemas"]
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        version=html.escape(document["info"]["version"]),
        description=html.escape(document["info"]["description"]),
        keys=_keys(document),
        operations=sections,
        schemas="".join(
            _folded(name, _code(schema), id_=f"schema-{name}") for name, schema in schemas.items()
        ),
    )


def _keys(document: dict[str, Any]) -> str:
    if not document["security"]:
        return ""
    return (
        "<p>Requests need a key: <code>Authorization: Bearer KEY</code> or <code>X-API-Key: KEY</code>. "
        "What is marked <em>free</em> needs none.</p>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], parameters: list[dict], free: bool) -> str:
    mark = ' <em class="free">free</em>' if free else ""
    head = (
        f'<span class="method {method}">{method.upper()}</span> '
        f'<code class="path">{html.escape(path)}</code> '
        f'<span class="summary">{html.escape(operation["summary"])}</span>{mark}'
    )
    return f"<details><summary>{head}</summary><div>{''.join(_inside(operation, parameters))}</div></details>"


def _inside(operation: dict[str, Any], parameters: list[dict]) -> Iterator[str]:
    if "description" in operation:
        yield f"<p>{html.escape(operation['description'])}</p>"
    for parameter in parameters:
        allowed = parameter["schema"].get("enum")
        values = ", ".join(map(str, allowed)) if allowed else parameter["schema"].get("pattern", "")
        yield f"<p><code>{parameter['name']}</code> in the path: {html.escape(values)}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body:
        for name, example in body.get("examples", {}).items():
            yield f"<p>Example for {html.escape(name)}:</p>{_code(example['value'], indent=None)}"
        yield _folded("Schema of the body", _code(body["schema"]))
    rows = "".join(_response(code, response) for code, response in sorted(operation["responses"].items()))
    yield f"<table><tr><th>Status</th><th>Meaning</th><th>Body</th></tr>{rows}</table>"


def _response(code: str, response: dict[str, Any]) -> str:
    bodies = []
    for media_type, content in response.get("content", {}).items():
        reference = content["schema"].get("$ref", "").rpartition("/")[2]
        link = f' <a href="#schema-{reference}">{reference}</a>' if reference else ""
        bodies.append(f"<code>{html.escape(media_type)}</code>{link}")
    meaning = html.escape(response["description"])
    return f"<tr><td>{code}</td><td>{meaning}</td><td>{'<br>'.join(bodies)}</td></tr>"


def _folded(title: str, inside: str, id_: str = "") -> str:
    name = f' id="{html.escape(id_)}"' if id_ else ""
    return f"<details{name}><summary>{html.escape(title)}</summary><div>{inside}</div></details>"


def _code(value: Any, indent: int | None = 2) -> str:
    return f"<pre>{html.escape(json.dumps(value, indent=indent, ensure_ascii=False))}</pre>"
