"""How a run on text goes, on the screen."""

from __future__ import annotations

from ..report.progress import Progress
from ..training.session import Report
from .runs import TextSession

SHOWN = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "held_out_loss": "held-out loss {:.3f}",
    "held_out_accuracy": "held-out accuracy {:.1%}",
    "score": "score {:+.2f}",
    "gold": "gold {:+.2f}",
    "reference_kl": "KL {:.2f} nats",
    "response_length": "{:.0f} tokens",
}


class TextProgress(Progress):
    """Of fine-tuning, a reward model, or policy optimisation on tokens."""

    session: TextSession
    warned: frozenset[str] = frozenset()

    def beginning(self) -> list[str]:
        session = self.session
        record, engine = session.record, session.engine
        what = f"{record['algorithm']} of {session.sources.model}, seed {record['seed']}"
        return [f"{what}, {engine.total_steps:,} sequences -> {session.path}", *session.notes]

    def parts(self, report: Report) -> list[str]:
        known = {name: value for name, value in report.metrics.items() if value is not None}
        shown = [form.format(known[name]) for name, form in SHOWN.items() if name in known]
        return [*shown, self.shares(report, "generating", "scoring", "learning")]

    def update(self, report: Report) -> None:
        """Show a report; what stands out for the first time gets a line of its own."""
        super().update(report)
        warnings = frozenset(getattr(self.session.engine, "warnings", ()))
        for warning in sorted(warnings - self.warned):
            self._print(f"note: {warning}")
        self.warned |= warnings
