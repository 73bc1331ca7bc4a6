"""Paths of models: a name ends before a slash or a colon, since `:predict` follows it."""

from __future__ import annotations

from starlette.convertors import CONVERTOR_TYPES, StringConvertor, register_url_convertor


class _NameConvertor(StringConvertor):
    regex = "[^/:]+"


if "hvdext_name" not in CONVERTOR_TYPES:
    register_url_convertor("hvdext_name", _NameConvertor())

MODEL = "{model:hvdext_name}"
VERSION = "/versions/{version:hvdext_name}"
