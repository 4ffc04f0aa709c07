"""Calls to actors: an error of ours that was raised there is raised here as itself."""

from typing import Any

import ray
from ray.exceptions import RayTaskError

from delia.errors import DeliaError


def call(method: Any, *args: Any, **options: Any) -> Any:
    """Call a method of an actor's handle, and wait for what it returns.

    Raises:
        DeliaError: The method raised it.
    """
    try:
        return ray.get(method.remote(*args, **options))
    except RayTaskError as error:
        if isinstance(error.cause, DeliaError):
            raise error.cause from error
        raise
