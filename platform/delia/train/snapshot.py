"""Ray Train's list of the checkpoints that it has committed, and how one is made anew that a kill cut short.

Ray writes the list in place, so a driver killed in that moment leaves a part, which no later run could read.
The checkpoints lie beside it, each with a note of its step.
"""

import json
import logging
import re
from contextlib import suppress

import ray

from delia.store.tables import exists, join, list_names, open_filesystem, read_bytes, write_bytes
from delia.train.checkpoints import read_sealed_step

logger = logging.getLogger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists the checkpoints that it has committed."""
_CHECKPOINT = re.compile(r"checkpoint_\d")


def mend_snapshot(address: str) -> None:
    """List the checkpoints of a run anew where their list is cut short; a whole one is left as it is.

    A checkpoint that was saved and not yet committed is listed too: with all its seals it is as good. One
    without is listed as the oldest, so that Ray removes it when it next commits; nothing resumes from it.

    Args:
        address: The run's directory, of checkpoints and their list.
    """
    place = join(address, SNAPSHOT)
    if not exists(place):
        return
    with suppress(ValueError):
        json.loads(read_bytes(place))
        return
    names = [name for name in list_names(address) if _CHECKPOINT.match(name)]
    found = sorted((read_sealed_step(join(address, name))[0], name) for name in names)
    if not found:
        logger.warning(
            "%s was cut short by a kill, and no checkpoint is beside it: training starts anew", place
        )
        filesystem, path = open_filesystem(place)
        filesystem.delete_file(path)
        return
    logger.warning(
        "%s was cut short by a kill: it is made anew, its last checkpoint is of step %d", place, found[-1][0]
    )
    results = [{"checkpoint_dir_name": name, "metrics": {"step": step}} for step, name in found]
    listed = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    write_bytes(place, json.dumps(listed).encode())
