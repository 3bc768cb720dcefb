"""The settings of conf/logger that depend on the run: the folder to write to, and W&B's id.

loggers = fcn.cli.build_each(logger_settings(cfg, run), "logger", Logger)    # as train.py does
"""

import secrets
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fcn.cli import literal


def logger_settings(cfg: DictConfig, run: Path) -> DictConfig:
    """The group `logger`, ready to be built.

    An entry whose `save_dir` is null gets the run folder. An entry whose `id` is null gets a random
    id. The id is also written into `cfg`, and so into config.yaml, so that a resumed run keeps it.

    Args:
        cfg: the run's settings.
        run: the run folder.
    """
    group = cfg.get("logger") or OmegaConf.create()
    for entry in filter(OmegaConf.is_dict, group.values()):
        if "id" in entry:
            entry.id = entry.id or secrets.token_hex(4)
    settings = OmegaConf.create({"logger": group})  # a copy: a run folder may be moved later
    for entry in filter(OmegaConf.is_dict, settings.logger.values()):
        if "save_dir" in entry and not entry.save_dir:
            entry.save_dir = literal(str(run))
    return settings
