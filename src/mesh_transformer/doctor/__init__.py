"""Checks of environment, storage, data, checkpoint and configuration before a run; each fault with its mend."""

from mesh_transformer.doctor.examine import Options, examine, faults_before_start, faults_of_run
from mesh_transformer.doctor.finding import Finding

__all__ = ["Finding", "Options", "examine", "faults_before_start", "faults_of_run"]
