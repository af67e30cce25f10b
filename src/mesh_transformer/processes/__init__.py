"""The processes of one run: who takes part, and how they agree without any device taking part in it."""

from mesh_transformer.processes.group import ONE, Processes
from mesh_transformer.processes.joining import join
from mesh_transformer.processes.leaving import end_after_error
from mesh_transformer.processes.sameness import check_same, version_facts
from mesh_transformer.processes.stopping import StopAgreement
from mesh_transformer.processes.watchdog import Watchdog

__all__ = ["ONE", "Processes", "StopAgreement", "Watchdog", "check_same", "end_after_error", "join", "version_facts"]
