"""The key of an endpoint: from the job's environment or a private file, and such that a header may carry it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc_rl.config.clients import TeacherClientConfig
from hpc_rl.services.trust import Untrusted, read_own


class BadKey(ValueError):
    """A key that cannot be read or sent; the message says where it is from and what to do, and never the key."""


@dataclass(frozen=True)
class Key:
    """A key, "" where there is none, and where it is from. It is shown nowhere."""

    text: str = field(repr=False)
    whose: str


def read_key(options: TeacherClientConfig, environ: Mapping[str, str], section: str) -> Key:
    """The key of `section`, such as `services.teacher.client`.

    What no header may have is refused here: who makes the request would say the whole header in its error.

    Raises
    ------
    BadKey
        When the file with the key is missing, empty, somebody else's, or may be read by others; when the key has a
        line break, a space, or a character that is not ASCII.
    """
    file = options.api_key_file
    if file is None:
        where, text = f"the variable {options.api_key_env}", environ.get(options.api_key_env, "").strip()
    else:
        where = f"{section}.api_key_file: {file}"
        try:
            text = read_own(file, private=True).decode(errors="replace").strip()
        except FileNotFoundError:
            raise BadKey(f"{where} does not exist; write the key into it and `chmod 600` it") from None
        except Untrusted as error:
            raise BadKey(f"{section}.api_key_file: {error}, or `chmod 600` it") from error
        if not text:
            raise BadKey(f"{where} is empty; write the key into it")
    if not all("!" <= character <= "~" for character in text):
        what = "has a line break, a space, or a character that is not ASCII, and no header may carry such a key"
        raise BadKey(f"{where} {what}; leave nothing there but the key")
    return Key(text, options.api_key_env if file is None else str(file))
