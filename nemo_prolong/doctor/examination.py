"""Look at a node, and at what a stage needs of it, within seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_prolong.config.compose import Request
from nemo_prolong.config.findings import ConfigErrors
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed.launched import take_place
from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.doctor.checks import credentials, gpus, nodes, stage, system, versions
from nemo_prolong.doctor.facts import Machine
from nemo_prolong.doctor.finding import Finding, is_go, refused
from nemo_prolong.doctor.machine import Host, read_machine
from nemo_prolong.doctor.meeting import Meeting, MeetingError, report_to_rank_zero
from nemo_prolong.doctor.probing import BUDGET_SECONDS, Probe
from nemo_prolong.doctor.report import Examination
from nemo_prolong.errors import ConfigError, ProlongError


@dataclass
class Doctor:
    """One look at a node.

    Attributes:
        host: Where facts are read.
        environment: Variables of the process.
        budget_seconds: Time for everything that this node reads.
        probes: What is being read.
    """

    host: Host = field(default_factory=Host)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    budget_seconds: float = BUDGET_SECONDS
    probes: list[Probe[Any]] = field(default_factory=list)

    @property
    def is_stuck(self) -> bool:
        """Whether something still has not answered. The end of the process would wait for it."""
        return any(probe.is_stuck for probe in self.probes)

    def examine(self, request: Request[RunConfig] | None) -> Examination | None:
        """Look, and return what was found.

        Under a launcher one process of each node looks. That of rank 0 returns what all found, the others the same
        verdict with what they found themselves.

        Args:
            request: The stage, or None to look at the machine alone.

        Returns:
            What was found, or None in processes that do not look.
        """
        started = time.monotonic()
        try:
            place = take_place(dict(self.environment))
        except ConfigError as error:
            return self._look(request, None, started, [refused("launcher", error)])
        if place is not None and place.local_rank != 0:
            return None
        if place is None or place.num_nodes == 1:
            return self._look(request, place, started, [])
        job = self.environment.get("TORCHELASTIC_RUN_ID") or self.environment.get("SLURM_JOB_ID") or ""
        if place.rank == 0:
            return self._lead(request, place, job, started)
        return self._follow(request, place, job, started)

    def _lead(
        self, request: Request[RunConfig] | None, place: RankEnvironment, job: str, started: float
    ) -> Examination:
        try:
            meeting = Meeting(place, job)
        except OSError as error:
            return self._look(request, place, started, [nodes.port_taken(place, error)])
        own = self._look(request, place, started, [])
        reports = meeting.reports()
        host = own.machine.host
        found = [*nodes.merged(own.findings, host, reports), *nodes.meeting_findings(place, reports)]
        meeting.end(is_go(found))
        return Examination(own.subject, own.machine, tuple(found), time.monotonic() - started)

    def _follow(
        self, request: Request[RunConfig] | None, place: RankEnvironment, job: str, started: float
    ) -> Examination:
        own = self._look(request, place, started, [])
        try:
            _, go = report_to_rank_zero(place, job, own.machine.host, own.findings)
        except MeetingError as error:
            found = (*own.findings, nodes.unreachable(error))
            return Examination(own.subject, own.machine, found, time.monotonic() - started)
        return Examination(own.subject, own.machine, own.findings, time.monotonic() - started, elsewhere_go=go)

    def _look(
        self,
        request: Request[RunConfig] | None,
        place: RankEnvironment | None,
        started: float,
        found: Sequence[Finding],
    ) -> Examination:
        deadline = started + self.budget_seconds
        of_machine = self.host.probes()
        self.probes += of_machine
        cfg, findings = None, list(found)
        of_stage: list[Probe[list[Finding]]] = []
        if request is not None:
            try:
                cfg, _ = request.load()
                of_stage = stage.stage_probes(cfg)
                self.probes += of_stage
            except ConfigError as error:
                findings += [refused("configuration", one) for one in _each(error)]
        machine, problems = read_machine(of_machine, deadline)
        # What was not read is not missing.
        unread = {problem.name for problem in problems}
        judged = [finding for finding in machine_findings(machine, cfg, place) if finding.name not in unread]
        findings += [*problems, *judged, *stage.found_by(of_stage, deadline)]
        if cfg is not None:
            findings += self._of_launch(cfg, place)
        subject = " ".join(request.overrides) if request is not None else ""
        return Examination(subject, machine, tuple(findings), time.monotonic() - started)

    def _of_launch(self, cfg: RunConfig, place: RankEnvironment | None) -> list[Finding]:
        """Return what the environment of the process means for a stage: tokens, and the nodes of the job."""
        home = Path(self.environment.get("HOME") or "/")
        found = credentials.credential_findings(cfg, credentials.known_sources(self.environment, home))
        return [*found, *(nodes.plan_findings(cfg, place) if place is not None else [])]


def machine_findings(machine: Machine, cfg: RunConfig | None, place: RankEnvironment | None = None) -> list[Finding]:
    """Return what a node means for a stage, or for anyone where there is none.

    Args:
        machine: The node.
        cfg: The stage, or None.
        place: Which rank a launcher made this process, or None.
    """
    ranks_here = place.local_world_size if place is not None else 1
    found = [*gpus.gpu_findings(machine, cfg), *versions.version_findings(machine, cfg)]
    if cfg is not None:
        found += versions.kernel_findings(machine, cfg)
    return [*found, *versions.fallback_findings(machine, cfg), *system.system_findings(machine, cfg, ranks_here)]


def _each(error: ProlongError) -> Sequence[ProlongError]:
    return error.errors if isinstance(error, ConfigErrors) else [error]
