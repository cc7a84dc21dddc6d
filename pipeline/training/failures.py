"""Which failures of a worker no restart would mend, and the sentence that each is told in."""

import logging
import socket
import traceback

import torch

from pipeline.artifacts import is_disk_full
from pipeline.training.memory import explain_out_of_memory, is_out_of_memory
from pipeline.training.plan import TrainingPlan

logger = logging.getLogger(__name__)

TRACEBACK_FILE = "failure.txt"
# Faults of the code or of the installation: the next start would come to the same line. What a network, a lost peer or
# a device reports are RuntimeErrors and OSErrors, and those may pass.
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError, TypeError
)  # fmt: skip


def explain_lasting_failure(
    error: BaseException, plan: TrainingPlan, device: torch.device, world_size: int
) -> str | None:
    """Say in one sentence what stopped a worker for good; None where another start may get further."""
    if is_out_of_memory(error):
        return explain_out_of_memory(error, plan, device, world_size)
    if is_disk_full(error):
        return explain_full_disk(error)
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, PermissionError):
        return f"A worker may not use {error.filename or 'a file'} ({error.strerror}); give it the right to."
    if isinstance(error, FAULTS):
        where = ""
        try:
            plan.output.write_text(TRACEBACK_FILE, "".join(traceback.format_exception(error)))
            where = f" The traceback is in {plan.output.url}/{TRACEBACK_FILE}."
        except OSError as failed:
            logger.warning("The traceback could not be written: %s", failed)
        words = " ".join(str(error).split())[:300].rstrip(".")
        return f"A worker failed as it would again at each start ({type(error).__name__}: {words}).{where}"
    return None


def explain_full_disk(error: BaseException) -> str:
    """Say where no space is left, as far as the error knows it."""
    name = next((each.filename for each in _chain(error) if isinstance(each, OSError) and each.filename), None)
    where = f"the device of {name}" if name else f"a disk of {socket.gethostname()}"
    return f"No space left on {where}: make room there, and the same command goes on from the last checkpoint."


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
