"""What is wrong or suspicious, in words that say where, why it matters, and what mends it."""

from dataclasses import dataclass

ERROR, WARNING, ADVICE = "error", "warning", "advice"
SEVERITIES = (ERROR, WARNING, ADVICE)


@dataclass(frozen=True)
class Finding:
    """One finding of the doctor.

    Args:
        severity: "error" for what fails or makes results worthless, "warning" for what is probably a mistake, "advice"
            for settings that fit.
        where: split, file, or part of a checkpoint.
        what: is there.
        why: it matters.
        repair: of it.
    """

    severity: str
    where: str
    what: str
    why: str
    repair: str

    @property
    def line(self) -> str:
        """In one line, without its place."""
        return f"{self.what}: {self.why}; {self.repair}"

    def __str__(self) -> str:
        return f"{self.severity.upper()} {self.where}: {self.what}\n  why: {self.why}\n  repair: {self.repair}"
