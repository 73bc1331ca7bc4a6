"""The five answers together, and what they must not be together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hvdext.common.checks import require_choice
from hvdext.sync.rule import Mean, Outer, Pull, Rule
from hvdext.sync.what import What
from hvdext.sync.when import When
from hvdext.sync.whom import Hierarchical, Whom
from hvdext.sync.wire import Wire

ON_NONFINITE = ("raise", "skip_rank")


@dataclass(frozen=True)
class Settings:
    """What one `ParameterSync` has been told.

    Raises:
        TypeError, ValueError: if an answer is not one, or two of them contradict each other.
    """

    what: What
    when: When
    wire: Wire
    whom: Whom
    rule: Mean | Pull | Outer
    on_nonfinite: str

    def __post_init__(self):
        for name, kind in [("what", What), ("when", When), ("whom", Whom), ("rule", Rule)]:
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` must be one of hvd.sync's answers to it, such as {_EXAMPLES[name]}. "
                    f"Received: {name}={value!r}."
                )
        require_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        self.when.check_fragments(self.what.count)
        if self.rule.keeps_centre and not self.whom.shares_reference:
            raise ValueError(
                "`rule` must do without values that all ranks have in common where only some of them meet: "
                "Mean() or Pull(alpha), or whom=Everyone() or Group(...). "
                f"Received: rule={self.rule!r} with whom={self.whom!r}."
            )
        coarse = self.wire.format in ("int8", "int4")
        if coarse and isinstance(self.whom, Hierarchical):
            raise ValueError(
                "`wire` must be float32, float16 or bfloat16 with Hierarchical: int8 and int4 are only fine "
                "enough for the difference from values that all ranks have in common. "
                f"Received: wire={self.wire!r}."
            )
        if self.wire.rounding == "error_feedback" and not self.whom.shares_reference:
            raise ValueError(
                "`wire` must not keep errors back where the peers change: use rounding='stochastic'. "
                f"Received: wire={self.wire!r} with whom={self.whom!r}."
            )

    @property
    def keeps_centre(self) -> bool:
        """Whether differences from common values travel: the smaller they are, the finer the wire is."""
        return self.rule.keeps_centre or (self.wire.format != "float32" and self.whom.shares_reference)

    def facts(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {
            name: getattr(self, name) for name in ("what", "when", "wire", "whom", "rule", "on_nonfinite")
        }


_EXAMPLES = {
    "what": "hvd.sync.All()",
    "when": "hvd.sync.Every(32)",
    "whom": "hvd.sync.Everyone()",
    "rule": "hvd.sync.Mean()",
}
