"""Writes docs/config.md from the schema: `python -m tools.config_reference`. A test checks that the page is current."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from hpc_rl.config.base import Section
from hpc_rl.config.checks import AUTO_IN_DEEPSPEED
from hpc_rl.config.environment import NAMES
from hpc_rl.config.identity import CIRCUMSTANCES, OF_TRAINING
from hpc_rl.config.loader import RECIPES, config_class
from hpc_rl.config.schema import Config
from hpc_rl.config.walk import describe, section_at

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
LONG = 60
"""Defaults of more characters stand below their table."""

INTRO = """\
# Config reference

Made by `python -m tools.config_reference` from the classes in `hpc_rl/config/`; do not edit.

A config is one YAML file. Only what differs from the defaults needs to stand in it. Keys that do not exist, keys given
twice and values of the wrong type are errors that name the file, the line and the nearest valid key, all at once and
before anything is submitted. Below come the fields of every recipe, then those of each.

## Who sets a field

Later ones win:

1. the default below
2. files named by `extends:` (one, or a list; relative to the file that says it; later files of a list win). Mappings
   are merged key by key; lists, values and null replace what was there
3. the YAML file itself
4. `.env` in the current directory
5. environment variables (table below); an empty one counts as not set, and one whose section is null here (LORA_RANK
   without `speaker.lora`) changes nothing and says so
6. `--set key.path=value`, the value being YAML: `--set sample.shard_size=8`, `--set speaker.lora=null`
7. `--workspace`, `--executor`

Fields of type *path* may contain `~`, `$VAR`, `${VAR}` and `${VAR:-default}`, taken from the environment or `.env`.
Relative paths start at the current directory, so the shipped configs are launched from the root of the repository. The
workspace keeps the resolved config with absolute paths; jobs read that one and nothing else.
"""

IDENTITY = """\
## What may change while a run goes on

A workspace belongs to one experiment. Launching another one into it is refused, with the keys that differ. These fields
are circumstances, not part of the experiment, and may be changed at any time:

{circumstances}

and of the sections that train ({trainings}): {of_training}.

Of `stages` one number does belong to the experiment: nodes × ranks of a training, because it multiplies the batch.
Its `deepspeed` may change: ZeRO stages and offload divide memory differently but compute the same.
"""

LEGACY = """\
## Keys of the seed with `recipe: {recipe}`

A `training_config.json` of the system that the recipe comes from may be named in `extends:`, before or after a file of
yours; any file may have its keys at the top level. Each says at launch what it sets. A file with both spellings of a
field, and two values, is an error.
"""

CHECKS = """\
## What is checked before anything is submitted

- The workspace can be written to. With executor slurm it lies beneath one of `cluster.shared_roots` where these are
  given; otherwise it must not be on {types},
  nor beneath {folders} (unless `cluster.allow_local_workspace`).
- Model folders exist and have `config.json` and `*.safetensors`.
- `data.image_root` has the layout `<split>/<category>/<concept>/*` with at least `data.k` concepts in each category. Of
  its pictures at most about {look_at} are looked at, equally many of each concept: the header, and the whole picture
  where the file does not end as its format should. The `prepare` stage decodes all of them.
- Every row of `questions.file` and `questions.held_out_file`: the first bad ones with file, line and field.
- The DeepSpeed JSON leaves to the config what the config has; these keys are absent or `"auto"`:

{auto}
"""


def field_docs(cls: type[Section]) -> dict[str, str]:
    """The text under each field of a section, in the class or in those it comes from."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if issubclass(c, Section) and c is not Section]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(text, str)
            ):
                docs[statement.target.id] = inspect.cleandoc(text)
    return docs


def sections(cls: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[Section]]]:
    """All sections with their key paths, each before those within it."""
    yield path, cls
    for name in cls.model_fields:
        inner, inner_path = section_at(cls, (name,)), (*path, name)
        if inner is None and name == "stages":
            inner, inner_path = section_at(cls, (name, "…")), (*path, name, "NAME")
        if inner is not None:
            yield from sections(inner, inner_path)


def recipes() -> dict[str, type[Config]]:
    """The config classes of the shipped recipes."""
    return {name: config_class(name) for name in RECIPES}


