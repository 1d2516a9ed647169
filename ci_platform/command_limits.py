"""What one command may use, by the settings."""

from __future__ import annotations

from ci_platform.sandboxes import SandboxLimits
from ci_platform.settings import Settings


def limits_of(settings: Settings) -> SandboxLimits:
    """Return the limits of each command."""
    return SandboxLimits(
        timeout=settings.command_timeout,
        memory=settings.command_memory,
        processes=settings.command_processes,
        cpus=settings.command_cpus,
        cpu=settings.command_cpu,
        disk=settings.command_disk,
        files=settings.command_files,
        output=settings.max_log,
    )
