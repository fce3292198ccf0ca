"""`megatron-vespo doctor`: what this host has, what is missing, what that costs, and the command that mends it.

Of the standard library alone, since everything else may be what is broken: `python -m megatron_vespo.doctor` works where
the command itself does not start.
"""

from megatron_vespo.doctor.examination import Options, examine
from megatron_vespo.doctor.finding import Finding, is_fit
from megatron_vespo.doctor.report import as_json, as_text

__all__ = ["Finding", "Options", "as_json", "as_text", "examine", "is_fit"]
