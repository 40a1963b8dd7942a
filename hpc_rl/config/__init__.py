"""The typed config of a run. `load` reads YAML, `from_json` a job's workspace, `check` looks at the file system."""

from hpc_rl.config.errors import ConfigError, Problem
from hpc_rl.config.identity import config_hash, differing_keys, to_json
from hpc_rl.config.loader import Loaded, from_json, load, load_with_places
from hpc_rl.config.schema import Config, StageConfig

__all__ = [
    "Config",
    "ConfigError",
    "Loaded",
    "Problem",
    "StageConfig",
    "config_hash",
    "differing_keys",
    "from_json",
    "load",
    "load_with_places",
    "to_json",
]