def page() -> str:
    """The whole page as Markdown."""
    seen: dict[type[Section], str] = {}
    parts = [INTRO, "## Fields of every recipe\n", *_sections(Config, tuple(Config.model_fields), seen)]
    for name, cls in recipes().items():
        own = [field for field in cls.model_fields if field not in Config.model_fields]
        parts += [f"## Fields of `recipe: {name}`\n", _stages(cls)]
        parts += _sections(cls, own, seen)
    parts += [_variables(), _legacy_keys()]
    trainings = [field for cls in recipes().values() for fields in cls.train_sections.values() for field in fields]
    parts.append(
        IDENTITY.format(
            circumstances=_listed(CIRCUMSTANCES), trainings=_listed(trainings), of_training=_listed(OF_TRAINING)
        )
    )
    parts.append(_checks())
    return "\n".join(parts)


def _sections(cls: type[Config], fields: Sequence[str], seen: dict[type[Section], str]) -> Iterator[str]:
    """The tables of some of the top-level fields and of what is in them; of a class that comes again, where it was."""
    yield _table((), cls, fields)
    again: tuple[str, ...] | None = None
    for path, inner in sections(cls):
        if not path or path[0] not in fields or (again and path[: len(again)] == again):
            continue
        name = ".".join(path)
        if (first := seen.setdefault(inner, name)) != name:
            again = path
            yield f"### `{name}`\n\nThe same fields as `{first}`.\n"
        else:
            yield _table(path, inner, tuple(inner.model_fields))


def _stages(cls: type[Config]) -> str:
    own = (f"`{name}`: {key} {value}" for name, d in cls.stage_defaults.items() for key, value in d.items())
    several = "on several nodes: " + _listed(cls.train_sections)
    arrays = "arrays, with `tasks`: " + _listed(
        name for name in cls.stage_names or () if name in (cls.array_stages or ())
    )
    defaults = f"defaults other than those of `stages.NAME`: {', '.join(own)}"
    return f"Its stages are {_listed(cls.stage_names or ())}; {arrays}; {several}; {defaults}.\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _variables() -> str:
    rows = [f"| `{name}` | `{field}` | |" for name, field in NAMES.items()]
    for recipe, cls in recipes().items():
        rows += [f"| `{name}` | `{field}` | {recipe} |" for name, field in cls.variables.items()]
    return "\n".join(["## Environment variables\n", "| variable | field | recipe |", "|---|---|---|", *rows, ""])


def _legacy_keys() -> str:
    lines = []
    for recipe, cls in recipes().items():
        if not cls.legacy_keys:
            continue
        lines += [LEGACY.format(recipe=recipe), "| key | sets |", "|---|---|"]
        for key, legacy in cls.legacy_keys.items():
            lines.append(f"| `{key}` | {'; '.join(part for part in (_listed(legacy.fields), legacy.why) if part)} |")
    return "\n".join([*lines, ""])


def _checks() -> str:
    from hpc_rl.config.check_images import LOOK_AT
    from hpc_rl.config.check_storage import NODE_LOCAL_FOLDERS, NODE_LOCAL_TYPES

    return CHECKS.format(
        types=", ".join(sorted(NODE_LOCAL_TYPES)),
        folders=", ".join(map(str, NODE_LOCAL_FOLDERS)),
        look_at=LOOK_AT,
        auto="\n".join(f"  - `{key}` ({owner})" for key, owner in AUTO_IN_DEEPSPEED.items()),
    )


def _table(path: tuple[str, ...], cls: type[Section], fields: Sequence[str]) -> str:
    docs = field_docs(cls)
    lines = [f"### `{'.'.join(path)}`\n", f"{inspect.cleandoc(cls.__doc__ or '')}\n"] if path else ["### Top level\n"]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    below = []
    for name in fields:
        info = cls.model_fields[name]
        default, meaning = _default(info), docs[name].replace("\n", " ")
        if len(default) > LONG:
            below.append(f"\nDefault of `{name}`:\n\n> {info.default}")
            default = "below"
        if default == "required" and " Default: " in meaning:  # the loader's
            meaning, _, default = meaning.partition(" Default: ")
        cells = (f"`{name}`", describe(info), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, *below, ""])


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value: Any = info.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its own"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
