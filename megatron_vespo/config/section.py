"""The base of every part of the configuration."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings. Unknown keys are refused; values don't change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )

    def own_problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of what types alone don't tell: settings that contradict each other or cannot work."""
        return iter(())

    def problems(self, path: str = "") -> Iterator[tuple[str, str]]:
        """`own_problems` of this section and of all sections in it, with whole paths."""
        prefix = f"{path}." if path else ""
        for key, message in self.own_problems():
            yield f"{prefix}{key}", message
        for name in type(self).model_fields:
            value = getattr(self, name)
            for number, part in enumerate(value if isinstance(value, tuple) else [value]):
                if isinstance(part, Section):
                    yield from part.problems(
                        f"{prefix}{name}.{number}" if isinstance(value, tuple) else f"{prefix}{name}"
                    )
