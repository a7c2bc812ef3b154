"""What all configuration classes share."""

__all__ = ["NAME", "Config"]

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class Config(BaseModel):
    """Refuses unknown keys; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
