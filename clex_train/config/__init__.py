"""Schema of a run: one dataclass a group, a string under each field with unit and range."""
