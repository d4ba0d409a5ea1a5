"""What parsers and constructors say of wrong input, in our words: value, rule, remedy, on one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace

from ptql.errors import InputError

SECTIONS = ("trainer", "data", "model", "model.weight", "model.activation")


@contextmanager
def told_as_input() -> Iterator[None]:
    """Around parsing and instantiation, where every exception is about what was given: of jsonargparse, Lightning,
    or the constructor of any class that a configuration names. The run itself is not in here: bugs show."""
    try:
        yield
    except (NameError, AssertionError):
        raise  # no input makes these: a bug
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__ or cause.__context__
        raise cause or InputError(plain_message(str(error) or type(error).__name__)) from error


def check_sections(config: Any) -> None:
    """Raise `InputError` where a value stands in the place of a section; jsonargparse takes it, and stumbles later."""
    command = config.get("subcommand")
    for name in SECTIONS if command else ():
        if (section := config.get(f"{command}.{name}", {})) is None or not isinstance(section, (Namespace, dict)):
            raise InputError(f"{name}={section}: a section holds settings by name, as bits: 4; correct or remove it")


def plain_message(message: str) -> str:
    """What jsonargparse says of a wrong option, on one line and the value first where it can be told."""
    remedy = "; correct it, --help lists the options"
    text = " ".join(str(message).split()).replace(remedy, "")  # an inner parser has added it already
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    if found := re.search(r"""Parser key "([^"]+)": Expected a <class '(\w+)'>\. Got value: (.*)$""", text):
        key, kind, value = found.groups()
        text = f"{key}={value}: {kinds.get(kind, kind)} is needed"
    elif found := re.search(
        r"""(?:Parser key "([^"]+)": (?:.*? - )?)?Does not validate .*? Errors: - (.*?) Given value type: """, text
    ):
        reasons = found[2].replace(" - Expected a <class 'NoneType'>", "")
        text = f"{found[1] + '=' if found[1] else ''}{text.rpartition(' Given value: ')[2]}: {reasons}"
    if found := re.match(r"(\S+=\{'init_args': .*\}): Not a valid subclass", text):
        return f"{found[1]}: no part is named before these settings of one; put the method first, as -c methods/abq"
    return text + remedy
