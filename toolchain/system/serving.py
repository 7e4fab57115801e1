"""The child's side of a child process that answers messages; `toolchain.system.child` is the parent's side.

The child writes its answers to the original standard output. All text that libraries print to standard output goes to
standard error. The parent process stores the child's standard error and quotes it if the child dies.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain import errors


def serve(create: Callable[[dict[str, Any]], Any]) -> None:
    """Answers messages until standard input ends.

    `create` makes an object from the first message, and the object's attribute `ready` is the answer to the first
    message. Each later message calls one method of the object that `create` made. The value ``do`` of a later message
    is the method's name, and the other values of the message are the method's arguments.

    Args:
        create: Function that makes an object from the first message.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if child is None:
                child = create(message)
                reply = child.ready
            else:
                reply = getattr(child, message.pop("do"))(**message)
        except errors.ToolchainError as error:
            reply = {"error": {"type": type(error).__name__, "cause": error.cause, "hint": error.hint}}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": {"type": "ToolchainError", "cause": f"{type(error).__name__}: {error}", "hint": ""}}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


def limit_memory(size: int) -> None:
    """Limits the memory that this process may allocate from now on; without an effect on systems other than Linux."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    used = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + size if hard == resource.RLIM_INFINITY else min(used + size, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
