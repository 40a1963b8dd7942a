"""Environment variables and `.env`: the names of the seed, and the fields that they set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAMES: Mapping[str, str] = {
    "WORKSPACE_DIR": "run.workspace",
    "AUTO_RETRY_ENABLED": "run.auto_retry",
    "AUTO_CONTINUE_ON_FAILURE": "run.continue_on_failure",
    "INFERENCE_CONCURRENCY": "services.listener.inference_concurrency",
    "INFERENCE_ACQUIRE_TIMEOUT": "services.listener.acquire_timeout_s",
    "LISTENER_BATCH_SIZE": "services.listener.batch_size",
    "LISTENER_URL": "services.listener.client.url",
    "LISTENER_TIMEOUT": "services.listener.client.timeout_s",
    "LISTENER_CHUNK_SIZE": "services.listener.client.chunk_size",
    "LISTENER_CHUNK_DELAY": "services.listener.client.chunk_delay_s",
    "LISTENER_MAX_RETRIES": "services.listener.client.max_retries",
    "LISTENER_BACKOFF_FACTOR": "services.listener.client.backoff_factor",
    "TEACHER_BASE_URL": "services.teacher.client.url",
    "TEACHER_MODEL": "services.teacher.client.model",
    "LOG_PATH": "logging.prediction_log",
    "DEBUG_MODE": "logging.debug",
    "WANDB_MODE": "logging.wandb.mode",
    "WANDB_PROJECT": "logging.wandb.project",
    "WANDB_DIR": "logging.wandb.dir",
}
"""Environment variable → field, of every recipe (L4, L12, S13); each has more of its own (`Config.variables`). They
beat the YAML and are beaten by `--set`."""


@dataclass(frozen=True)
class Environment:
    """Variables of the process over those of a `.env` file, each with its place for messages."""

    values: Mapping[str, str]
    places: Mapping[str, str]

    def get(self, name: str) -> tuple[str, str] | None:
        """Value and place of a variable. One that is empty counts as not set."""
        value = self.values.get(name, "")
        return (value, self.places[name]) if value else None


def read_environment(env: Mapping[str, str], folder: Path) -> Environment:
    """`env`, and beneath it the variables of the `.env` file in `folder` where there is one."""
    values: dict[str, str] = {}
    places: dict[str, str] = {}
    file = folder / ".env"
    if file.is_file():
        from dotenv import dotenv_values  # here because most runs have no .env, and launching is meant to be quick

        for name, value in dotenv_values(file).items():
            if value:
                values[name], places[name] = value, f".env ({name})"
    for name, value in env.items():
        if value:
            values[name], places[name] = value, f"environment variable {name}"
    return Environment(values, places)


_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\}|(?P<plain>\w+))")


class UnsetVariable(Exception):
    """A variable in a path that neither the environment nor `.env` has; the text is its name."""


def expand(text: str, environment: Environment) -> str:
    """`text` with `$VAR`, `${VAR}`, `${VAR:-default}` and a leading `~` replaced.

    Raises
    ------
    UnsetVariable
        For a variable without value and default.
    """

    def value(match: re.Match[str]) -> str:
        name = match["braced"] or match["plain"]
        found = environment.get(name)
        if found:
            return found[0]
        if match["default"] is not None:
            return match["default"]
        raise UnsetVariable(name)

    text = _VARIABLE.sub(value, text)
    home = environment.get("HOME")
    if home and (text == "~" or text.startswith("~/")):
        return home[0] + text[1:]
    return str(Path(text).expanduser()) if text.startswith("~") else text
